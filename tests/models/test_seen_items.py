import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.models.embedding_store import SeenItems

NUM_ITEMS = 6


def flat(lists):
    return np.array([len(one) for one in lists], dtype=np.int64), np.array(sum(lists, []), dtype=np.int64)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changes_give_what_lists_give(data):
    seen, lists, num_items = SeenItems(), [], NUM_ITEMS
    for _ in range(data.draw(st.integers(0, 8))):
        action = data.draw(st.sampled_from(["users", "add", "replace", "keep_users", "keep_items"]))
        if action == "users":
            count = data.draw(st.integers(0, 3))
            seen.add_users(count)
            lists += [[] for _ in range(count)]
        elif action in ("add", "replace") and lists and num_items:
            users = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=4))
            new = [data.draw(st.lists(st.integers(0, num_items - 1), max_size=4)) for _ in users]
            getattr(seen, action)(np.array(users, dtype=np.int64), *flat(new))
            for user, items in zip(users, new):
                lists[user] = items if action == "replace" else lists[user] + items
        elif action == "keep_users":
            keep = data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists)))
            seen.keep_users(np.array(keep, dtype=bool))
            lists = [items for items, kept in zip(lists, keep) if kept]
        elif action == "keep_items":
            keep = data.draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items))
            seen.keep_items(np.array(keep, dtype=bool))
            moved = np.cumsum(keep) - 1
            lists = [[int(moved[item]) for item in items if keep[item]] for items in lists]
            num_items = sum(keep)
        assert seen.num_users == len(lists)
        asked = data.draw(st.lists(st.integers(-1, len(lists) - 1), max_size=5))
        indptr, items = seen.of(np.array(asked, dtype=np.int64))
        found = [items[a:b].tolist() for a, b in zip(indptr, indptr[1:])]
        assert found == [[] if user < 0 else lists[user] for user in asked]


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        SeenItems(np.array([0, 2]), np.array([1], dtype=np.int32))
