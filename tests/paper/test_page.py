"""The numbers of docs/results.md and README.md are those of the tables, and the tables' those of the records."""

import json

import page
import pytest
from harness import MODELS, Fits, recorded, study
from report import summary, write_report


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
def tables(tmp_path):
    rows = [made_up("ease", "EASE", 0.1), made_up("tokenrec-best", "TokenRec (best, user id only)", 0.2, 0.4)]
    for dataset in ("lastfm", "beauty"):
        write_report(rows, dataset, [], tmp_path, f"table2-{dataset}")
    write_report(rows[:1], "ml-100k", [], tmp_path, "table2-ml-100k")
    return tmp_path


def test_rows_stand_between_their_marks_and_nothing_else_changes(tables):
    before, after = "Text.\n\n<!-- rows lastfm -->\n", "<!-- end of rows -->\n\nMore."
    filled = page.fill(f"{before}old\n{after}", tables)
    assert filled.startswith(before) and filled.endswith(after) and "old" not in filled
    assert "| EASE | .0500 | .1000 | .1500 | .0500 | .1000 | .1500 | 1 | .1000 / .1000 | 4 | 2 |" in filled
    assert "| TokenRec `best`, user id only | **.1500** ± .0707 | **.3000** ± .1414 |" in filled
    assert page.fill(filled, tables) == filled
    with pytest.raises(FileNotFoundError):
        page.fill("<!-- rows nothing -->\n<!-- end of rows -->", tables)


def test_summary_has_a_column_for_each_data_set(tables):
    lines = page.summary_rows(tables)
    assert lines[2:] == [
        "| EASE | .1000 / .1000 | .1000 / .1000 | .1000 / .1000 |",
        "| TokenRec `best`, user id only | .3000 / .3000 | .3000 / .3000 | - |",
    ]


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_pages_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- rows " in text
    assert page.fill(text) == text, "run python examples/paper/page.py"


@pytest.mark.parametrize("dataset", page.SUMMARY)
def test_tables_are_those_of_all_records(dataset, tmp_path):
    table = json.loads((page.HERE / "tables" / f"table2-{dataset}.json").read_text(encoding="utf-8"))
    results = page.HERE / "results"
    fits = Fits(results, tmp_path, log=pytest.fail)
    rows = []
    for model in MODELS:
        seeds, trials = recorded(dataset, model, results)
        if seeds:
            rows += study(dataset, model, seeds, fits, trials)
    assert table["rows"] == [{**row, "summary": summary(row)} for row in rows], "run table2.py --recorded"
