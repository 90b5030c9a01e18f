r"""Fine-tune a trained repository on interactions that came later: an adapter of a few per cent of its size, or all weights.

    pip install peft
    python examples/lora.py --repository out/training/selection --dataset interactions.csv --output_dir adapter \
        --num_train_epochs 8 --learning_rate 1e-3 --per_device_train_batch_size 64

Trains on the training and validation items and reports the test items, before and after. `--full` tunes all weights with the
same settings, to compare with. Any argument of transformers' `TrainingArguments` may be given; `--push_to_hub` pushes the adapter
alone. To use it: `PeftModel.from_pretrained(T5ForGenerativeRetrieval.from_pretrained(repository), "adapter")`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments

from tokenrec_hf import (
    DataCollatorForGenerativeRetrieval,
    EmbeddingStore,
    InteractionMatrix,
    PromptDataset,
    SetEpoch,
    T5ForGenerativeRetrieval,
    TokenRecTokenizer,
    evaluate_embeddings,
    leave_one_out,
    load_interactions,
)


@dataclass
class ScriptArguments:
    """What is tuned, on what, and how much of it."""

    repository: str = field(metadata={"help": "a trained repository: a folder or a Hub id"})
    dataset: str = field(metadata={"help": "a file, a folder or a known name, as for `tokenrec train`"})
    rank: int = field(default=8, metadata={"help": "of every low-rank update"})
    whole_rows: bool = field(
        default=False,
        metadata={"help": "train projection and code tokens whole: for a large T5 to which they are new"},
    )
    full: bool = field(default=False, metadata={"help": "tune all weights, without an adapter"})


def lora_config(tokenizer: TokenRecTokenizer, rank: int, whole_rows: bool, has_projection: bool = True) -> LoraConfig:
    """Low-rank updates of the attention and, whole or in low rank too, of the projection and the code tokens."""
    shared = {"r": rank, "lora_alpha": 2 * rank}  # no task_type: it would add arguments that the model does not have
    # The encoder's own name of the embedding: of what is done to `shared`, T5's stacks would not notice anything.
    if whole_rows:
        codes = np.concatenate([tokenizer.code_token_ids(kind).ravel() for kind in ("user", "item")]).tolist()
        return LoraConfig(
            target_modules=["q", "v"],
            modules_to_save=["projection"] if has_projection else None,
            trainable_token_indices={"encoder.embed_tokens": codes},
            **shared,
        )
    layers = [f"projection.{number}" for number in (0, 3, 6)] if has_projection else []
    return LoraConfig(target_modules=["q", "v", *layers, "encoder.embed_tokens"], **shared)


def report_adapter(repository: str, folder: str, tuned: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Prints the size of a saved adapter and how much its queries differ once it is loaded and merged."""
    base = T5ForGenerativeRetrieval.from_pretrained(repository)
    whole = sum(weight.numel() * weight.element_size() for weight in base.parameters())
    adapter = (Path(folder) / "adapter_model.safetensors").stat().st_size
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload().eval().to(tuned.device)
    with torch.no_grad():
        difference = (merged(**inputs).query_embeds - tuned.eval()(**inputs).query_embeds).abs().max()
    print(
        f"adapter: {adapter:,} bytes, {adapter / whole:.1%} of all weights; merged, queries differ by {difference:.1e}"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Tunes, saves, loads and merges again; returns the metrics on the test items before and after."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(remove_unused_columns=False, label_names=["labels"], save_strategy="no", hub_private_repo=True)
    script, arguments = parser.parse_args_into_dataclasses(argv)

    model = T5ForGenerativeRetrieval.from_pretrained(script.repository)
    tokenizer = TokenRecTokenizer.from_pretrained(script.repository)
    store = EmbeddingStore.from_pretrained(script.repository)
    model.bind_items(store.vectors("item"), tokenizer.item_tokens(store.ids("item")))

    splits = leave_one_out(load_interactions(script.dataset))
    users, items = (
        {name: store.rows(kind, split[f"{kind}_id"][:]) for name, split in splits.items()} for kind in ("user", "item")
    )
    trained = [np.concatenate([rows["train"], rows["validation"]]) for rows in (users, items)]
    interactions = InteractionMatrix(*trained, store.count("user"), store.count("item"))
    collator = DataCollatorForGenerativeRetrieval(
        tokenizer,
        interactions,
        store.ids("user"),
        store.ids("item"),
        train_history=30,
        num_negatives=int(model.config.loss_type == "cosine_ranking"),
        next_items=model.config.pooling == "history",
        seed=arguments.seed,
    )

    def compute_metrics(prediction):
        queries = torch.from_numpy(prediction.predictions).float()
        seen = interactions.of_users(users["test"])
        return evaluate_embeddings(queries, model.bound_vectors(), items["test"], *seen, cosine=True)

    if not script.full:
        has_projection = model.config.pooling != "history"
        model = get_peft_model(model, lora_config(tokenizer, script.rank, script.whole_rows, has_projection))
    train_dataset = PromptDataset.for_training(interactions)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=PromptDataset(users["test"], items["test"]),
        compute_metrics=compute_metrics,
        callbacks=[SetEpoch(train_dataset)],
    )
    results = {"before": trainer.evaluate()}
    trainer.train()
    results["after"] = trainer.evaluate()
    trainer.save_model()
    for when, metrics in results.items():
        print(f"{when:6}  HR@20 {metrics['eval_hr@20']:.4f}  NDCG@20 {metrics['eval_ndcg@20']:.4f}")
    if not script.full:
        batch = next(iter(trainer.get_eval_dataloader()))
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        report_adapter(script.repository, arguments.output_dir, model, inputs)
    if arguments.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    main()
