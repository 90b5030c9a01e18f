"""The tables of docs/results.md and README.md are those of the records."""

import page
import pytest


def made_up(model: str, title: str, *hit_rates: float) -> dict:
    def run(value):
        return {f"{name}@{k}": value * k / 20 for name in ("hr", "ndcg") for k in (10, 20, 30)}

    runs = [run(value) for value in hit_rates]
    count = len(runs)
    one = {"model": model, "title": title, "validation": runs, "test": runs, "epochs": [3] * count}
    return one | {
        "fit_seconds": [2.4] * count,
        "peak_bytes": [1e9] * count,
        "accelerators": ["none"],
        "settings": "x",
        "trials": 4,
        "data": ["d"],
    }


@pytest.fixture
def measured(monkeypatch):
    rows = [made_up("ease", "EASE", 0.1), made_up("tokenrec-best", "TokenRec `best`, user id only", 0.2, 0.4)]
    found = {"lastfm": rows, "beauty": rows, "ml-100k": rows[:1]}
    monkeypatch.setattr(page, "recorded_rows", lambda dataset, *rest: found.get(dataset, []))


def test_rows_stand_between_their_marks_and_nothing_else_changes(measured):
    before, after = "Text.\n\n<!-- rows lastfm -->\n", "<!-- end of rows -->\n\nMore."
    filled = page.fill(f"{before}old\n{after}")
    assert filled.startswith(before) and filled.endswith(after) and "old" not in filled
    assert "| EASE | .0500 | .1000 | .1500 | .0500 | .1000 | .1500 | 1 | .1000 / .1000 | 4 | 2 |" in filled
    assert "| TokenRec `best`, user id only | **.1500** ± .0707 | **.3000** ± .1414 |" in filled
    assert page.fill(filled) == filled
    with pytest.raises(ValueError, match="there is no table 'nothing'; choose among lastfm"):
        page.fill("<!-- rows nothing -->\n<!-- end of rows -->")


def test_summary_has_a_column_for_each_data_set(measured, tmp_path):
    lines = page.summarised(tmp_path)
    assert lines[2:] == [
        "| EASE | .1000 / .1000 | .1000 / .1000 | - | - | .1000 / .1000 |",
        "| TokenRec `best`, user id only | .3000 / .3000 | .3000 / .3000 | - | - | - |",
    ]


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_pages_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- rows " in text
    assert page.fill(text) == text, "run python examples/paper/page.py"


def test_every_table_stands_on_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in page.PAGES)
    assert {name for name in page.TABLES if f"<!-- rows {name} -->" not in text} == set()
