"""README and docs: the notebook runs, links lead somewhere, lines are short. `test_pages.py` runs the blocks of the pages."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = "tokenrec-quickstart"


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
