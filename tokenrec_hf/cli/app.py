"""The `tokenrec` command: its commands, their options, and the exit status.

Each command is a function from its options to one JSON document, made with [`Repository`], [`Recommender`] and [`Recipe`].
[`_command`] shows the document as text or, with `--json`, as it is. Results go to stdout; progress, notes and errors go to
stderr. Heavy modules are imported inside the functions, so help and usage errors are immediate.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from .. import __version__
from ..evaluation.variants import VARIANTS
from . import output
from .arguments import (
    ITEM_METADATA,
    READING,
    URI,
    AsJson,
    At,
    Folder,
    Host,
    KCore,
    Name,
    Revision,
    SplitBy,
    TopK,
    UsageError,
    Where,
    name_options,
    read_limits,
    read_lines,
    read_settings,
    read_where,
    repeat_options,
)
from .inputs import (
    check_dataset,
    check_files,
    dataset_name,
    external_store,
    none_described,
    open_local,
    open_recommender,
    open_repository,
    quiet,
    read_data,
    read_metadata,
    read_splits,
)
from .naming import code_tokens, item_titles, known_titles, ranked, recommended, suggestions, typed_filters
from .output import Blocks, Document, note, working

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    # `--top-k` and `--top_k` are the same option.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after `tokenrec`; by default those of the process.

    Returns:
        Exit status: 0, 1 for a failure or an audit that did not pass, 2 for a usage error, 130 after an interruption. With the
        environment variable `TOKENREC_DEBUG`, errors keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: Any = typer.main.get_command(app)
    command = commands.commands.get(arguments[0]) if arguments else None
    name = "tokenrec"
    if command is not None:
        name, arguments = f"tokenrec {command.name}", repeat_options(arguments, command)
    try:
        status = commands.main(arguments, prog_name="tokenrec", standalone_mode=False)
    except typer.TyperException as error:
        note(f"{name}: error: {error.format_message().rstrip('.')} (see `{name} --help`).", style="red")
        return error.exit_code
    except (ValueError, KeyError, OSError, ImportError) as error:
        if os.environ.get("TOKENREC_DEBUG"):
            raise
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        note(f"tokenrec: error: {message if command is None else name_options(message, command)}", style="red")
        return 1
    if status == 130:
        resumes = command is not None and command.name in ("quickstart", "train")
        note("tokenrec: interrupted" + ("; the same command resumes the training." if resumes else "."))
    return status


def _command(*examples: str, show: Callable[[Document], Blocks], **settings: Any) -> Callable:
    """Registers a function as a command, with `--json`, and with `show` to make text of the document that it returns.

    In place of a parameter `reading`, the command has the options `READING`; those given come as a dictionary.
    """

    def register(function: Callable[..., Document]) -> Callable[..., Document]:
        signature = inspect.signature(function, eval_str=True)
        reads = "reading" in signature.parameters

        def run(as_json: bool, **arguments: Any) -> int:
            if reads:
                given = {name: arguments.pop(name) for name in READING}
                arguments["reading"] = {name: value for name, value in given.items() if value is not None}
            # Only the document may be written to stdout, also where a library prints.
            with contextlib.redirect_stdout(sys.stderr):
                document = function(**arguments)
            text = json.dumps(document, indent=2, ensure_ascii=False) if as_json else output.text(show(document))
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            return 1 if document.get("passed") is False else 0

        option = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        parameters = [one for one in signature.parameters.values() if one.name != "reading"]
        parameters += [option(name, default=None, annotation=kind) for name, kind in READING.items() if reads]
        parameters.append(option("as_json", default=False, annotation=AsJson))
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        # The lines of a paragraph are joined, because they are wrapped again to the width of the terminal.
        paragraphs = [part.replace("\n", " ") for part in (inspect.getdoc(function) or "").split("\n\n")]
        epilog = "\n".join(["examples:" if len(examples) > 1 else "example:", *examples])
        app.command(function.__name__, help="\n\n".join(paragraphs), epilog=epilog, **settings)(run)
        return function

    return register


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tokenrec {__version__}")
        raise typer.Exit


@app.callback(epilog="example:\ntokenrec quickstart")
def _tokenrec(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Recommendation with users and items as tokens of T5 (TokenRec)."""


def _variant(name: str) -> Any:
    """The flag of `tokenrec evaluate` for a variant of the prompts."""
    return Option(VARIANTS[name].flag, help=f"Evaluate with {VARIANTS[name].help}.")


# The commands ---------------------------------------------------------------------------------------------------------


@_command("tokenrec quickstart", show=output.show_quickstart)
def quickstart(
    output_dir: Annotated[str, Option(help="Folder to write.")] = "tokenrec-quickstart",
) -> Document:
    """Train, evaluate and recommend on a small data set, offline, in a few minutes on two cores."""
    from ..data.interactions import load_interactions
    from ..data.splits import leave_one_out
    from ..repository import build
    from ..training.recipe import Recipe

    quiet()
    splits = leave_one_out(load_interactions("demo"))
    finished = False
    with contextlib.suppress(FileNotFoundError):
        finished = open_local(output_dir).info()["finished"]
    if not finished:
        note(
            "training on the demo data set: a collaborative model (FISM), two MQ-Tokenizers and a T5, first to select the "
            "number of epochs, then again with the validation items; this takes a few minutes."
        )
    log = (lambda line: None) if finished else note
    repository = build.train(splits, Recipe.load("quickstart"), output_dir, dataset_name="demo", log=log)
    recommender, titles = repository.recommender(), known_titles("demo")
    users = splits["test"]["user_id"][:3]
    found = recommender.recommend(users, top_k=5)
    return {
        "repository": output_dir,
        "metrics": repository.metrics,
        "held_out": dict(zip(users, splits["test"]["item_id"][:3])),
        "users": [
            recommended(recommender, titles, user, seen, rows)
            for user, seen, rows in zip(users, recommender.store.seen(users), found)
        ],
    }


@_command(
    "tokenrec train --dataset ml-100k --output-dir out",
    "tokenrec train --dataset ratings.csv --min-rating 4 --k-core 5 --output-dir out --learning_rate 1e-3",
    "tokenrec train --dataset events.csv --event cart purchase --split temporal --at 2024-05-01 --output-dir out --dry-run",
    "tokenrec train --dataset ratings.csv --output-dir out --mq_tokenizer.config.codebook_size 512",
    show=output.show_train,
    context_settings={"ignore_unknown_options": True},
)
def train(
    dataset: Annotated[
        str,
        Option(
            help="demo, ml-100k, ml-1m, lastfm, beauty, clothing, toys, a folder with train.txt, a CSV, TSV, JSON-lines, .inter or "
            "Parquet file, or hf://datasets/organisation/name."
        ),
    ],
    output_dir: Annotated[str, Option(help="Folder of the trained repository.")],
    recipe: Annotated[str, Option(help="Recipe: paper, best or quickstart.")] = "best",
    config: Annotated[str | None, Option(help="YAML file with the settings that differ from the recipe's.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the recipe.")] = None,
    no_refit: Annotated[bool, Option("--no-refit", help="Do not train again with the validation items.")] = False,
    k_core: KCore = None,
    split: SplitBy = "leave_one_out",
    at: At = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only show what would be trained on.")] = False,
    item_metadata: Annotated[str | None, Option(metavar="FILE", help=ITEM_METADATA)] = None,
    item_vectors: Annotated[
        str | None,
        Option(metavar="FILE", help="Parquet file with own vectors of items, instead of learning them."),
    ] = None,
    settings: Annotated[list[str] | None, Argument(metavar="--SETTING VALUE", help="Any other setting.")] = None,
    *,
    reading: dict[str, Any],
) -> Document:
    """Train a recommender, or resume the same command where it was stopped.

    Any field of transformers' TrainingArguments sets the T5 stage, as --num_train_epochs 3. Any setting of the recipe is named
    with dots, as --mq_tokenizer.config.codebook_size 512. Columns are found by their usual names.
    """
    from ..training.recipe import Recipe, SettingError

    check_dataset(dataset)
    name = dataset_name(dataset)
    check_files(item_metadata=item_metadata, item_vectors=item_vectors)
    given = {} if seed is None else {"seed": seed}
    given |= read_settings(settings or ())
    try:
        loaded = Recipe.load(recipe, config, given)
    except SettingError as error:
        # Other settings are in the file of --config.
        if any(one.startswith(error.setting) or error.setting.startswith(one) for one in ("recipe", *given)):
            raise UsageError(str(error)) from None
        raise
    from ..repository.update import read_vectors

    metadata = read_metadata(item_metadata)
    vectors = None if item_vectors is None else read_vectors(item_vectors, "item")
    splits, report = read_splits(dataset, {**reading, "k_core": k_core}, split, at)
    from ..repository import build
    from ..repository.forecast import forecast

    stages = forecast(splits, loaded, vectors)
    if dry_run:
        return {"dataset": name, **report, "stages": [{**asdict(stage), "summary": str(stage)} for stage in stages]}
    for line in (report["summary"], *stages):
        note(str(line))
    if metadata and not metadata.keys() & set(splits["train"].unique("item_id")):
        note(none_described(item_metadata, metadata))
    trained = build.train(
        splits,
        loaded,
        output_dir,
        dataset_name=name,
        reading=reading,
        split_at=at,
        item_vectors=vectors,
        refit=not no_refit,
        log=note,
    )
    if metadata:
        note(f"{trained.add(metadata=metadata)['described']} items are described by {item_metadata}.")
    return {"repository": output_dir, **trained.metrics}


@_command("tokenrec evaluate out --split test --unseen-prompt", show=output.show_evaluation)
def evaluate(
    repository: Name,
    revision: Revision = None,
    store: URI = None,
    split: Annotated[Literal["test", "validation"], Option(help="Held-out items to rank.")] = "test",
    unseen_prompt: Annotated[bool, _variant("tokenrec_unseen_prompt")] = False,
    history_only: Annotated[bool, _variant("tokenrec_history_only")] = False,
    user_id_only: Annotated[bool, _variant("tokenrec_user_id_only")] = False,
    audit: Annotated[bool, Option("--audit", help="Only check that no part has seen the held-out items.")] = False,
) -> Document:
    """Rank all items for every user and measure the rank of the held-out item."""
    variants = {"unseen_prompt": unseen_prompt, "history_only": history_only, "user_id_only": user_id_only}
    given = [f"tokenrec_{name}" for name, is_given in variants.items() if is_given]
    flags = [*(str(VARIANTS[name].flag) for name in given), *["--audit"] * audit]
    if len(flags) > 1:
        raise UsageError(f"{flags[0]} is not allowed with {flags[1]}.")
    if audit and store:
        raise UsageError("--audit checks the repository's own store; leave out --store.")
    opened = open_repository(repository, revision)
    quiet()
    if audit:
        with working("auditing"):
            checks = opened.audit()
        passed = all(check.passed is not False for check in checks)
        return {"repository": repository, "passed": passed, "checks": [asdict(check) for check in checks]}
    if store and split == "validation" and opened.info()["refit"]:
        raise UsageError("--store holds the vectors of the refit; evaluate it on --split test.")
    return {
        "repository": repository,
        **opened.evaluate(split, given[0] if given else "tokenrec", external_store(store)),
    }


@_command("tokenrec compare out", "tokenrec compare --dataset ratings.csv --min-rating 4", show=output.show_comparison)
def compare(
    repository: Annotated[
        str | None, Argument(metavar="REPOSITORY", help="Folder that `tokenrec train` wrote, with its data.")
    ] = None,
    dataset: Annotated[
        str | None, Option(help="Interactions to compare the baselines on, without a repository.")
    ] = None,
    k_core: KCore = None,
    split: SplitBy = "leave_one_out",
    at: At = None,
    seed: Annotated[int, Option(help="Seed of the bootstrap.")] = 0,
    *,
    reading: dict[str, Any],
) -> Document:
    """Compare popularity, ItemKNN, EASE, iALS, LightGCN and SASRec, and a trained repository on its own test items.

    The baselines are tuned on validation; LightGCN and SASRec take minutes. Differences have 95 % intervals by a paired bootstrap
    over users.
    """
    if (repository is None) == (dataset is None):
        raise UsageError("give either a repository, whose data are compared on, or --dataset for the baselines alone.")
    if dataset is None and (reading or k_core or at or split != "leave_one_out"):
        raise UsageError("the data of a repository have been read and split; these options go with --dataset.")
    opened = None
    if repository is not None:
        opened = open_local(repository)
        quiet()
        splits = opened.splits()
    else:
        check_dataset(str(dataset))
        splits, report = read_splits(str(dataset), {**reading, "k_core": k_core}, split, at)
        note(report["summary"])
    from ..repository.comparison import compare

    return {"repository": repository, **compare(splits, opened, seed, log=note)}


@_command(
    "tokenrec recommend out --user 03 --history 08 24 --top-k 10",
    "tokenrec recommend out --all-users --output recommendations.parquet",
    "tokenrec recommend org/name --history 08 24 --where genre=jazz genre=folk 'price<30'",
    "tokenrec recommend out --user 03 --diversity 0.3 --max-per genre=3",
    show=output.show_recommendations,
)
def recommend(
    repository: Name,
    user: Annotated[str | None, Option(metavar="ID", help="User id; without it, the history alone.")] = None,
    history: Annotated[
        list[str] | None,
        Option(metavar="ID ...", help="Items to show the model, oldest first; by default those in the store."),
    ] = None,
    top_k: TopK = 10,
    include_seen: Annotated[bool, Option("--include-seen", help="Also items that the user has seen.")] = False,
    where: Where = None,
    store: URI = None,
    revision: Revision = None,
    all_users: Annotated[bool, Option("--all-users", help="All users of the repository; needs --output.")] = False,
    users_file: Annotated[
        str | None, Option("--users-file", metavar="FILE", help="Users, an id a line (- for stdin); needs --output.")
    ] = None,
    to: Annotated[
        str | None, Option("--output", metavar="FILE", help="A .parquet, .csv or .jsonl file for several users.")
    ] = None,
    on_unknown: Annotated[
        Literal["error", "skip", "popular"],
        Option("--on-unknown", help="Refuse unknown users and items, leave them out, or answer with popular items."),
    ] = "error",
    diversity: Annotated[
        float, Option(min=0, max=1, help="Weight against items that are similar to those listed before them.")
    ] = 0.0,
    max_per: Annotated[
        list[str] | None, Option("--max-per", metavar="NAME=K ...", help="At most K items of equal metadata.")
    ] = None,
) -> Document:
    """Recommend items to a user, to an unknown user by a history, or to many users into a file.

    With --user and an empty --history, the model is asked with the user id alone. With --on-unknown skip or popular, unknown items
    are left out of the history, and an unknown user is answered by the history. Without one, nobody or the most popular items
    answer.
    """
    # `--history` without items is one empty value.
    shown = None if history is None else [item for item in history if item]
    several = all_users or users_file is not None
    if several and (user is not None or shown is not None or (all_users and users_file is not None)):
        raise UsageError("give one of --user, --history, --all-users and --users-file; only a user may have a history.")
    if several != (to is not None):
        raise UsageError("--output goes with --all-users or --users-file, and these need it.")
    if user is None and not shown and not several:
        raise UsageError("there is no user to recommend to; give --user, --history or both.")
    options: dict[str, Any] = {"top_k": top_k, "exclude_seen": not include_seen, "on_unknown": on_unknown}
    options |= {"diversity": diversity, "max_per": read_limits(max_per or ())}
    filters = read_where(where or ())
    users = None if users_file is None else read_lines(users_file)
    recommender, titles = open_recommender(repository, revision, store)
    options["where"] = typed_filters(recommender.store, filters, options["max_per"])
    if to is not None:
        from ..repository.export import export_recommendations

        started = time.monotonic()
        with suggestions(recommender, user=users):
            count, noted = export_recommendations(recommender, to, users, titles=titles, **options)
        return {"output": to, "users": count, "noted": noted, "seconds": round(time.monotonic() - started, 2)}
    from ..repository.reranking import answer_reranked

    with suggestions(recommender, user=[user] if user else None, item=shown):
        inputs = recommender.tokenize([user], [shown], on_unknown=on_unknown)
    found = answer_reranked(recommender, inputs, **options)[0]
    document = recommended(recommender, titles, user, inputs["item_ids"][0], found)
    return {**document, "note": found[0].get("note") if found else inputs["notes"][0] or None}


@_command("tokenrec similar out --item 08 --top-k 10", show=output.show_similar)
def similar(
    repository: Name,
    item: Annotated[list[str], Option(metavar="ID ...", help="Item ids.")],
    top_k: TopK = 10,
    where: Where = None,
    store: URI = None,
    revision: Revision = None,
) -> Document:
    """List the items whose vectors are most similar to the vectors of given items."""
    filters = read_where(where or ())
    recommender, titles = open_recommender(repository, revision, store)
    typed = typed_filters(recommender.store, filters)
    with suggestions(recommender, item=item):
        found = recommender.similar_items(item, top_k=top_k, where=typed)
    return {
        "repository": repository,
        "items": [
            {"item": one, "tokens": tokens, "title": title, "similar": ranked(recommender, titles, rows)}
            for one, tokens, title, rows in zip(
                item, code_tokens(recommender, "item", item), item_titles(recommender, titles, item), found
            )
        ],
    }


@_command(
    "tokenrec add out --interactions today.csv --retrain",
    "tokenrec add out --items vectors.parquet",
    show=output.show_addition,
)
def add(
    repository: Folder,
    users: Annotated[str | None, Option(metavar="FILE", help="Parquet file with vectors of users.")] = None,
    items: Annotated[str | None, Option(metavar="FILE", help="Parquet file with vectors of items.")] = None,
    interactions: Annotated[str | None, Option(help="New interactions, as `train --dataset` reads them.")] = None,
    retrain: Annotated[bool, Option("--retrain", help="Train the collaborative model further.")] = False,
    item_metadata: Annotated[str | None, Option(metavar="FILE", help=ITEM_METADATA)] = None,
    *,
    reading: dict[str, Any],
) -> Document:
    """Add users and items to a trained repository without training T5 again.

    Parquet files have a column of ids (id) and a column of vectors (vector); further columns of items are the metadata that
    `recommend --where` filters by. Interactions are read with the options of the training, unless others are given. Users and
    items that only they name are folded in. With --retrain, the vectors of the further trained collaborative model are aligned
    with the old space. If the command fails, the repository is unchanged.
    """
    if not (users or items or interactions or item_metadata or retrain):
        raise UsageError(
            "there is nothing to add; give --users, --items, --interactions, --item-metadata or --retrain."
        )
    opened = open_local(repository)
    check_files(users=users, items=items, item_metadata=item_metadata)
    if interactions:
        check_dataset(interactions)
    metadata = read_metadata(item_metadata)
    from ..repository.update import read_vectors

    quiet()
    started = time.monotonic()
    with working("adding"):
        new = None
        if interactions:
            if remembered := {name: value for name, value in opened.reading.items() if name not in reading}:
                note("as in training: " + ", ".join(f"{name}={value}" for name, value in remembered.items()))
            new, how = read_data(interactions, {**remembered, **reading})
            note(str(how))
        report = opened.add(
            users=read_vectors(users, "user") if users else None,
            items=read_vectors(items, "item") if items else None,
            interactions=new,
            metadata=metadata,
            retrain=retrain,
        )
    if metadata and not report["described"]:
        note(none_described(item_metadata, metadata))
    return {"repository": repository, **report, "seconds": round(time.monotonic() - started, 2)}


@_command("tokenrec remove out --items 08 24", show=output.show_removal)
def remove(
    repository: Folder,
    users: Annotated[list[str] | None, Option(metavar="ID ...", help="Users to delete.")] = None,
    items: Annotated[list[str] | None, Option(metavar="ID ...", help="Items to withdraw.")] = None,
) -> Document:
    """Delete users with all their data, or withdraw items.

    Deleted users leave no trace in the files, those of the training included. Withdrawn items are never recommended again;
    histories may still name them.
    """
    # An option without ids is one empty value.
    users, items = ([one for one in ids or () if one] for ids in (users, items))
    if not (users or items):
        raise UsageError("there is nothing to remove; give --users or --items.")
    opened = open_local(repository)
    quiet()
    with working("removing"):
        return {"repository": repository, **opened.remove(users=users, items=items)}


@_command("tokenrec verify out", "tokenrec verify out --repair", show=output.show_verification)
def verify(
    repository: Name,
    revision: Revision = None,
    repair: Annotated[bool, Option("--repair", help="First complete or drop interrupted work.")] = False,
) -> Document:
    """Check that the files of a trained repository are undamaged and belong together.

    With --repair, an interrupted change is completed or dropped, what killed processes have left is removed, and wrong codes
    are made again from the vectors.
    """
    opened = open_local(repository) if repair else open_repository(repository, revision)
    quiet()
    with working("verifying"):
        if repair:
            opened.repair()
        checks = opened.verify()
    passed = all(check.passed is not False for check in checks)
    return {"repository": repository, "passed": passed, "checks": [asdict(check) for check in checks]}


@_command(
    "tokenrec push out my-name/my-recommender --private",
    "tokenrec push out my-name/my-recommender --space",
    show=output.show_push,
)
def push(
    repository: Folder,
    repo_id: Annotated[str, Argument(metavar="NAME", help="Hub repository, as organisation/name; created if absent.")],
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, Option(show_default="main", help="Branch; created if absent.")] = None,
    include_users: Annotated[bool, Option("--include-users", help="Also push the data of users.")] = False,
    space: Annotated[
        bool, Option("--space", help="Also make a Space, which shows the page of `tokenrec demo`.")
    ] = False,
) -> Document:
    """Share a trained repository on the Hugging Face Hub, in one commit.

    Data of users (ids, vectors, seen items, codes, the collaborative model) are personal. They stay on this machine unless
    --include-users is given.
    """
    from ..repository.repository import Repository

    commit = Repository(repository).push_to_hub(
        repo_id, private=private or None, revision=revision, include_users=include_users
    )
    from ..repository.hub import push_space, strays

    return {
        "repository": repo_id,
        "commit": commit,
        "space": push_space(repo_id, private=private or None, revision=revision) if space else None,
        "users": include_users,
        "left_out": strays(Path(repository)),
    }


@_command("tokenrec report out --output report.html", show=output.show_report)
def report(
    repository: Name,
    to: Annotated[str, Option("--output", metavar="FILE", help="HTML file to write.")] = "report.html",
    revision: Revision = None,
) -> Document:
    """Write a page with training curves, code usage, and accuracy by history, item and score.

    The page is one file that loads nothing from the network. It has the baselines of the last `tokenrec compare`, and no data of
    single users.
    """
    opened = open_repository(repository, revision)
    from ..models.codes import atomic_write
    from .report import report

    Path(to).parent.mkdir(parents=True, exist_ok=True)
    quiet()
    with working("measuring"):
        page = report(opened, Path(repository).resolve().name)
    with atomic_write(to) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return {"repository": repository, "output": to}


@_command("tokenrec export out --output encoder.onnx", show=output.show_export)
def export(
    repository: Name,
    to: Annotated[str, Option("--output", metavar="FILE", help="ONNX file to write.")] = "encoder.onnx",
    revision: Revision = None,
) -> Document:
    """Write T5's part of a request as an ONNX graph, for `tokenrec serve --onnx` and other programs.

    The graph is for the weights of T5, so it stays valid when users, items and interactions are added.
    """
    from ..repository.onnx import export_onnx

    Path(to).parent.mkdir(parents=True, exist_ok=True)
    recommender, _ = open_recommender(repository, revision, None)
    with working("tracing T5"):
        export_onnx(recommender.model, to)
    return {"repository": repository, "output": to, "bytes": Path(to).stat().st_size}


@_command("tokenrec info out", show=output.show_info)
def info(repository: Name, revision: Revision = None) -> Document:
    """Show the contents, settings and results of a trained repository."""
    return {"repository": repository, **open_repository(repository, revision).info()}


@app.command(epilog="example:\ntokenrec demo out")
def demo(
    repository: Name,
    host: Host = "127.0.0.1",
    port: Annotated[
        int | None, Option(min=1, max=65535, show_default="the first free one from 7860", help="Port.")
    ] = None,
    store: URI = None,
    revision: Revision = None,
) -> None:
    """Show a page with recommendations, their reasons, tokens and a map of the items.

    The page loads nothing from the network. It shows the data of all users to everyone who can reach it.
    """
    opened = open_repository(repository, revision)
    with working("opening the page"):
        from . import demo as pages
        from .showcase import Showcase

        quiet()
        showcase = Showcase(opened.recommender(external_store(store)), known_titles(opened.info()["dataset"]))
        metrics = opened.metrics if opened.parts.metrics.is_file() else {}
        page = pages.build(showcase, metrics, Path(repository).name)
    with pages.serve(page, host, port) as address, contextlib.suppress(KeyboardInterrupt):
        note(f"showing {repository} on {address}; Ctrl-C stops it.")
        threading.Event().wait()


@app.command(epilog="example:\ntokenrec serve out --port 8000")
def serve(
    repository: Name,
    host: Host = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    store: URI = None,
    onnx: Annotated[
        str | None, Option(metavar="FILE", help="Graph of `tokenrec export`; requests take less time.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Answer requests for recommendations and similar items over HTTP.

    POST /recommend and /similar, GET /health and /openapi.json. The repository is opened again when it has changed. Requests are
    not authenticated: other machines should reach the service through a proxy only.
    """
    opened = open_repository(repository, revision)
    from . import serve as service

    listener = service.listen(host, port)
    quiet()
    with working("opening the repository"):
        answers = service.Service(opened, known_titles(opened.info()["dataset"]), external_store(store), onnx)
    note(f"serving {repository} on {service.address(listener)}; Ctrl-C stops it.")
    service.run(answers, listener)


if __name__ == "__main__":
    sys.exit(main())
