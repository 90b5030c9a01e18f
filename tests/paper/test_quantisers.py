"""What codes keep of vectors: the rows are what they say."""

import numpy as np
import quantisers
import torch

from tokenrec_hf.data.splits import index_splits


def test_codewords_that_add_up_are_found_where_there_are_any():
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (500, 3), generator=random)
    words = torch.randn(3, 8, 5, generator=random)
    vectors = words[torch.arange(3), codes].sum(dim=1)
    np.testing.assert_allclose(quantisers.fitted(codes, vectors), vectors, atol=0.15)
    noise = torch.randn(500, 5, generator=random)
    left = (noise - quantisers.fitted(codes, noise)).square().mean()
    assert 0.9 < left < 1.0  # 22 parameters of 500 points


def test_rows_of_the_demo_set(demo_splits, monkeypatch):
    short = {
        "collaborative.training.num_train_epochs": 10,
        "collaborative.config.embedding_dim": 16,
        "mq_tokenizer.config.codebook_size": 32,
        "mq_tokenizer.config.hidden_dim": 16,
        "mq_tokenizer.training.max_steps": 20,
        "mq_tokenizer.evaluate_every": 20,
    }
    for name, value in short.items():
        monkeypatch.setitem(quantisers.CHANGES, name, value)
    rows = quantisers.compare(index_splits(demo_splits, "validation"), None)
    assert [row["error"] > 0 for row in rows] == [False] + [True] * 5
    exact, _, four, eight, _, of_a = rows
    assert eight["error"] < four["error"] < 1 and of_a["error"] < 1
    # Eight books of 32 for 400 users lose little.
    assert abs(eight["ndcg@20"] - exact["ndcg@20"]) < 0.2 * exact["ndcg@20"]
    assert len(quantisers.table(rows)) == len(rows) + 2
