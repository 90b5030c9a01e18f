import json
import sys

import numpy as np
import pytest
import table5
import torch

from tokenrec_hf.data.splits import index_splits

TINY = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(table5.BACKBONES, "small", TINY)


@pytest.fixture(scope="module")
def demo(demo_splits):
    return index_splits(demo_splits, "test")


@pytest.mark.parametrize("kind", [table5.P5SID, table5.WrittenOutP5])
def test_generate_and_our_beam_search_find_the_same_items(kind, tiny, demo):
    p5 = table5.random_p5(kind, demo, "small")
    users = np.array([1, 5, 17, 300])
    ours = p5.recommend(users)[0].numpy()
    assert (table5.generate(p5, users) == ours).mean() > 0.95  # but for ties and rounding
    alone = table5.generate(p5, users, memory=1)
    assert (alone == ours).mean() > 0.95


def test_every_method_gives_20_unseen_items(tiny, demo):
    methods = table5.all_methods(demo, "small")
    assert len(methods) == 8
    for recommend in methods.values():
        for user, found in zip([3, 40], recommend([3, 40])):
            assert len(set(found)) == 20
            assert not set(found) & {demo.item_ids[item] for item in demo.interactions.of(user)}
            assert set(found) <= set(demo.item_ids)


def test_a_written_out_id_is_two_tokens_and_an_end_longer(tiny, demo):
    written, short = (table5.random_p5(kind, demo, "small") for kind in (table5.WrittenOutP5, table5.P5SID))
    assert written.codes.shape[1] == short.codes.shape[1] + 3
    assert written.item_tokens.shape[1] == short.item_tokens.shape[1] + 2
    assert (written.codes[:, 2:-1] == short.codes).all()


def test_the_records_are_written_and_the_table_is_printed(tiny, tmp_path, monkeypatch, capsys):
    arguments = [
        "--dataset",
        "demo",
        "--backbones",
        "small",
        "--batch-sizes",
        "1",
        "2",
        "--users",
        "2",
        "--turns",
        "1",
        "--results",
    ]
    monkeypatch.setattr(sys, "argv", ["table5.py", *arguments, str(tmp_path)])
    threads = torch.get_num_threads()
    table5.main()
    torch.set_num_threads(threads)
    records = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert [record["job"]["settings"]["batch_size"] for record in records] == [1, 2]
    assert all(value > 0 for record in records for value in record["milliseconds"].values())
    printed = capsys.readouterr().out
    text = "\n".join(table5.table(records))
    assert "small, 2 at once" in text and "vectorised" in text and text in printed
