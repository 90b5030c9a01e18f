"""Queries by ONNX Runtime: T5's part of a request as a graph in one file, and a recommender that asks it.

The graph computes [`~T5ForGenerativeRetrieval.history_query`]. Prompts are taken apart and items are searched as before, so that a
recommender with a graph gives the same recommendations, in less time for one user. The file also serves programs that have
no PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.codes import atomic_write
from ..models.modeling_t5_retrieval import HistoryPrompts, T5ForGenerativeRetrieval
from ..models.recommender import Recommender

NEEDED = 'ONNX graphs need three packages: pip install "tokenrec-hf[onnx]".'
# The key of the weights' hash in a file's metadata.
WEIGHTS = "tokenrec_weights"


class _Graph(nn.Module):
    def __init__(self, model: T5ForGenerativeRetrieval):
        super().__init__()
        self.model = model

    def forward(self, *prompts: torch.Tensor) -> torch.Tensor:
        return self.model.history_query(HistoryPrompts(*prompts))


def export_onnx(model: T5ForGenerativeRetrieval, path: str | os.PathLike) -> None:
    """Writes [`~T5ForGenerativeRetrieval.history_query`] as an ONNX graph.

    Inputs are the fields of [`HistoryPrompts`], of any number and length of prompts; the output is `query`, `[B, query_dim]`.

    Args:
        model: with `"history"` pooling; its weights are copied into the file.
        path: the file.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: the model has another pooling.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(NEEDED) from None
    _check_pooling(model)
    kind, any_size = model.config.entity_tokens["item"], torch.export.Dim.DYNAMIC  # type: ignore[index]
    # Sizes from 2, because a size of 1 would be taken for a constant.
    example = HistoryPrompts(
        wordings=torch.zeros(2, 5, dtype=torch.int64),
        which=torch.tensor([0, 1, 1]),
        tokens=torch.full((3, 4, kind["num_codebooks"]), kind["first"]),
        present=torch.ones(3, 4, dtype=torch.bool),
        users=torch.zeros(3, model.config.embedding_dim),
    )
    free = [
        {0: any_size, 1: any_size},
        {0: any_size},
        {0: any_size, 1: any_size},
        {0: any_size, 1: any_size},
        {0: any_size},
    ]
    was_training = model.training
    try:
        # The exporter warns of what is none of the reader's business.
        with torch.no_grad(), warnings.catch_warnings(), atomic_write(path) as temporary:
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Graph(model.eval()),
                tuple(part.to(model.device) for part in example),
                dynamo=True,
                dynamic_shapes=(tuple(free),),
                input_names=list(HistoryPrompts._fields),
                output_names=["query"],
                verbose=False,
            )
            graph = program.model_proto  # type: ignore[union-attr]
            onnx.helper.set_model_props(graph, {WEIGHTS: weights_hash(model)})
            onnx.save(graph, str(temporary))
    finally:
        model.train(was_training)


def use_onnx(recommender: Recommender, path: str | os.PathLike) -> Recommender:
    """Lets a graph answer a recommender's requests of few items, with as many threads as PyTorch.

    Args:
        recommender: changed in place, and returned.
        path: a file of [`export_onnx`].

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the extra `onnx` is not installed.
        ValueError: the file is damaged, or was made from another model.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(NEEDED) from None
    _check_pooling(recommender.model)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no ONNX graph {path}; make it with `tokenrec export`.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen kinds, of which none is public.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no ONNX graph that can be read ({reason}); make it anew.") from None
    if session.get_modelmeta().custom_metadata_map.get(WEIGHTS) != weights_hash(recommender.model):
        raise ValueError(f"{path} was not made from this model; make it anew with `tokenrec export`.")
    recommender.model.runtime = _runtime(session)
    return recommender


def _runtime(session: Any) -> Callable[[HistoryPrompts], torch.Tensor]:
    def query(prompts: HistoryPrompts) -> torch.Tensor:
        inputs = {name: part.cpu().numpy() for name, part in prompts._asdict().items()}
        return torch.from_numpy(session.run(None, inputs)[0]).to(prompts.users.device)

    return query


def weights_hash(model: T5ForGenerativeRetrieval) -> str:
    """A hash of what the graph depends on: the weights and the configuration's factors of a query."""
    digest = hashlib.sha256(f"{model.config.temperature} {model.config.history_weight}".encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_pooling(model: T5ForGenerativeRetrieval) -> None:
    if model.config.pooling != "history":
        raise ValueError(
            f"only a model with history pooling has an ONNX graph, but this one has {model.config.pooling} pooling; train with the "
            "recipe best."
        )
