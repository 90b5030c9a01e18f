"""Text of the documents of the `tokenrec` commands, with rich.

A `show_*` function makes blocks (text and tables) of a document, and [`text`] renders them. On a terminal, lines fit its width
and headers and verdicts are styled. Elsewhere the text is plain and a table row is one line, whatever its width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..evaluation.variants import COMPARED, LABELS, SHOWN

Document = dict[str, Any]
Blocks = Iterable[RenderableType]

# Wide enough for any row, where there is no terminal to fit.
_WIDTH = 100_000
_VERDICTS = {True: Text("ok", "green"), False: Text("FAILED", "red"), None: Text("unknown", "yellow")}
_errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def text(blocks: Blocks) -> str:
    """Blocks as text for stdout, with an empty line between them."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    with console.capture() as capture:
        for number, block in enumerate(blocks):
            console.print(*[""] * bool(number), block, sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def note(message: str, style: str | None = None) -> None:
    """Writes one line to stderr."""
    _errors.print(" ".join(message.split()), style=style)


def working(message: str) -> AbstractContextManager:
    """A spinner on stderr while a block runs; nothing where stderr is no terminal."""
    return _errors.status(f"{message} ...")


def show_quickstart(document: Document) -> Blocks:
    """Results, recommendations for some users, and further commands."""
    folder, first = document["repository"], document["users"][0]
    yield _results(document["metrics"], ("popularity", "itemknn", "collaborative_dot", "tokenrec"))
    for user in document["users"]:
        yield from show_recommendations(user, document["held_out"][user["user"]])
    seen = " ".join(first["history"][-2:])
    yield "* the item held out for the test"
    yield (
        "Next:\n"
        f"  tokenrec recommend {folder} --user {first['user']} --history {seen} --top-k 10\n"
        f"  tokenrec evaluate {folder} --unseen-prompt\n"
        f"  tokenrec info {folder}\n"
        "  tokenrec train --dataset interactions.csv --output-dir out"
    )


def show_train(document: Document) -> Blocks:
    """What would be trained on; or results, statistics of the codes, and further commands."""
    if "summary" in document:
        yield document["summary"]
        yield "\n".join(stage["summary"] for stage in document["stages"])
        return
    folder = document["repository"]
    yield _results(document, LABELS)
    yield _precision(document)
    yield _code_statistics(document["codes"])
    yield (
        f"Next:\n  tokenrec recommend {folder} --user <id>\n  tokenrec info {folder}\n"
        f"Before it serves, record the held-out items too:\n  tokenrec add {folder} --interactions <the same data>"
    )


def show_evaluation(document: Document) -> Blocks:
    """A row for each metric and a column for each method, and HR@20 by history and by item; or the checks of an audit."""
    if "checks" in document:
        yield from _checks(document, "No leak was found", "The audit has FAILED")
        return
    metrics = document["metrics"]
    yield f"{document['split']}, {document['users']} users"
    rows = [[key, *(_number(own.get(key)) for own in metrics.values())] for key in metrics[document["variant"]]]
    yield _table(["", *(LABELS[name] for name in metrics)], rows)
    for key, sizes in {"hr@20_by_history": "items of the history", "hr@20_by_popularity": "users of the item"}.items():
        names = [name for name in next(iter(document[key].values())) if name != "users"]
        rows = [
            [size, str(own["users"]), *(_number(own[name]) for name in names)] for size, own in document[key].items()
        ]
        yield _table([sizes, "users", *(f"HR@20, {LABELS[name]}" for name in names)], rows)


def show_verification(document: Document) -> Blocks:
    """The checks of a repository's files."""
    yield from _checks(document, "The repository is sound", "The repository is damaged")


def _checks(document: Document, good: str, bad: str) -> Blocks:
    """A row for each check, and the verdict."""
    checks = document["checks"]
    yield _table((), [[_VERDICTS[one["passed"]], one["run"], one["name"], one["finding"]] for one in checks])
    passed = [check["passed"] for check in checks]
    counts = [f"{passed.count(outcome)} {word}" for outcome, word in _VERDICTS.items() if outcome in passed]
    yield f"{good if document['passed'] else bad}: {', '.join(counts)}."


def show_comparison(document: Document) -> Blocks:
    """A row for each method, and the differences to the reference with their intervals."""
    reference = COMPARED[document["reference"]]
    yield f"test, {document['users']} users; [ ] is the 95 % interval of the difference to {reference}"
    rows = []
    for one in document["methods"]:
        cells = [COMPARED[one["name"]]]
        for key in ("hr@20", "ndcg@20"):
            interval = one["difference"] and "{:+.4f} [{:+.4f}, {:+.4f}]".format(*one["difference"][key])
            cells += [_number(one[key]), interval or "reference"]
        settings = ", ".join(f"{name} {value:g}" for name, value in one["settings"].items())
        rows.append([*cells, settings])
    yield _table(["", "HR@20", "difference", "NDCG@20", "difference", "settings"], rows)


def show_recommendations(document: Document, held_out: str | None = None) -> Blocks:
    """A table of items, with a mark on the held-out item; or what was written to a file."""
    if "output" in document:
        noted = ", {noted} of them not as asked: see the column note" * bool(document["noted"])
        yield ("{users} users, {output} ({seconds:.1f} s)" + noted).format(**document)
        return
    subject = f"a history of {len(document['history'])} items"
    if document["user"] is not None:
        subject = f"user_{document['user']}" + f" = {document['tokens']}" * bool(document["tokens"])
    if document.get("note"):
        subject += f" ({document['note']})"
    yield Group(subject, _items(document["recommendations"], held_out))


def show_similar(document: Document) -> Blocks:
    """A table of similar items for each item."""
    for row in document["items"]:
        title = f" ({row['title']})" if row["title"] else ""
        yield Group(f"item_{row['item']} = {row['tokens']}{title}", _items(row["similar"]))


def show_push(document: Document) -> Blocks:
    """The address of the commit, and how to use the repository."""
    yield document["commit"]
    if document["space"]:
        yield f"The page of the repository is {document['space']}; the Space builds it in a few minutes."
    if not document["users"]:
        yield "Users are left out: recommend to histories, or push with --include-users."
    if document["left_out"]:
        yield f"These files are not part of the repository and were not uploaded: {', '.join(document['left_out'])}."
    yield f"Try: tokenrec info {document['repository']}"


def show_report(document: Document) -> Blocks:
    """The file."""
    yield f"The report of {document['repository']} is in {document['output']}."


def show_export(document: Document) -> Blocks:
    """The file, and the command that uses it."""
    yield f"The graph of {document['repository']} is in {document['output']} ({document['bytes'] / 1e6:.1f} MB)."
    yield f"Next:\n  tokenrec serve {document['repository']} --onnx {document['output']}"


def show_addition(document: Document) -> Blocks:
    """The number of added users and items, and the reconstruction errors of their codes."""
    counts = (
        "{users} users and {items} items are new, {users_changed} users and {items_changed} items have new vectors, "
        "{interactions} interactions were recorded, {described} items have new metadata ({seconds:.1f} s)."
    ).format(**document)
    errors = document["reconstruction_error"].items()
    lost = (f"The codes of these {kind}s lose {error:.1%} of the variance." for kind, error in errors)
    yield "\n".join([counts, *lost, f"Next:\n  tokenrec info {document['repository']}"])


def show_removal(document: Document) -> Blocks:
    """The number of removed users and items, and those that were not there."""
    yield f"{document['users']} users were deleted and {document['items']} items withdrawn from {document['repository']}."
    absent = [f"{kind} {name!r}" for kind, ids in document["not_found"].items() for name in ids]
    if absent:
        yield f"Nothing was left to remove of {', '.join(absent)}."


def show_info(document: Document) -> Blocks:
    """Contents, progress and results of a repository."""
    yield _table((), _facts(document))
    if document["retraining_due"]:
        yield f"Training anew is due: {'; '.join(document['retraining_due'])}."
    if not document["finished"]:
        done = "\n".join(f"  {run}: {', '.join(stages) or 'nothing yet'}" for run, stages in document["stages"].items())
        yield f"Training has not finished; the same `tokenrec train` resumes it. Finished stages:\n{done}"
    if document["codes"]:
        yield _code_statistics(document["codes"])
    if document["validation"]:
        yield _results(document, LABELS)


def _facts(document: Document) -> Iterable[tuple[str, str]]:
    for name in ("repository", "dataset", "recipe", "seed"):
        if document[name] is not None:
            yield name, str(document[name])
    if counts := document["counts"]:
        interactions = f", {document['interactions']} interactions in training" * (document["interactions"] is not None)
        users, items = counts.get("user", "no"), counts["item"]
        yield "contents", f"{users} users, {items} items{interactions}, {document['embedding_dim']} dimensions"
    for kind, (number, size) in (document["codebooks"] or {}).items():
        yield f"{kind} tokens", f"K = {number}, L = {size}, MQ-Tokenizer {document['space_ids'][kind]}"
    for kind, added in (document["additions"] or {}).items():
        if added["count"]:
            error = added["reconstruction_error"]
            yield f"added {kind}s", f"{added['count']}, codes lose {error:.1%} of the variance"
    if epochs := document["epochs"]:
        yield "epochs", ", ".join(f"{name} {count:g}" for name, count in epochs.items())
    training = f", and {document['training_bytes'] / 1e6:.1f} MB of training records" * bool(document["training_bytes"])
    yield "on disk", f"{document['bytes'] / 1e6:.1f} MB{training}"


def _items(rows: Sequence[Document], held_out: str | None = None) -> Table:
    titled, explained = any(row["title"] for row in rows), any(row.get("because") for row in rows)
    header = ["rank", "item", "score", "tokens", *["because of"] * explained, *["title"] * titled]
    table = _table(header, ())
    for row in rows:
        cells = [str(row["rank"]), row["item"], _number(row["score"]), row["tokens"]]
        cells += [", ".join(row.get("because", ()))] * explained + [row["title"] or ""] * titled
        cells[-1] += " *" * (row["item"] == held_out)
        table.add_row(*cells)
    return table


def _results(metrics: Mapping[str, Any], names: Iterable[str]) -> Table:
    """A row for each method and a column for each metric of each split."""
    splits = [split for split in ("validation", "test") if metrics.get(split)]
    header = [f"{split if key is SHOWN[0] else ''}\n{key.upper()}" for split in splits for key in SHOWN]
    values = {name: [_number(metrics[split][name][key]) for split in splits for key in SHOWN] for name in names}
    return _table(["", *header], [[LABELS[name], *row] for name, row in values.items()])


def _precision(document: Document) -> str:
    """How far chance moves HR@20, and whether that hides the difference to the better baseline."""
    metrics, users = document.get("test") or document["validation"], document["evaluated_users"]
    own, best = metrics["tokenrec"]["hr@20"], max(("popularity", "itemknn"), key=lambda one: metrics[one]["hr@20"])
    # The normal approximation of a share, at 95 %.
    half = 1.96 * math.sqrt(own * (1 - own) / users)
    text = f"{users} users: HR@20 of TokenRec is {own:.4f} ± {half:.4f} (95 %)."
    if abs(own - metrics[best]["hr@20"]) < half:
        text += f" These are too few users to tell TokenRec from {LABELS[best]}; see `tokenrec compare`."
    return text


def _code_statistics(codes: Mapping[str, Mapping[str, float]]) -> Table:
    header = ["codes", *(name.replace("_", " ") for name in codes["user"])]
    return _table(header, [[f"{kind}s", *map(_number, values.values())] for kind, values in codes.items()])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    table = Table(*header, show_header=bool(header), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table
