"""Vectors by row, in blocks: adding rows copies no others, and a memory-mapped file serves as the first block.

The parts of an embedding store that know rows only: the vectors themselves, what users have seen, and what is known
about items.
"""

from __future__ import annotations

import torch

from .exact_search import ITEM_CHUNK, inverse_lengths


class VectorTable:
    """Raw vectors, one a row.

    Args:
        vectors: float32 `[n, d]`, taken over, not copied; changes are made in it.
    """

    def __init__(self, vectors: torch.Tensor):
        self._blocks = [vectors]
        self._inverse: list[torch.Tensor | None] = [None]

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def all(self) -> torch.Tensor:
        """All vectors `[n, d]`: the table's own memory, to be read only."""
        if len(self._blocks) > 1:
            self._blocks, self._inverse = [torch.cat(self._blocks)], [None]
        return self._blocks[0]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The vectors at `rows` `[m]`, as new memory `[m, d]`."""
        taken = self._blocks[0].new_empty(len(rows), self._blocks[0].shape[1])
        for block, _, chosen, inside in self._located(rows):
            taken[chosen] = block[inside]
        return taken

    def put(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        """Replaces the vectors at `rows` `[m]`, each given once, by `vectors` `[m, d]`."""
        for block, number, chosen, inside in self._located(rows):
            block[inside] = vectors[chosen]
            inverse = self._inverse[number]
            if inverse is not None:
                inverse[inside] = inverse_lengths(vectors[chosen])

    def append(self, vectors: torch.Tensor) -> None:
        """Adds rows `[m, d]`, taken over, at the end."""
        # Blocks shrink by halves, so n rows were copied log(n) times at most however they came.
        while len(self._blocks) > 1 and len(self._blocks[-1]) < 2 * len(vectors) or not len(self._blocks[-1]):
            vectors = torch.cat([self._blocks.pop(), vectors])
            self._inverse.pop()
            if not self._blocks:
                break
        self._blocks.append(vectors)
        self._inverse.append(None)

    def keep(self, mask: torch.Tensor) -> None:
        """Removes the rows where boolean `mask` `[n]` is false and closes the gaps, within the memory that is there."""
        start = 0
        for number, block in enumerate(self._blocks):
            inside = mask[start : start + len(block)]
            start += len(block)
            filled = 0
            for chunk, chosen in zip(block.split(ITEM_CHUNK), inside.split(ITEM_CHUNK)):
                kept = chunk[chosen]
                block[filled : filled + len(kept)] = kept
                filled += len(kept)
            inverse = self._inverse[number]
            self._blocks[number] = block[:filled]
            self._inverse[number] = None if inverse is None else inverse[inside]

    def chunks(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of all vectors in row order, at most `[ITEM_CHUNK, d]` each, with their inverse lengths."""
        found = []
        for number, block in enumerate(self._blocks):
            inverse = self._inverse[number]
            if inverse is None:
                inverse = self._inverse[number] = inverse_lengths(block)
            if len(block):
                found += list(zip(block.split(ITEM_CHUNK), inverse.split(ITEM_CHUNK)))
        return found

    def _located(self, rows: torch.Tensor):
        """For each block that holds some of `rows`: the block, its number, which of `rows`, and where in the block."""
        start = 0
        for number, block in enumerate(self._blocks):
            chosen = ((rows >= start) & (rows < start + len(block))).nonzero()[:, 0]
            if len(chosen):
                yield block, number, chosen, rows[chosen] - start
            start += len(block)
