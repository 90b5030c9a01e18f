"""A trained repository that was never trained, all files of one in a fraction of a second, and what one is trained from."""

import json

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from tokenrec_hf import EmbeddingStore, Recipe
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models.configuration_tokenrec import LightGCNConfig, MQTokenizerConfig, T5GenerativeRetrievalConfig
from tokenrec_hf.models.modeling_collaborative import LightGCNModel, save_collaborative
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel
from tokenrec_hf.models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from tokenrec_hf.repository.repository import make_readable
from tokenrec_hf.training.initialization import build_tokenizer, prepare_mq_tokenizer

DIM = 4
USERS, ITEMS = [f"u{n}" for n in range(6)], [f"i{n}" for n in range(12)]
# Five items of each user; the last two are held out.
PAIRS = [(user, (3 * user + step) % len(ITEMS)) for user in range(len(USERS)) for step in range(5)]
# The least training that has all stages, with a checkpoint in each.
TINY_TRAINING = {
    "collaborative.config": {"embedding_dim": DIM, "num_layers": 1},
    "collaborative.evaluate_every": 1,
    "collaborative.training": {"num_train_epochs": 2, "per_device_train_batch_size": 16},
    "mq_tokenizer.config": {"num_codebooks": 2, "codebook_size": 4, "codebook_dim": 4, "hidden_dim": 4},
    "mq_tokenizer.evaluate_every": 2,
    "mq_tokenizer.training": {"max_steps": 4, "per_device_train_batch_size": 8},
    "retrieval.backbone": None,
    "retrieval.num_negatives": 0,
    "retrieval.evaluate_every": 1,
    "retrieval.config": {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "projection_dim": 4,
        "loss_type": "softmax",
    },
    "retrieval.training": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "warmup_steps": 1},
}


def tiny_splits():
    """The items of each user, of which the last two are held out."""
    splits = {}
    for name, steps in (("train", (0, 1, 2)), ("validation", (3,)), ("test", (4,))):
        rows = [pair for place, pair in enumerate(PAIRS) if place % 5 in steps]
        ids = {"user_id": [USERS[user] for user, _ in rows], "item_id": [ITEMS[item] for _, item in rows]}
        splits[name] = Dataset.from_dict(ids)
    return DatasetDict(splits)


def write_tiny_repository(folder):
    """Writes the repository, and that of its selection run."""
    for path in (folder / "training" / "selection", folder):
        _write_run(path)
    data = folder / "training" / "interactions"
    data.mkdir()
    for name, split in tiny_splits().items():
        split.to_parquet(str(data / f"{name}.parquet"))
    Recipe.load("paper").save(folder / "recipe.yaml")
    codes = {kind: {"reconstruction_error": 0.1} for kind in ("user", "item")}
    metrics = {"users": len(USERS), "items": len(ITEMS), "users_are_histories": False, "epochs": {}, "codes": codes}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "training" / "run.json").write_text(json.dumps({"refit": True, "recipe": {}, "data": ""}))
    make_readable(folder)


def _write_run(folder):
    torch.manual_seed(0)
    users, items = (np.array(rows) for rows in zip(*PAIRS))
    matrix = InteractionMatrix(users, items, len(USERS), len(ITEMS))
    collaborative = LightGCNModel.from_interactions(LightGCNConfig(embedding_dim=DIM, num_layers=1), matrix).eval()
    store = EmbeddingStore(DIM)
    store.upsert("user", USERS, collaborative.user_embeddings())
    store.upsert("item", ITEMS, collaborative.item_embeddings())
    store.set_seen(USERS, [[ITEMS[item] for own, item in PAIRS if own == user] for user in range(len(USERS))])
    mqs = {}
    for kind in ("user", "item"):
        config = MQTokenizerConfig(embedding_dim=DIM, num_codebooks=2, codebook_size=4, codebook_dim=4, hidden_dim=4)
        mqs[kind] = MQTokenizerModel(config).eval()
        prepare_mq_tokenizer(mqs[kind], store.vectors(kind))
        store.space_ids[kind] = mqs[kind].space_id
        mqs[kind].save_pretrained(folder / f"mq_{kind}")
    tokenizer = build_tokenizer(user_mq=mqs["user"], item_mq=mqs["item"], store=store, model_max_length=60)
    config = T5GenerativeRetrievalConfig(
        vocab_size=len(tokenizer),
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        embedding_dim=DIM,
        decoder_start_token_id=0,
        space_ids=dict(store.space_ids),
    )
    T5ForGenerativeRetrieval(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    store.save_pretrained(folder / "store")
    save_collaborative(collaborative, {"user": USERS, "item": ITEMS}, folder / "collaborative")
