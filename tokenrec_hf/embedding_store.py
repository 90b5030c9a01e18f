"""The embedding store: where the collaborative vectors of users and items live, and where items are retrieved from.

Holds, in memory, the ids, the raw vectors and what each user has already interacted with, and finds the items whose
vectors have the highest cosine with a query (Eq. 19 of TokenRec, arXiv 2406.10450), exactly. The vectors are the source
of truth for everything downstream. Knows nothing about how they were made, about codes, prompts or models; it only
carries the hashes (`space_ids`) of the MQ-Tokenizers that the codes were made with.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError

from .exact_search import exact_search, unit_rows
from .id_index import IdIndex, check_ids
from .store_files import MANIFEST, damaged, load_files, save_files

KINDS = ("user", "item")


class EmbeddingStore:
    """Ids, raw vectors and seen items of users and items, in memory, with exact cosine search over the items.

    Rows keep the order in which ids were first added; deleting closes the gaps. Every change is checked before anything
    is touched, so a call that raises has changed nothing. A change costs a pass over the store: pass many ids a call.
    A store takes 4 * `embedding_dim` bytes a vector, and as much again for the items once they were searched, because
    the unit vectors that cosine needs are kept beside the raw ones.

    Args:
        embedding_dim: d, the number of dimensions of users' and items' vectors.
        space_ids: for `"user"` and `"item"`, the hash of that kind's MQ-Tokenizer (encoder and codebooks); `None` as
            long as the kind is not tied to one.

    Raises:
        ValueError: `embedding_dim` is not positive, or `space_ids` has another key than `"user"` and `"item"`.
    """

    def __init__(self, embedding_dim: int, space_ids: dict[str, str] | None = None):
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim}; it must be at least 1.")
        self.embedding_dim = int(embedding_dim)
        self.space_ids: dict[str, str | None] = dict.fromkeys(KINDS)
        for kind, space_id in (space_ids or {}).items():
            self.space_ids[_check_kind(kind)] = space_id
        self._index = {kind: IdIndex() for kind in KINDS}
        self._vectors = {kind: torch.empty(0, self.embedding_dim) for kind in KINDS}
        self._unit_items: torch.Tensor | None = None
        # Seen items as CSR: user row u has seen the item rows _seen_items[_seen_indptr[u] : _seen_indptr[u + 1]].
        self._seen_indptr = np.zeros(1, dtype=np.int64)
        self._seen_items = np.empty(0, dtype=np.int32)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}s={self.count(kind)}" for kind in KINDS)
        return f"EmbeddingStore(embedding_dim={self.embedding_dim}, {counts})"

    # ---- open, save, share

    @classmethod
    def open(cls, path_or_uri: str | os.PathLike) -> EmbeddingStore:
        """Opens the store in a folder, or in the `store/` folder of a trained repository.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: a file of the store is missing, damaged or of another format version, or a URI was given.
        """
        if str(path_or_uri).startswith(("http://", "https://")) or str(path_or_uri).endswith(".db"):
            raise ValueError(
                f"{path_or_uri} is a Milvus address, and Milvus comes with a later version; open a folder that "
                "save_pretrained wrote."
            )
        for folder in (Path(path_or_uri), Path(path_or_uri) / "store"):
            if (folder / MANIFEST).is_file():
                return cls._load(folder)
        raise FileNotFoundError(
            f"there is no embedding store in {path_or_uri} ({MANIFEST} is missing); give the folder of a store or of a "
            "trained repository, or make one with `tokenrec train`."
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike,
        subfolder: str = "store",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> EmbeddingStore:
        """Loads the store of a trained repository: a local folder or a Hub repository (only `subfolder` is downloaded).

        Args:
            repo_or_folder: a folder (of a repository, or of a store itself), or the id of a Hub repository.
            subfolder: the folder of the store in the repository.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.
            cache_dir: where downloads are kept; by default the Hub's cache.

        Raises:
            FileNotFoundError: there is no such folder, or no store in it.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        if Path(repo_or_folder).is_dir():
            inside = Path(repo_or_folder) / subfolder
            return cls.open(inside if (inside / MANIFEST).is_file() else repo_or_folder)
        try:
            snapshot = huggingface_hub.snapshot_download(
                str(repo_or_folder),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=f"{subfolder}/*",
            )
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{repo_or_folder} is neither a folder nor the id of a Hub repository; check the path."
            ) from error
        if not (Path(snapshot) / subfolder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"the Hub repository {repo_or_folder} has no {subfolder}/{MANIFEST}; it holds no embedding store, or "
                "not in that subfolder."
            )
        return cls._load(Path(snapshot) / subfolder)

    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder, replacing the store that is there.

        Whoever stops in between leaves the former store whole.

        Args:
            folder: made if absent.
            include_users: whether users' ids, vectors and seen items are written. Without them, those of a former store
                in the folder are removed.
        """
        kinds = KINDS if include_users else ("item",)
        facts = {
            "embedding_dim": self.embedding_dim,
            "space_ids": self.space_ids,
            "counts": {kind: self.count(kind) for kind in kinds},
        }
        save_files(folder, facts, {f"{kind}s": self._arrays(kind) for kind in kinds})

    def push_to_hub(
        self,
        repo_id: str,
        include_users: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload embedding store",
    ) -> huggingface_hub.CommitInfo:
        """Uploads the store to the `store/` folder of a Hub model repository, which is made if absent.

        Args:
            repo_id: `name` or `organisation/name`.
            include_users: whether users' ids, vectors and seen items go up too. They are personal data: left out unless
                asked for, and then those of an earlier upload are removed from the branch.
            private: whether a repository that is made here is private; by default what the organisation prescribes.
            token: Hub token; by default the one that is logged in.
            revision: the branch, made if absent; by default the main one.
            commit_message: the message of the commit.
        """
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_users=include_users)
            return huggingface_hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo="store",
                token=token,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=["users-*.safetensors", "items-*.safetensors"],
            )

    # ---- ids and vectors

    def upsert(self, kind: str, ids: Sequence[str], vectors: torch.Tensor | np.ndarray) -> None:
        """Adds vectors, or replaces those of ids that are present.

        Args:
            kind: `"user"` or `"item"`.
            ids: n ids; of an id that is given twice the last vector counts. New ids are appended in the order given.
            vectors: `[n, embedding_dim]`, any float type; stored as float32, not normalised.

        Raises:
            ValueError: an id or the shape is wrong, or a vector holds NaN or an infinity. Nothing was changed then.
        """
        names = check_ids(_id_list(_check_kind(kind), ids), kind)
        matrix = self._matrix(vectors, f"{kind} vectors", "n")
        if len(names) != len(matrix):
            raise ValueError(
                f"{len(names)} {kind} ids were given with {len(matrix)} vectors; give one vector for each id."
            )
        bad = ~torch.isfinite(matrix).all(dim=1)
        if bad.any():
            name = names[int(bad.nonzero()[0])]
            raise ValueError(
                f"the vector of {kind} {name!r} holds NaN or an infinity; leave {kind} {name!r} out or mend its vector."
            )
        last = {name: position for position, name in enumerate(names)}
        names, matrix = list(last), matrix[list(last.values())]
        rows = self._index[kind].rows(names)
        new = rows < 0
        if new.any():
            self._index[kind] = self._index[kind].extended([names[i] for i in np.flatnonzero(new)], kind)
            self._vectors[kind] = torch.cat([self._vectors[kind], matrix[torch.from_numpy(new)]])
        self._vectors[kind][torch.from_numpy(rows[~new])] = matrix[torch.from_numpy(~new)]
        if kind == "item":
            self._unit_items = None
        else:
            self._seen_indptr = np.append(self._seen_indptr, np.full(new.sum(), self._seen_indptr[-1]))

    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """Removes ids, their vectors, and their part in the seen items; ids that are not present are ignored."""
        rows = self.rows(kind, ids)
        keep = np.ones(self.count(kind), dtype=bool)
        keep[rows[rows >= 0]] = False
        owners = self._seen_owners()
        renumbered = np.cumsum(keep) - 1
        if kind == "user":
            stays = keep[owners]
            self._set_seen_pairs(renumbered[owners[stays]], self._seen_items[stays], int(keep.sum()))
        else:
            stays = keep[self._seen_items]
            self._set_seen_pairs(owners[stays], renumbered[self._seen_items[stays]], self.count("user"))
            self._unit_items = None
        self._index[kind] = self._index[kind].kept(keep)
        self._vectors[kind] = self._vectors[kind][torch.from_numpy(keep)]

    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """The raw vectors of `ids`, float32 `[n, embedding_dim]`, in the order asked.

        Raises:
            KeyError: an id is not in the store.
        """
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            raise KeyError(f"{kind} {ids[int(np.argmax(rows < 0))]!r} is not in the store; add it with upsert.")
        return self._vectors[kind][torch.from_numpy(rows)]

    def rows(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[n]`; -1 where the id is not in the store."""
        return self._index[_check_kind(kind)].rows(_id_list(kind, ids))

    def ids(self, kind: str) -> list[str]:
        """All ids, in row order."""
        return self._index[_check_kind(kind)].ids()

    def count(self, kind: str) -> int:
        """The number of ids."""
        return len(self._index[_check_kind(kind)])

    def vectors(self, kind: str) -> torch.Tensor:
        """All raw vectors, float32 `[count, embedding_dim]`, in row order: the store's own tensor, to be read only."""
        return self._vectors[_check_kind(kind)]

    def check_space(self, kind: str, space_id: str, who: str) -> None:
        """Makes sure that the store belongs to the MQ-Tokenizer that somebody else uses; one not tied yet passes.

        Args:
            kind: `"user"` or `"item"`.
            space_id: the hash of the MQ-Tokenizer that the other side uses.
            who: the other side, for the message, for example `"the tokenizer"`.

        Raises:
            ValueError: the two hashes differ.
        """
        own = self.space_ids[_check_kind(kind)]
        if own not in (None, space_id):
            raise ValueError(
                f"the {kind} vectors of the store belong to MQ-Tokenizer {own} but {who} was made with {space_id}; "
                "load store and tokenizer of the same repository, or make the codes again from this store."
            )

    # ---- seen items

    def set_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Replaces what users have already interacted with.

        Args:
            user_ids: n users of the store; of a user who is given twice the last list counts.
            item_ids_per_user: for each user, ids of items of the store, oldest first; an item may come up again.

        Raises:
            ValueError: a user or an item is not in the store, or the lengths differ. Nothing was changed then.
        """
        users, lengths, items = self._check_seen(user_ids, item_ids_per_user)
        positions = np.arange(len(users))
        last = np.full(self.count("user"), -1)
        last[users] = positions
        counts = np.repeat(last[users] == positions, lengths)
        untouched = np.repeat(last < 0, np.diff(self._seen_indptr))
        self._set_seen_pairs(
            np.concatenate([self._seen_owners()[untouched], np.repeat(users, lengths)[counts]]),
            np.concatenate([self._seen_items[untouched], items[counts]]),
            self.count("user"),
        )

    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Appends to what users have already interacted with; arguments and errors of [`~EmbeddingStore.set_seen`]."""
        users, lengths, items = self._check_seen(user_ids, item_ids_per_user)
        self._set_seen_pairs(
            np.concatenate([self._seen_owners(), np.repeat(users, lengths)]),
            np.concatenate([self._seen_items, items]),
            self.count("user"),
        )

    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """The ids of the items that each user has interacted with, oldest first; an empty list for an unknown user."""
        indptr, items = self.seen_rows(self.rows("user", user_ids))
        names = self._index["item"].ids(items)
        return [names[start:end] for start, end in zip(indptr.tolist(), indptr[1:].tolist())]

    def seen_rows(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What users have seen, as CSR rows.

        Args:
            user_rows: int64 `[n]`; -1 for a user who has seen nothing.

        Returns:
            `(indptr, item_rows)`, int64 `[n + 1]` and int64 `[indptr[-1]]`, oldest first within a user.
        """
        # Row -1 is a valid index for NumPy; what it finds is replaced.
        starts = np.where(user_rows < 0, 0, self._seen_indptr[user_rows])
        ends = np.where(user_rows < 0, 0, self._seen_indptr[np.asarray(user_rows) + 1])
        indptr = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64)
        positions = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], ends - starts)
        return indptr, self._seen_items[positions].astype(np.int64)

    # ---- search

    def search(
        self, queries: torch.Tensor | np.ndarray, top_k: int, exclude: Sequence[Sequence[str]] | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """The items of highest cosine with each query, best first (Eq. 19).

        Args:
            queries: `[B, embedding_dim]`; need not be normalised.
            top_k: how many items to return for each query; fewer come back only where fewer remain.
            exclude: for each query, ids of items that must not be returned; ids that are not in the store are ignored.

        Returns:
            For each query, item ids and their cosines. Items of equal score come in row order; a zero vector scores 0.

        Raises:
            ValueError: `queries` has the wrong shape or holds NaN or an infinity, `top_k` is below 1, or `exclude` has
                not one list for each query.
        """
        matrix = self._matrix(queries, "queries", "B")
        exclude_rows = None
        if exclude is not None:
            lengths = _list_lengths(exclude, len(matrix), "exclude", "query")
            item_rows = self._index["item"].rows(list(chain.from_iterable(exclude)))
            exclude_rows = torch.from_numpy(np.repeat(np.arange(len(matrix)), lengths)), torch.from_numpy(item_rows)
        # Beyond the number of items there is only padding.
        rows, scores = self.search_rows(matrix, min(top_k, max(self.count("item"), 1)), exclude_rows)
        found = (rows >= 0).sum(dim=1).tolist()
        names = iter(self._index["item"].ids(rows[rows >= 0].numpy()))
        ids = [[next(names) for _ in range(count)] for count in found]
        return ids, [row[:count] for row, count in zip(scores.tolist(), found)]

    def search_rows(
        self,
        queries: torch.Tensor | np.ndarray,
        top_k: int,
        exclude_rows: tuple[torch.Tensor | np.ndarray, torch.Tensor | np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`~EmbeddingStore.search`] with rows instead of ids.

        Args:
            queries: `[B, embedding_dim]`.
            top_k: how many items to return for each query.
            exclude_rows: the excluded pairs as two integer vectors of equal length, the number of the query in
                `queries` and the row of the item; an item row of -1 is ignored.

        Returns:
            Item rows, int64 `[B, top_k]`, -1 where none is left, and their cosines, float32 `[B, top_k]`, `-inf` there.
        """
        matrix = self._matrix(queries, "queries", "B")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; ask for at least 1 item.")
        bad = ~torch.isfinite(matrix).all(dim=1)
        if bad.any():
            raise ValueError(
                f"query {int(bad.nonzero()[0])} holds NaN or an infinity; no item can be compared with it."
            )
        query, item = (torch.as_tensor(one, dtype=torch.int64) for one in (exclude_rows or ((), ())))
        if self._unit_items is None:
            self._unit_items = unit_rows(self._vectors["item"])
        return exact_search(unit_rows(matrix), self._unit_items, top_k, query, item)

    # ---- helpers

    def _matrix(self, vectors: torch.Tensor | np.ndarray, what: str, count: str) -> torch.Tensor:
        """`vectors` as a float32 CPU tensor of shape `[count, embedding_dim]`, or a ValueError that names `what`."""
        if isinstance(vectors, torch.Tensor):
            matrix = vectors.detach().to("cpu", torch.float32)
        else:
            matrix = torch.from_numpy(np.array(vectors, dtype=np.float32))
        if matrix.ndim != 2:
            raise ValueError(
                f"{what} have shape {list(matrix.shape)} but the store expects [{count}, {self.embedding_dim}]; pass a "
                "matrix with one row each."
            )
        if matrix.shape[1] != self.embedding_dim:
            raise ValueError(
                f"{what} have {matrix.shape[1]} dimensions but the store holds vectors of {self.embedding_dim}; pass "
                f"vectors of {self.embedding_dim} or make a store with embedding_dim={matrix.shape[1]}."
            )
        return matrix

    def _check_seen(
        self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """User rows `[n]`, lengths of the lists `[n]` and the item rows of all lists one after the other."""
        lengths = _list_lengths(item_ids_per_user, len(user_ids), "item_ids_per_user", "user")
        item_ids = list(chain.from_iterable(item_ids_per_user))
        found = {"user": self.rows("user", user_ids), "item": self.rows("item", item_ids)}
        for kind, ids in (("user", user_ids), ("item", item_ids)):
            missing = found[kind] < 0
            if missing.any():
                name = ids[int(np.argmax(missing))]
                raise ValueError(
                    f"{kind} {name!r} of the seen items is not in the store; add it first with upsert({kind!r}, ...)."
                )
        return found["user"], lengths, found["item"]

    def _seen_owners(self) -> np.ndarray:
        """The user row of each entry of `_seen_items`."""
        return np.repeat(np.arange(len(self._seen_indptr) - 1), np.diff(self._seen_indptr))

    def _set_seen_pairs(self, users: np.ndarray, items: np.ndarray, num_users: int) -> None:
        """Makes (user row, item row) pairs, for each user in order, the seen items."""
        order = np.argsort(users, kind="stable")
        counts = np.bincount(users, minlength=num_users)
        self._seen_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._seen_items = items[order].astype(np.int32)

    def _arrays(self, kind: str) -> dict[str, np.ndarray]:
        """Everything that the store knows of a kind, by the names in its file."""
        arrays = {f"ids.{name}": array for name, array in self._index[kind].arrays().items()}
        arrays["vectors"] = self._vectors[kind].numpy()
        if kind == "user":
            arrays |= {"seen.indptr": self._seen_indptr, "seen.items": self._seen_items}
        return arrays

    @classmethod
    def _load(cls, folder: Path) -> EmbeddingStore:
        facts, arrays = load_files(folder)
        try:
            store = cls(facts["embedding_dim"], facts["space_ids"])
            # Items first: the users' seen items point to their rows.
            for kind in sorted(facts["counts"]):
                store._fill(kind, facts["counts"][kind], arrays[f"{kind}s"])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise damaged(folder / MANIFEST, f"it does not fit its files: {error}") from error
        return store

    def _fill(self, kind: str, count: int, arrays: dict[str, np.ndarray]) -> None:
        """Takes over what `_arrays` gave, after checking that it fits together."""
        vectors = torch.from_numpy(arrays["vectors"])
        index = IdIndex.from_arrays({key[4:]: array for key, array in arrays.items() if key.startswith("ids.")})
        if vectors.dtype != torch.float32 or vectors.shape != (count, self.embedding_dim) or len(index) != count:
            raise ValueError(
                f"there are no {count} float32 {kind} vectors of {self.embedding_dim} dimensions with an id each."
            )
        self._index[_check_kind(kind)], self._vectors[kind] = index, vectors
        if kind == "user":
            indptr, items = arrays["seen.indptr"], arrays["seen.items"]
            if len(indptr) != count + 1 or indptr[-1] != len(items) or items.max(initial=-1) >= self.count("item"):
                raise ValueError("the seen items do not fit the users and items.")
            self._seen_indptr, self._seen_items = indptr, items


def _check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 'user' or 'item'.")
    return kind


def _id_list(kind: str, ids: Sequence[str]) -> Sequence[str]:
    if isinstance(ids, str):
        raise ValueError(f"{kind} ids are the single string {ids[:60]!r}; pass a list of ids.")
    return ids


def _list_lengths(lists: Sequence[Sequence[str]], expected: int, what: str, of: str) -> np.ndarray:
    """The length of each list, int64 `[expected]`; ValueError where there is not one list for each."""
    if len(lists) != expected or str in set(map(type, lists)):
        found = "strings" if len(lists) == expected else f"{len(lists)} lists of item ids"
        raise ValueError(f"{what} holds {found}; pass one list of item ids for each {of}, {expected} in all.")
    return np.fromiter(map(len, lists), dtype=np.int64, count=expected)
