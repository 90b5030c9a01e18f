"""Recommendations for many users in a file."""

import io
import json

import pandas as pd
import pytest

from tokenrec_hf import Recommender
from tokenrec_hf.cli.app import main
from tokenrec_hf.repository import export
from tokenrec_hf.repository.export import export_recommendations

READ = {
    ".parquet": pd.read_parquet,
    ".csv": lambda path: pd.read_csv(path, dtype={"user_id": str, "item_id": str}),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype={"user_id": str, "item_id": str}),
}


@pytest.fixture(scope="module")
def recommender(trained_repository):
    return Recommender.from_pretrained(trained_repository)


@pytest.mark.parametrize("suffix", READ)
def test_the_file_has_what_the_recommender_answers(recommender, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(export, "BATCH", 7)
    users, path = recommender.store.ids("user")[:20], tmp_path / "new" / f"out{suffix}"
    assert export_recommendations(recommender, path, users, top_k=4, titles={"f001": "First"}) == (20, 0)
    table = READ[suffix](path)
    assert list(table.columns) == ["user_id", "rank", "item_id", "score", "title", "note"]
    expected = recommender.recommend(users, top_k=4)
    assert table.user_id.tolist() == [user for user in users for _ in range(4)]
    assert table["rank"].tolist() == [1, 2, 3, 4] * 20
    assert table.item_id.tolist() == [row["item"] for rows in expected for row in rows]
    assert table.score.tolist() == pytest.approx([row["score"] for rows in expected for row in rows], abs=1e-5)
    titled = table[table.title.notna()]
    assert set(titled.item_id) <= {"f001"} and set(titled.title) <= {"First"}


def test_an_error_leaves_the_former_file(recommender, tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")
    with pytest.raises(KeyError, match="nobody"):
        export_recommendations(recommender, path, [*recommender.store.ids("user")[:3], "nobody"])
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    users = ["nobody", *recommender.store.ids("user")[:2000], *["somebody"] * 2]
    with pytest.raises(KeyError, match=r"'nobody' is unknown \(request 0\); .* 'somebody' is unknown \(request 1001\)"):
        export_recommendations(recommender, path, users)
    with pytest.raises(ValueError, match=r"out\.xlsx is not a \.parquet, \.csv or \.jsonl file"):
        export_recommendations(recommender, tmp_path / "out.xlsx")


def test_a_full_disk_is_named_with_the_file(recommender, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "answer_reranked", full)
    with pytest.raises(OSError, match=r"no space left for .*all\.csv.*; nothing was written. Make room and try again"):
        export_recommendations(recommender, tmp_path / "all.csv")
    assert not list(tmp_path.iterdir())


def test_a_user_gets_ten_items_by_default(recommender, tmp_path):
    export_recommendations(recommender, tmp_path / "out.csv", ["u001"])
    assert len(pd.read_csv(tmp_path / "out.csv")) == 10


def test_no_users_are_a_table_without_rows(recommender, tmp_path):
    assert export_recommendations(recommender, tmp_path / "out.parquet", []) == (0, 0)
    assert len(pd.read_parquet(tmp_path / "out.parquet")) == 0


def test_the_command_writes_all_users_or_those_of_a_list(trained_repository, tmp_path, capsys, monkeypatch):
    folder, path = str(trained_repository), tmp_path / "out.parquet"
    assert main(["recommend", folder, "--all-users", "--output", str(path), "--top-k", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == 1000
    everyone = pd.read_parquet(path)
    assert everyone.user_id.nunique() == 1000 and len(everyone) == 3000
    (tmp_path / "users.txt").write_text("u003\n\nu001\n")
    assert main(["recommend", folder, "--users-file", str(tmp_path / "users.txt"), "--output", str(path)]) == 0
    assert "2 users" in capsys.readouterr().out
    assert pd.read_parquet(path).user_id.unique().tolist() == ["u003", "u001"]
    monkeypatch.setattr("sys.stdin", io.StringIO("u007\n"))
    assert main(["recommend", folder, "--users-file", "-", "--output", str(path)]) == 0
    assert pd.read_parquet(path).user_id.unique().tolist() == ["u007"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--all-users"],
        ["--output", "x.csv", "--user", "u001"],
        ["--all-users", "--user", "u001", "--output", "x.csv"],
        ["--all-users", "--users-file", "x", "--output", "x.csv"],
        ["--users-file", "x", "--history", "f001", "--output", "x.csv"],
    ],
)
def test_arguments_that_do_not_go_together_are_refused(trained_repository, capsys, arguments):
    assert main(["recommend", str(trained_repository), *arguments]) == 2
    assert "--users-file" in capsys.readouterr().err


def test_users_who_are_unknown_are_skipped_or_get_popular_items(trained_repository, recommender, tmp_path, capsys):
    path, users = tmp_path / "out.csv", tmp_path / "users.txt"
    users.write_text("u003\nnobody\n")
    argv = ["recommend", str(trained_repository), "--users-file", str(users), "--output", str(path), "--top-k", "2"]
    assert main(argv) == 1
    assert "user 'nobody' is unknown" in capsys.readouterr().err and not path.exists()
    assert main([*argv, "--on-unknown", "skip"]) == 0
    assert "2 users" in (out := capsys.readouterr().out) and "1 of them not as asked" in out
    table = READ[".csv"](path)
    assert table.user_id.tolist() == ["u003"] * 2 + ["nobody"]
    assert table.item_id.isna().tolist() == [False, False, True] == table["rank"].isna().tolist()
    assert table.note.tolist()[2] == "user 'nobody' is unknown"
    lines = ["recommend", str(trained_repository), "--users-file", str(users), "--output", str(tmp_path / "out.jsonl")]
    assert main([*lines, "--top-k", "2", "--on-unknown", "skip"]) == 0
    ranks = [json.loads(line)["rank"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ranks == [1, 2, None] and all(type(rank) is int for rank in ranks[:2])
    assert main([*argv, "--on-unknown", "popular"]) == 0
    table = READ[".csv"](path)
    assert table.item_id.tolist()[2:] == list(recommender.store.popular(2))
    assert table.note.isna().tolist() == [True, True, False, False] == table.score.notna().tolist()
