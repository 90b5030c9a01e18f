"""Recommending by ONNX Runtime, compiled, and in other number formats.

A ratio below 1 says that the other one is faster. The first calls of a compiled model, which take a minute for every new length
of prompts, are not counted. Weights, codes and histories are random.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from measure import Row, compare
from recommending import untrained
from torch import nn

from tokenrec_hf import Recommender, T5ForGenerativeRetrieval, export_onnx, use_onnx

HISTORY = 31
SMALL = {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": 6}


def rows() -> list[Row]:
    """A user and 16 users at once, with the sizes of recipe `best` and of T5-small."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sizes: dict[str, Mapping[str, int]] = {"recipe best": {}, "T5-small": SMALL}
    return [row for name, changed in sizes.items() for row in engines(name, untrained(HISTORY, **changed))]


def engines(name: str, recommender: Recommender) -> list[Row]:
    """The rows of one size."""
    model, found = recommender.model, []
    int8 = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    compiled = copy.deepcopy(model)
    compiled.history_query = torch.compile(compiled.history_query)  # type: ignore[method-assign]
    models = {"bfloat16": copy.deepcopy(model).bfloat16(), "int8, dynamic": int8, "torch.compile": compiled}
    peers = {peer: beside(recommender, other) for peer, other in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        export_onnx(model, path)
        peers["ONNX Runtime"] = use_onnx(beside(recommender, copy.deepcopy(model)), path)
    for batch in (1, 16):
        users = recommender.store.ids("user")[:batch]
        for peer, other in peers.items():
            what = f"recommend, sizes of {name}, {batch} at once"
            found.append(compare(what, partial(recommender.recommend, users), peer, partial(other.recommend, users)))
    return found


def beside(recommender: Recommender, model: T5ForGenerativeRetrieval) -> Recommender:
    """The recommender with another model of the same weights."""
    return Recommender(model, recommender.tokenizer, recommender.store)
