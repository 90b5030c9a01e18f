"""Arguments of the `tokenrec` command: the options that several commands have, and how values are read."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from typer.core import TyperCommand

# The value of a setting or a metadata filter.
Scalar = Any

AsJson = Annotated[bool, Option("--json", help="Print one JSON document on stdout.")]
Name = Annotated[str, Argument(metavar="REPOSITORY", help="Folder that `tokenrec train` wrote, or Hub repository.")]
Folder = Annotated[str, Argument(metavar="FOLDER", help="Folder that `tokenrec train` wrote.")]
Revision = Annotated[str | None, Option(show_default="main", help="Branch, tag or commit of the Hub repository.")]
URI = Annotated[
    str | None,
    Option(
        metavar="URI",
        show_default="the repository's own",
        help="Embedding store: a folder, a Milvus Lite .db, or http(s)://host:19530 with its token in MILVUS_TOKEN.",
    ),
]
ITEM_METADATA = "Table of items, with their ids and a column title, or any others that `recommend --where` filters by."
Host = Annotated[str, Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
TopK = Annotated[int, Option(metavar="K", help="Number of items.")]
Where = Annotated[
    list[str] | None,
    Option(
        metavar="NAME=VALUE ...",
        help="Only items with this metadata, also 'price<30' (<=, >, >=) and 'title~blue' (contains); values of the same name are "
        "alternatives.",
    ),
]

SplitBy = Annotated[
    Literal["leave_one_out", "temporal"],
    Option(help="Hold out each user's last items, or what followed one moment; see --at."),
]
At = Annotated[
    str | None,
    Option(metavar="DATE|SHARE", help="The moment of a temporal split, or the share of interactions before."),
]
KCore = Annotated[int | None, Option(help="Drop users and items with fewer interactions.")]


def _reads(kind: Any, name: str, help: str, **settings: Any) -> Any:
    return Annotated[kind, Option(name, help=help, rich_help_panel="Reading of interactions", **settings)]


# The options of `load_interactions`, which a command takes in the parameter `reading`.
READING = {
    "user_column": _reads(str | None, "--user-column", "Column of user ids, or its number in a file without header."),
    "item_column": _reads(str | None, "--item-column", "Column of item ids."),
    "rating_column": _reads(str | None, "--rating-column", "Column of ratings."),
    "timestamp_column": _reads(str | None, "--timestamp-column", "Column of timestamps."),
    "event_column": _reads(str | None, "--event-column", "Column of kinds of events."),
    "events": _reads(list[str] | None, "--event", "Kinds of events that count.", metavar="NAME ..."),
    "min_rating": _reads(float | None, "--min-rating", "Drop interactions rated lower."),
    "keep": _reads(
        Literal["first", "last"] | None, "--keep", "Which interaction of a repeated pair.", show_default="first"
    ),
    "drop_incomplete": _reads(bool | None, "--drop-incomplete", "Drop rows with missing values."),
}


class UsageError(typer.TyperException):
    """A wrong argument."""

    exit_code = 2


def repeat_options(arguments: Sequence[str], command: TyperCommand) -> list[str]:
    """`--history 08 24` as `--history=08 --history=24`: typer takes one value for each occurrence of an option.

    The values end at the next option of the command, so ids may begin with hyphens. No value at all becomes an empty one.
    """
    several = {name.replace("_", "-"): getattr(one, "multiple", False) for one in command.params for name in one.opts}
    result: list[str] = []
    current = ""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        name = name.replace("_", "-")
        if name in several or argument in ("--", "--help"):
            current = f"{name}=" if several.get(name) and not equals else ""
            result.append(current or argument)
        elif current:
            if result[-1] == current:
                result.pop()
            result.append(current + argument)
        else:
            result.append(argument)
    return result


def name_options(message: str, command: TyperCommand) -> str:
    """A message of the package with its arguments as options of a command: `item_column` becomes `--item-column`."""
    # Names of one word are words of the language, too.
    for name in (one.name for one in command.params if "_" in (one.name or "")):
        message = re.sub(rf"(?<![\w'\"`/-]){name}(?![\w'\"`]|\.\w)", f"--{name.replace('_', '-')}", message)
    return message


def read_settings(arguments: Sequence[str]) -> dict[str, Scalar]:
    """`--a.b 1 --c=x --flag` as settings by dotted name; names without dots are fields of T5's `TrainingArguments`."""
    settings: dict[str, Scalar] = {}
    pending = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name[2:].replace("-", "_")
            pending = name if "." in name else f"retrieval.training.{name}"
            settings[pending] = read_scalar(value) if equals else True
            pending *= not equals
        elif pending:
            settings[pending] = read_scalar(argument)
            pending = ""
        else:
            raise UsageError(f"there is no setting before the value {argument!r}.")
    return settings


def read_scalar(text: str) -> Scalar:
    """The JSON value of a text, or the text itself where it is none."""
    for read in (json.loads, float):
        with contextlib.suppress(ValueError):
            return read(text.lower() if text in ("True", "False") else text)
    return text


def read_where(pairs: Iterable[str]) -> dict[str, list[str]]:
    """`genre=jazz genre=folk price<30` as `{"genre": ["jazz", "folk"], "price<": ["30"]}`."""
    where: dict[str, list[str]] = {}
    for pair in pairs:
        match = re.fullmatch(r"([^\W\d]\w*)(=|<=?|>=?|~)(.*)", pair, re.ASCII | re.DOTALL)
        if match is None:
            raise UsageError(f"--where {pair} is not NAME=VALUE, NAME<VALUE, NAME>VALUE or NAME~TEXT.")
        name, sign, value = match.groups()
        condition = name if sign == "=" else name + sign
        where.setdefault(condition, []).append(value)
    return where


def read_limits(pairs: Iterable[str]) -> dict[str, int]:
    """`genre=3` as `{"genre": 3}`."""
    limits = {}
    for pair in pairs:
        name, _, limit = pair.partition("=")
        if not name or not limit.isdecimal() or int(limit) < 1:
            raise UsageError(f"--max-per {pair} is not NAME=K with a positive K.")
        limits[name] = int(limit)
    return limits


def read_lines(path: str) -> list[str]:
    """The lines of a file, or of stdin, that are not blank."""
    if path != "-" and not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give a file with an id on each line.")
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a file with an id on each line.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
