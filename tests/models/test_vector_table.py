import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.models import exact_search, vector_table
from tokenrec_hf.models.embedding_store import VectorTable


@settings(max_examples=150, deadline=None)
@given(data=st.data(), start=st.integers(0, 6), chunk=st.integers(1, 5))
def test_any_changes_give_what_one_matrix_gives(data, start, chunk):
    counter = iter(range(1, 10_000))

    def fresh(count):
        return torch.tensor([[next(counter), 1.0] for _ in range(count)]).reshape(-1, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_table, "ITEM_CHUNK", chunk)
        patch.setattr(exact_search, "ITEM_CHUNK", chunk)
        first = fresh(start)
        table, matrix = VectorTable(first.clone()), first
        for action in data.draw(st.lists(st.sampled_from(["append", "put", "keep", "all", "chunks"]), max_size=8)):
            if action == "append":
                new = fresh(data.draw(st.integers(0, 7)))
                table.append(new.clone())
                matrix = torch.cat([matrix, new])
            elif action == "put" and len(matrix):
                rows = torch.tensor(data.draw(st.lists(st.integers(0, len(matrix) - 1), unique=True)), dtype=torch.long)
                new = fresh(len(rows))
                table.put(rows, new)
                matrix[rows] = new
            elif action == "keep":
                mask = torch.tensor(
                    data.draw(st.lists(st.booleans(), min_size=len(matrix), max_size=len(matrix))), dtype=torch.bool
                )
                table.keep(mask)
                matrix = matrix[mask]
            elif action == "all":
                assert torch.equal(table.all(), matrix)
            chunks = table.chunks()
            assert all(0 < len(vectors) <= chunk for vectors, _ in chunks)
            assert torch.equal(torch.cat([first[:0], *(vectors for vectors, _ in chunks)]), matrix)
            inverse = torch.cat([first[:0, 0], *(inverse for _, inverse in chunks)])
            np.testing.assert_allclose(inverse, 1 / np.linalg.norm(matrix.numpy(), axis=1), rtol=1e-6)
            assert len(table) == len(matrix)
            if len(matrix):
                rows = torch.tensor(data.draw(st.lists(st.integers(0, len(matrix) - 1), max_size=9)), dtype=torch.long)
                assert torch.equal(table.take(rows), matrix[rows])


def test_adding_rows_one_by_one_copies_few_of_them(monkeypatch):
    copied = 0
    cat = torch.cat

    def counting(tensors, *args, **kwargs):
        nonlocal copied
        result = cat(tensors, *args, **kwargs)
        copied += len(result)
        return result

    table = VectorTable(torch.zeros(1_000, 2))
    monkeypatch.setattr(torch, "cat", counting)
    for _ in range(1_000):
        table.append(torch.zeros(1, 2))
    assert len(table) == 2_000
    assert copied < 20_000
