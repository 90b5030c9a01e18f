"""The `tokenrec` command: quickstart, train, evaluate, recommend, add, remove, push and info.

A thin shell: each command reads its arguments, calls the package and returns one document, which is shown as text or, with
`--json`, as it is. Results go to stdout, progress and notes to stderr. Everything heavy is imported inside the commands, so
that help costs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..models.codes import fetch_repository, read_json
from ..repository.repository import Repository
from ..training.recipe import RECIPES, Recipe
from .output import (
    show_addition,
    show_evaluation,
    show_info,
    show_push,
    show_quickstart,
    show_recommendations,
    show_removal,
    show_train,
)
from .settings import UsageError, read_recipe, read_where

if TYPE_CHECKING:
    from ..models.recommender import Recommender

# Titles are known for these data sets.
TITLED = ("demo", "ml-100k")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after `tokenrec`; by default those of the process.

    Returns:
        The exit status: 0, 1 where the command failed or an audit did not pass, 130 where it was interrupted. A wrong usage ends
        in argparse's `SystemExit(2)`. With the environment variable `TOKENREC_DEBUG`, errors keep their traceback.
    """
    parser, commands = _parsers()
    arguments, settings = parser.parse_known_args(_respelled(sys.argv[1:] if argv is None else argv, commands))
    command = commands[arguments.command]
    trains = arguments.command in ("quickstart", "train")
    if settings and arguments.command != "train":
        command.error(f"unrecognized arguments: {' '.join(settings)}")
    arguments.settings = settings
    try:
        # What a library prints must not get into the one JSON document.
        with contextlib.redirect_stdout(sys.stderr):
            document = arguments.run(arguments)
        if arguments.json:
            _write(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            _write(arguments.show(document))
        sys.stdout.flush()
        if document.get("passed") is False:
            return 1
    except KeyboardInterrupt:
        _note("tokenrec: interrupted" + ("; the same command goes on where this one stopped." if trains else "."))
        return 130
    except BrokenPipeError:
        # The reader, say `head`, has enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, ValueError, KeyError, OSError, ImportError) as error:
        if os.environ.get("TOKENREC_DEBUG"):
            raise
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        if isinstance(error, UsageError):
            command.error(message)
        _note(f"tokenrec: error: {message}")
        return 1
    return 0


# The commands ---------------------------------------------------------------------------------------------------------


def _quickstart(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..data.interactions import load_interactions
    from ..data.splits import leave_one_out
    from ..models.recommender import Recommender
    from ..repository.build import train

    _quiet()
    folder = Path(arguments.output_dir)
    splits = leave_one_out(load_interactions("demo"))
    finished = (folder / "metrics.json").is_file()
    if not finished:
        _note(
            "training on the demo data set: a collaborative model (LightGCN), two MQ-Tokenizers and a T5, first to choose the "
            "number of epochs, then once more with the validation items; this takes a few minutes."
        )
    log = (lambda line: None) if finished else _note
    metrics = train(splits, Recipe.load("quickstart"), folder, dataset_name="demo", log=log).metrics
    recommender, titles = Recommender.from_pretrained(folder), _titles("demo")
    users = splits["test"]["user_id"][:3]
    return {
        "repository": str(folder),
        "metrics": metrics,
        "held_out": dict(zip(users, splits["test"]["item_id"][:3])),
        "users": [_recommendations(recommender, user, titles, top_k=5) for user in users],
    }


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = read_recipe(arguments)
    from ..data.data_sources import DATA_SOURCES
    from ..data.interactions import HUB, load_interactions
    from ..data.splits import leave_one_out
    from ..repository.build import train

    _quiet()
    columns = ("user_column", "item_column", "rating_column", "timestamp_column", "min_rating", "k_core")
    interactions = load_interactions(arguments.dataset, **{name: getattr(arguments, name) for name in columns})
    name = arguments.dataset
    if name.startswith(HUB):
        name = name.removeprefix(HUB)
    elif name not in ("demo", *DATA_SOURCES):
        # Where it lies is nobody's business, and a folder `demo/` is not the data set `demo`.
        path = Path(name).expanduser().resolve()
        name = path.name + "/" * path.is_dir()
    splits = leave_one_out(interactions)
    trained = train(splits, recipe, arguments.output_dir, dataset_name=name, refit=not arguments.no_refit, log=_note)
    return {"repository": arguments.output_dir, **trained.metrics}


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.audit:
        return _audit(arguments)
    _quiet()
    repository = Repository.from_pretrained(arguments.repository, revision=arguments.revision)
    found = repository.evaluate(arguments.split, arguments.variant, _store(arguments.store))
    return {"repository": arguments.repository, **found}


def _audit(arguments: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    if arguments.store:
        raise UsageError("--audit looks at the repository's own store; leave --store out.")
    _quiet()
    checks = Repository.from_pretrained(arguments.repository, revision=arguments.revision).audit()
    return {
        "repository": arguments.repository,
        "passed": all(check.passed is not False for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _recommend(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..models.recommender import Recommender

    if arguments.user is None and not arguments.history:
        raise UsageError("there is nobody to recommend to: give --user, --history or both.")
    _quiet()
    folder = fetch_repository(arguments.repository, revision=arguments.revision)
    recommender = Recommender.from_pretrained(folder, store=_store(arguments.store))
    known = folder / "metrics.json"
    return _recommendations(
        recommender,
        arguments.user,
        _titles(read_json(known)["dataset"] if known.is_file() else ""),
        history=arguments.history,
        top_k=arguments.top_k,
        exclude_seen=not arguments.include_seen,
        where=read_where(arguments.where),
    )


def _add(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..data.interactions import load_interactions
    from ..repository.update import read_vectors

    if not (arguments.users or arguments.items or arguments.interactions or arguments.retrain):
        raise UsageError("there is nothing to add: give --users, --items, --interactions or --retrain.")
    _quiet()
    started = time.monotonic()
    report = Repository(_local(arguments.repository)).add(
        users=read_vectors(arguments.users, "user") if arguments.users else None,
        items=read_vectors(arguments.items, "item") if arguments.items else None,
        interactions=load_interactions(arguments.interactions) if arguments.interactions else None,
        retrain=arguments.retrain,
    )
    return {"repository": arguments.repository, **report, "seconds": round(time.monotonic() - started, 2)}


def _remove(arguments: argparse.Namespace) -> dict[str, Any]:
    if not (arguments.users or arguments.items):
        raise UsageError("there is nothing to remove: give --users or --items.")
    _quiet()
    repository = Repository(_local(arguments.repository))
    removed = repository.remove(users=arguments.users or (), items=arguments.items or ())
    return {"repository": arguments.repository, **removed}


def _push(arguments: argparse.Namespace) -> dict[str, Any]:
    commit = Repository(arguments.repository).push_to_hub(
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        include_users=arguments.include_users,
    )
    return {"repository": arguments.repo_id, "commit": commit, "users": arguments.include_users}


def _info(arguments: argparse.Namespace) -> dict[str, Any]:
    repository = Repository.from_pretrained(arguments.repository, revision=arguments.revision)
    return {"repository": arguments.repository, **repository.info()}


# Arguments ------------------------------------------------------------------------------------------------------------


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="tokenrec",
        description="Recommendation with users and items as tokens of T5 (TokenRec).",
        epilog="example: tokenrec quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tokenrec {__version__}")
    group = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands = {}

    def command(name: str, run: Callable, show: Callable, text: str, example: str) -> argparse.ArgumentParser:
        added = group.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=example,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        added.set_defaults(run=run, show=show)
        commands[name] = added
        return added

    quickstart = command(
        "quickstart",
        _quickstart,
        show_quickstart,
        "train, evaluate and recommend on a small data set, offline, in a few minutes on two cores",
        "example: tokenrec quickstart --output_dir tokenrec-quickstart",
    )
    quickstart.add_argument("--output_dir", default="tokenrec-quickstart", help="default: %(default)s")

    train = command(
        "train",
        _train,
        show_train,
        "train a recommender, or go on where the same command was stopped",
        "Any argument of transformers' TrainingArguments goes to the T5 stage (--num_train_epochs 3), any setting of the\n"
        "recipe is named with dots (--mq_tokenizer.config.codebook_size 512), --loss_type and --seed are shortcuts.\n\n"
        "examples:\n"
        "  tokenrec train --dataset ml-100k --output_dir out\n"
        "  tokenrec train --dataset ratings.csv --min_rating 4 --k_core 5 --output_dir out --learning_rate 1e-3\n"
        "  tokenrec train --dataset ratings.csv --output_dir out --retrieval.config.loss_type cosine_ranking",
    )
    train.add_argument(
        "--dataset",
        required=True,
        help="demo, ml-100k, ml-1m, lastfm, beauty, clothing, a folder with train.txt, a CSV, TSV, JSON-lines, .inter or "
        "Parquet file, or hf://datasets/organisation/name",
    )
    train.add_argument("--output_dir", required=True, help="the folder that becomes a trained repository")
    train.add_argument("--recipe", choices=RECIPES, default="cpu", help="default: %(default)s")
    train.add_argument("--config", metavar="FILE", help="a YAML file with the settings that differ from the recipe's")
    train.add_argument("--no-refit", action="store_true", help="do not train again with the validation items")
    train.add_argument("--min_rating", type=float, metavar="X", help="drop interactions rated lower")
    train.add_argument("--k_core", type=int, metavar="N", help="drop users and items with fewer interactions")
    for name in ("user", "item", "rating", "timestamp"):
        train.add_argument(f"--{name}_column", metavar="NAME", help="by default found by its name")

    evaluate = command(
        "evaluate",
        _evaluate,
        show_evaluation,
        "rank all items for every user and measure where the held-out one comes",
        "example: tokenrec evaluate out --split test --unseen-prompt",
    )
    _repository(evaluate)
    _elsewhere(evaluate)
    evaluate.add_argument("--split", choices=("test", "validation"), default="test", help="default: %(default)s")
    prompt = evaluate.add_mutually_exclusive_group()
    prompt.set_defaults(variant="tokenrec")
    for flag, variant, text in (
        ("--unseen-prompt", "tokenrec_unseen_prompt", "ask in words that training never used"),
        ("--history-only", "tokenrec_history_only", "ask with the history, without saying whose it is"),
        ("--user-id-only", "tokenrec_user_id_only", "ask without the history"),
    ):
        prompt.add_argument(flag, dest="variant", action="store_const", const=variant, default="tokenrec", help=text)
    prompt.add_argument(
        "--audit",
        action="store_true",
        help="instead of measuring, check that nothing in the repository has seen the validation and test items",
    )

    recommend = command(
        "recommend",
        _recommend,
        show_recommendations,
        "recommend items to a user, or to anybody with a history",
        "examples:\n"
        "  tokenrec recommend out --user 03 --history 08 24 --top-k 10\n"
        "  tokenrec recommend org/name --history 08 24",
    )
    _repository(recommend)
    _elsewhere(recommend)
    recommend.add_argument("--user", metavar="ID", help="the user's id; without one, the history says it all")
    recommend.add_argument(
        "--history",
        nargs="*",
        metavar="ITEM",
        help="what to show the model, oldest first; by default what the store knows of the user; nothing: the user id alone",
    )
    recommend.add_argument("--top-k", type=int, default=10, metavar="K", help="default: %(default)s")
    recommend.add_argument("--include-seen", action="store_true", help="also items that the user has interacted with")
    recommend.add_argument(
        "--where",
        nargs="+",
        metavar="NAME=VALUE",
        help="only items with this metadata; of a name that is given twice either value will do",
    )

    add = command(
        "add",
        _add,
        show_addition,
        "add users and items to a trained repository without training T5 again",
        "Vectors come as Parquet with a column of ids (id) and one of vectors (vector); further columns of items are metadata\n"
        "that `recommend --where` filters by. Users and items that only --interactions names are folded in. Whatever goes\n"
        "wrong, the repository stays as it was.\n\n"
        "examples:\n"
        "  tokenrec add out --interactions today.csv\n"
        "  tokenrec add out --items vectors.parquet\n"
        "  tokenrec add out --interactions today.csv --retrain",
    )
    add.add_argument("repository", help="the folder that `tokenrec train` wrote")
    add.add_argument("--users", metavar="FILE", help="vectors of users")
    add.add_argument("--items", metavar="FILE", help="vectors of items")
    add.add_argument(
        "--interactions", metavar="FILE", help="interactions since the training: whatever `train --dataset` takes"
    )
    add.add_argument(
        "--retrain",
        action="store_true",
        help="go on training the collaborative model with everything, and turn its vectors into the old space",
    )

    remove = command(
        "remove",
        _remove,
        show_removal,
        "delete users with all that is known of them, or withdraw items from sale",
        "Of a user nothing is left in the files, those of the training included. A withdrawn item is never recommended\n"
        "again; histories may go on to name it.\n\n"
        "example: tokenrec remove out --items 08 24",
    )
    remove.add_argument("repository", help="the folder that `tokenrec train` wrote")
    remove.add_argument("--users", nargs="+", metavar="ID")
    remove.add_argument("--items", nargs="+", metavar="ID")

    push = command(
        "push",
        _push,
        show_push,
        "share a trained repository on the Hugging Face Hub, in one commit",
        "What is known of users (ids, vectors, seen items, codes, the collaborative model) is personal data and stays here\n"
        "unless --include-users is given.\n\n"
        "example: tokenrec push out my-name/my-recommender --private",
    )
    push.add_argument("repository", help="the folder that `tokenrec train` wrote")
    push.add_argument("repo_id", metavar="name", help="of the Hub repository, as organisation/name; made if absent")
    push.add_argument("--private", action="store_true", help="make a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="made if absent; default: main")
    push.add_argument("--include-users", action="store_true", help="also push what is known of users")

    info = command(
        "info",
        _info,
        show_info,
        "tell what a trained repository holds, how it was made and how good it is",
        "example: tokenrec info out",
    )
    _repository(info)
    return parser, commands


def _repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", help="the folder that `tokenrec train` wrote, or the name of a Hub repository")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the Hub repository; default: main")


def _elsewhere(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="URI",
        help="an embedding store in the place of the repository's own: a folder, a Milvus Lite .db, or http(s)://host:19530 "
        "(its token in the environment variable MILVUS_TOKEN)",
    )


def _respelled(argv: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The arguments with `-` and `_` within option names as the options were declared."""
    declared = {name.replace("-", "_"): name for parser in commands.values() for name in parser._option_string_actions}
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and len(name) > 2:
            underscored = "__" + name[2:].replace("-", "_")
            name = declared.get(underscored, "--" + underscored[2:])
        result.append(name + equals + value)
    return result


# What the commands share ----------------------------------------------------------------------------------------------


def _quiet() -> None:
    """Turns off the bars that transformers and datasets draw beside ours, and torch's word on a stable feature."""
    import logging as std_logging
    import warnings

    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    logging.disable_progress_bar()
    # It logs every error that it raises, with a traceback.
    std_logging.getLogger("pymilvus").setLevel(std_logging.CRITICAL)
    datasets.disable_progress_bars()


def _recommendations(
    recommender: Recommender,
    user: str | None,
    titles: Mapping[str, str],
    *,
    history: list[str] | None = None,
    top_k: int = 10,
    exclude_seen: bool = True,
    where: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    found = recommender.recommend([user], [history], top_k=top_k, exclude_seen=exclude_seen, where=where)[0]
    tokens = _tokens(recommender, "item", [row["item"] for row in found])
    return {
        "user": user,
        "tokens": None if user is None else _tokens(recommender, "user", [user])[0],
        "history": recommender.store.seen([str(user)])[0] if history is None else history,
        "recommendations": [
            {"rank": rank, **row, "tokens": codes, "title": titles.get(row["item"])}
            for rank, (row, codes) in enumerate(zip(found, tokens), 1)
        ],
    }


def _store(uri: str | None) -> Any:
    """The store that is asked for in the place of the repository's own."""
    from ..store import open_store

    return None if uri is None else open_store(uri, token=os.environ.get("MILVUS_TOKEN"))


def _local(name: str) -> Path:
    """The folder of a repository that is to be changed."""
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"there is no folder {name}; only a repository in a local folder can be changed: fetch one with `hf download {name} "
            "--local-dir out`, change that and push it."
        )
    return Path(name)


def _tokens(recommender: Recommender, kind: str, ids: list[str]) -> list[str]:
    """The code tokens of users or items, as they stand in a prompt."""
    tokenizer = recommender.tokenizer
    names, codes = tokenizer.code_token_ids(kind), tokenizer.codes(kind, ids)
    return ["".join(tokenizer.convert_ids_to_tokens(names[range(len(names)), row].tolist())) for row in codes]


def _titles(dataset: str) -> dict[str, str]:
    from ..data.data_sources import load_item_titles

    try:
        return load_item_titles(dataset) if dataset in TITLED else {}
    except OSError:
        return {}


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
