r"""Train the T5 of a trained repository with the stock `Trainer`, in a script of your own.

    python examples/train_with_trainer.py --repository out --dataset interactions.csv --output_dir tuned \
        --num_train_epochs 10 --eval_strategy epoch --save_strategy epoch --load_best_model_at_end --patience 3

Vectors, codes and vocabulary are those of the repository; users and items must be among its own. The output folder becomes a
repository too. Any argument of transformers' `TrainingArguments` may be given, e.g. `--bf16`, `--gradient_accumulation_steps
2`, `--activation_checkpointing`, `--report_to tensorboard`, `--push_to_hub --hub_strategy every_save`, `--resume_from_checkpoint
tuned/checkpoint-40`; and with `torchrun --nproc_per_node 2` in place of `python`, two processes share the work.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, HfArgumentParser, Trainer, TrainingArguments

from tokenrec_hf import (
    DataCollatorForGenerativeRetrieval,
    EmbeddingStore,
    InteractionMatrix,
    PromptDataset,
    Repository,
    SetEpoch,
    T5ForGenerativeRetrieval,
    TokenRecTokenizer,
    evaluate_embeddings,
    leave_one_out,
    load_interactions,
)

# The training data, the measurements of the former T5 and the card that shows them, and what marks a change in progress.
LEFT_BEHIND = ("training", "metrics.json", "README.md", ".*")


@dataclass
class ScriptArguments:
    """What is trained, on what, with which prompts."""

    repository: str = field(metadata={"help": "a trained repository: a folder or a Hub id"})
    dataset: str = field(metadata={"help": "a file, a folder or a known name, as for `tokenrec train`"})
    patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better NDCG@20"}
    )
    train_history: int = field(default=30, metadata={"help": "items of the longest history of a training prompt"})
    num_negatives: int = field(
        default=0, metadata={"help": "un-interacted items per prompt for the softmax loss; 0 lets all items compete"}
    )


def make_collator(script: ScriptArguments, model, tokenizer, store, interactions, seed: int):
    """The collator that makes what the model's loss needs."""
    return DataCollatorForGenerativeRetrieval(
        tokenizer,
        interactions,
        store.ids("user"),
        store.ids("item"),
        train_history=script.train_history,
        num_negatives=script.num_negatives if model.config.loss_type == "softmax" else 1,
        next_items=model.config.pooling == "history",
        seed=seed,
    )


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Trains, evaluates on the validation items and writes the repository."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        remove_unused_columns=False,  # the collator needs all columns
        metric_for_best_model="ndcg@20",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # the item vectors are the same in every process
        hub_private_repo=True,  # the tokenizer knows the users' ids
    )
    script, arguments = parser.parse_args_into_dataclasses(argv)

    source, output = Repository.from_pretrained(script.repository).folder, Path(arguments.output_dir)
    if output.resolve() == source.resolve():
        parser.error(f"--output_dir is the repository {source} itself; give another folder.")
    model = T5ForGenerativeRetrieval.from_pretrained(source)
    tokenizer = TokenRecTokenizer.from_pretrained(source)
    store = EmbeddingStore.from_pretrained(source)
    tokens = tokenizer.item_tokens(store.ids("item"))
    model.bind_items(store.vectors("item"), tokens)

    splits = leave_one_out(load_interactions(script.dataset))
    users, items = (
        {name: store.rows(kind, split[f"{kind}_id"][:]) for name, split in splits.items()} for kind in ("user", "item")
    )
    interactions = InteractionMatrix(users["train"], items["train"], store.count("user"), store.count("item"))
    held_out, targets = users["validation"], items["validation"]

    def compute_metrics(prediction):
        queries = torch.from_numpy(prediction.predictions).float()
        seen = interactions.of_users(held_out)
        return evaluate_embeddings(queries, model.bound_vectors(), targets, *seen, cosine=True)

    train_dataset = PromptDataset.for_training(interactions)
    callbacks = [SetEpoch(train_dataset)]  # new prompts, histories, targets and negatives in every epoch
    if script.patience is not None:
        callbacks.append(EarlyStoppingCallback(script.patience))
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=make_collator(script, model, tokenizer, store, interactions, arguments.seed),
        train_dataset=train_dataset,
        eval_dataset=PromptDataset(held_out, targets),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        # Before training, so that what is pushed with each checkpoint is a whole repository.
        shutil.copytree(source, output, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        # With history pooling, a part of the items' vectors is learned.
        store.upsert("item", store.ids("item"), model.item_vectors(store.vectors("item"), tokens))
        store.save_pretrained(output / "store")
    metrics = trainer.evaluate()
    trainer.log_metrics("validation", {name: metrics[f"eval_{name}"] for name in ("hr@10", "hr@20", "ndcg@20")})
    if arguments.push_to_hub:
        trainer.push_to_hub(tags=["tokenrec"])
    return trainer


if __name__ == "__main__":
    main()
