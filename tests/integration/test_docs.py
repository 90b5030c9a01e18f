"""README and docs: command lines are ones that `tokenrec` takes, Python blocks are code that runs, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from tokenrec_hf.cli import app as cli
from tokenrec_hf.cli.arguments import repeat_options

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = "tokenrec-quickstart"


def blocks(page, language):
    """The fenced blocks of a page, with the line where each begins."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
        yield text[: match.start()].count("\n") + 2, match[1]


def command_lines():
    for page in PAGES:
        for line, block in blocks(page, "bash"):
            for command in block.replace("\\\n", " ").splitlines():
                for part in command.split("&&"):
                    if part.split()[:1] == ["tokenrec"]:
                        yield pytest.param(part.split("#")[0], id=f"{page.name}:{line} {part.strip()[:40]}")


@pytest.mark.parametrize("command", command_lines())
def test_a_command_of_the_docs_is_one_that_tokenrec_takes(command):
    name, *arguments = shlex.split(command)[1:]
    parsed = typer.main.get_command(cli.app).commands[name]
    parsed.make_context(name, repeat_options([name, *arguments], parsed)[1:])


def python_blocks():
    for page in PAGES:
        for line, block in blocks(page, "python"):
            yield pytest.param(page, block, id=f"{page.name}:{line}")


@pytest.mark.parametrize(("page", "block"), python_blocks())
def test_a_python_block_of_the_docs_is_python(page, block):
    compile(block, page.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/use_a_shared_model.md", "docs/repository.md"])
def test_the_blocks_of_a_page_run_one_after_the_other_on_the_quickstart(
    name, trained_repository, tmp_path, monkeypatch
):
    (tmp_path / QUICKSTART).symlink_to(trained_repository)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = 0
    for line, block in blocks(ROOT / name, "python"):
        exec(compile(block, f"{name}:{line}", "exec"), names)
        ran += 1
    assert ran > 0


def test_the_cells_of_the_notebook_run_one_after_the_other_on_the_quickstart(trained_repository, tmp_path, monkeypatch):
    (tmp_path / QUICKSTART).symlink_to(trained_repository)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # The training is that of the folder.
    assert cells[0] == "!tokenrec quickstart"
    names: dict = {}
    for number, cell in enumerate(cells[1:], 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert len(names["history"]) > 0 and names["table"](names["recommender"].recommend(["u002"])[0], []).shape == (
        10,
        3,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_wrapped_at_100_columns(page):
    is_code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        is_code ^= line.startswith("```")
        if not is_code and not line.startswith(("|", "![", "<")):
            assert len(line) <= 100, f"line {number} has {len(line)} columns"
