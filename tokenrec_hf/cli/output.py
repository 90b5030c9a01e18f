"""What the commands of `tokenrec` print: each function makes the text of a document that `cli.py` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..evaluation.variants import LABELS, SHOWN


def show_quickstart(document: Mapping[str, Any]) -> str:
    """Results, codes and the recommendations for some users."""
    folder, first = document["repository"], document["users"][0]
    blocks = [_results(document["metrics"], ("popularity", "collaborative_dot", "tokenrec"))]
    for user in document["users"]:
        blocks.append(show_recommendations(user, document["held_out"][user["user"]]))
    seen = " ".join(first["history"][-2:])
    blocks.append(
        "* the item held out for the test\n\n"
        "Next:\n"
        f"  tokenrec recommend {folder} --user {first['user']} --history {seen} --top-k 10\n"
        f"  tokenrec evaluate {folder} --unseen-prompt\n"
        f"  tokenrec info {folder}\n"
        "  tokenrec train --dataset interactions.csv --output_dir out"
    )
    return "\n\n".join(blocks)


def show_train(document: Mapping[str, Any]) -> str:
    """Results, codes and what to do next."""
    folder = document["repository"]
    return (
        f"{_results(document, tuple(LABELS))}\n\n{_code_lines(document['codes'])}\n\n"
        f"Next:\n  tokenrec recommend {folder} --user <id>\n  tokenrec info {folder}"
    )


def show_evaluation(document: Mapping[str, Any]) -> str:
    """Metrics down, methods across; or the checks of an audit."""
    if "checks" in document:
        return _checks(document)
    metrics = document["metrics"]
    names = list(metrics[document["variant"]])
    rows = [[LABELS[name], *(_number(values.get(key)) for key in names)] for name, values in metrics.items()]
    # More metrics than a line is wide, so they go down and the methods across.
    table = list(zip(*[["", *names], *rows]))
    return f"{document['split']}, {document['users']} users\n\n{_table(table)}"


def _checks(document: Mapping[str, Any]) -> str:
    """A line a check, and the verdict."""
    words = {True: "ok", False: "FAILED", None: "unknown"}
    rows = [[words[one["passed"]], one["run"], one["name"], one["finding"]] for one in document["checks"]]
    passed = [one["passed"] for one in document["checks"]]
    counts = [f"{passed.count(outcome)} {word}" for outcome, word in words.items() if outcome in passed]
    verdict = "No leak was found" if document["passed"] else "The audit has FAILED"
    return f"{_table(rows)}\n\n{verdict}: {', '.join(counts)}."


def show_recommendations(document: Mapping[str, Any], held_out: str | None = None) -> str:
    """One table of items; the held-out one is marked."""
    titled = any(row["title"] for row in document["recommendations"])
    rows = [["rank", "item", "score", "tokens", *["title"] * titled]]
    for row in document["recommendations"]:
        mark = " *" if row["item"] == held_out else ""
        title = [row["title"] or ""] * titled
        cells = [str(row["rank"]), row["item"], _number(row["score"]), row["tokens"], *title]
        rows.append([*cells[:-1], cells[-1] + mark])
    who = f"a history of {len(document['history'])} items"
    if document["user"] is not None:
        who = f"user_{document['user']} = {document['tokens']}"
    return f"{who}\n{_table(rows)}"


def show_push(document: Mapping[str, Any]) -> str:
    """The address of the commit, and how to use what it holds."""
    left_out = (
        "" if document["users"] else "Users are left out: recommend to histories, or push with --include-users.\n"
    )
    return f"{document['commit']}\n{left_out}Try: tokenrec info {document['repository']}"


def show_addition(document: Mapping[str, Any]) -> str:
    """What was added, and how well the codes describe it."""
    lines = [
        f"{document['users']} users and {document['items']} items are new, {document['users_changed']} users and "
        f"{document['items_changed']} items have new vectors, {document['interactions']} interactions were recorded "
        f"({document['seconds']:.1f} s)."
    ]
    for kind, error in document["reconstruction_error"].items():
        lines.append(f"The codes of these {kind}s lose {error:.1%} of the variance.")
    lines.append(f"Next:\n  tokenrec info {document['repository']}")
    return "\n".join(lines)


def show_removal(document: Mapping[str, Any]) -> str:
    """What was removed."""
    return (
        f"{document['users']} users were deleted and {document['items']} items withdrawn from {document['repository']}."
    )


def show_info(document: Mapping[str, Any]) -> str:
    """What a repository holds, and what was measured."""
    blocks = [_table(_facts(document))]
    if document["retraining_due"]:
        blocks.append(f"It is time to train anew: {'; '.join(document['retraining_due'])}.")
    if not document["finished"]:
        done = "\n".join(f"  {run}: {', '.join(stages) or 'nothing yet'}" for run, stages in document["stages"].items())
        blocks.append(f"Training has not finished; the same `tokenrec train` goes on. Done so far:\n{done}")
    if document["codes"]:
        blocks.append(_code_lines(document["codes"]))
    if document["validation"]:
        blocks.append(_results(document, tuple(LABELS)))
    return "\n\n".join(blocks)


def _facts(document: Mapping[str, Any]) -> list[list[str]]:
    """What there is to say of a repository in one line each."""
    rows = [["repository", document["repository"]]]
    for name in ("dataset", "recipe", "seed"):
        if document[name] is not None:
            rows.append([name, str(document[name])])
    if counts := document["counts"]:
        known = f"{counts.get('user', 'no')} users, {counts['item']} items"
        if document["interactions"] is not None:
            known += f", {document['interactions']} interactions"
        rows.append(["store", f"{known}, {document['embedding_dim']} dimensions"])
    for kind, (number, size) in (document["codebooks"] or {}).items():
        rows.append([f"{kind} tokens", f"K = {number}, L = {size}, MQ-Tokenizer {document['space_ids'][kind]}"])
    for kind, added in (document["additions"] or {}).items():
        if added["count"]:
            rows.append(
                [f"added {kind}s", f"{added['count']}, codes lose {added['reconstruction_error']:.1%} of the variance"]
            )
    if epochs := document["epochs"]:
        rows.append(["epochs", ", ".join(f"{name} {count:g}" for name, count in epochs.items())])
    size = f"{document['bytes'] / 1e6:.1f} MB"
    if document["training_bytes"]:
        size += f", and {document['training_bytes'] / 1e6:.1f} MB in training/"
    rows.append(["on disk", size])
    return rows


def _results(metrics: Mapping[str, Any], names: Iterable[str]) -> str:
    """The table of methods by splits and metrics."""
    splits = [split for split in ("validation", "test") if metrics.get(split)]
    above = ["", *(cell for split in splits for cell in (split, *[""] * (len(SHOWN) - 1)))]
    header = ["", *(key.upper() for _ in splits for key in SHOWN)]
    rows = [
        [LABELS[name], *(_number(metrics[split][name][key]) for split in splits for key in SHOWN)] for name in names
    ]
    return _table([above, header, *rows])


def _code_lines(codes: Mapping[str, Mapping[str, float]]) -> str:
    header = ["codes", *(name.replace("_", " ") for name in codes["user"])]
    return _table([header, *([f"{kind}s", *map(_number, values.values())] for kind, values in codes.items())])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
