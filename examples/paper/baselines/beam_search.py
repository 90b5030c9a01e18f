"""Beam search over valid item ids: the ids as a trie of arrays, all users and beams at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


class IdTrie:
    """Item ids as a trie. Node 0 is the root, an id ends in a leaf, and symbol 0 leads from a leaf to itself.

    Args:
        codes: the ids, int64 `[num_items, L]`; shorter ids are padded with -1.

    Raises:
        ValueError: two ids are equal, or an id is a prefix of another.
    """

    def __init__(self, codes: np.ndarray):
        num_items, self.depth = codes.shape
        self.num_symbols = int(codes.max()) + 1
        # The node of each item's id after 0..L symbols.
        paths, tables, count = [np.zeros(num_items, dtype=np.int64)], [], 1
        for symbols in codes.T:
            going = symbols >= 0
            edges, inverse = np.unique(paths[-1][going] * self.num_symbols + symbols[going], return_inverse=True)
            node = paths[-1].copy()
            node[going] = count + inverse
            tables.append(
                np.stack([edges // self.num_symbols, edges % self.num_symbols, count + np.arange(len(edges))])
            )
            paths.append(node)
            count += len(edges)
        leaves = paths[-1]
        children = np.full((count, self.num_symbols), -1)
        parents, symbols, nodes = np.concatenate(tables, axis=1)
        children[parents, symbols] = nodes
        if len(np.unique(leaves)) < num_items or (children[leaves] >= 0).any():
            raise ValueError(
                "item ids must be unique and none a prefix of another, but two are equal or one is a prefix."
            )
        children[leaves, 0] = leaves
        self.paths = np.stack(paths[1:], axis=1)  # [num_items, L]
        self.children = torch.from_numpy(children)  # [num_nodes, num_symbols], -1 for no child
        self.items = torch.full((count,), -1)  # [num_nodes], -1 except at leaves
        self.items[leaves] = torch.arange(num_items)
        # Items below each node; the leaf of a short id counts more than once.
        self.sizes = np.bincount(self.paths.ravel(), minlength=count)

    def to(self, device: torch.device) -> IdTrie:
        """Moves the arrays of the search to `device` and returns the trie."""
        self.children, self.items = self.children.to(device), self.items.to(device)
        return self

    def open_nodes(self, num_rows: int, rows: np.ndarray, items: np.ndarray) -> torch.Tensor:
        """Mask of the nodes that lead to an allowed item, bool `[num_rows, num_nodes]`.

        Args:
            num_rows: number of rows B.
            rows, items: pairs of a row and an item that the row excludes.
        """
        rows, items = np.divmod(np.unique(rows * len(self.paths) + items), len(self.paths))
        nodes = rows[:, None] * len(self.sizes) + self.paths[items]
        gone = np.bincount(nodes.ravel(), minlength=num_rows * len(self.sizes)).reshape(num_rows, -1)
        return torch.from_numpy(gone < self.sizes).to(self.items.device)


def beam_search(
    next_log_probs: Callable[[torch.Tensor], torch.Tensor], trie: IdTrie, open_nodes: torch.Tensor, beams: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items with the most probable ids. Exact if there are as many beams as items.

    Args:
        next_log_probs: log-probabilities of the symbol after each prefix, int64 `[B, W, t]` to float `[B, W, num_symbols]`.
        trie: the ids.
        open_nodes: see [`IdTrie.open_nodes`].
        beams: prefixes kept at each step.

    Returns:
        Items, int64 `[B, W]`, best first, and the log-probabilities of their ids; -1 and `-inf` if no item is left.
    """
    rows = len(open_nodes)
    nodes, prefixes = (torch.zeros(rows, 1, *shape, dtype=torch.long, device=open_nodes.device) for shape in ((), (0,)))
    totals = torch.zeros(rows, 1, device=open_nodes.device)
    for _ in range(trie.depth):
        following = trie.children[nodes]  # [B, W, num_symbols]
        flat = following.clamp(min=0).flatten(1)  # [B, W * num_symbols]
        allowed = (following.flatten(1) >= 0) & open_nodes.gather(1, flat)
        ended = (trie.items[nodes] >= 0)[..., None]
        candidates = totals[..., None] + next_log_probs(prefixes).masked_fill(ended, 0.0)
        candidates = candidates.flatten(1).masked_fill(~allowed, -torch.inf)
        totals, best = candidates.topk(min(beams, candidates.shape[1]))  # [B, W]
        nodes = flat.gather(1, best)
        beam, symbol = best // trie.num_symbols, best % trie.num_symbols
        prefixes = torch.cat([prefixes.take_along_dim(beam[..., None], 1), symbol[..., None]], dim=2)
    return trie.items[nodes].masked_fill(totals == -torch.inf, -1), totals
