"""TokenRec for the Hugging Face stack: users and items as tokens of T5, recommendations by vector retrieval.

Importing the package is cheap: public names are imported when they are used, and the classes are registered with `AutoConfig`,
`AutoModel`, `AutoTokenizer` and `pipeline` when transformers is imported, before or after.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt import when_imported

__version__ = "0.1.0"

_NAMES = {
    "data.interactions": ("load_interactions",),
    "data.splits": ("leave_one_out", "temporal_split"),
    "data.interaction_matrix": ("InteractionMatrix",),
    "data.collator": ("DataCollatorForGenerativeRetrieval", "PromptDataset"),
    "models.configuration_tokenrec": (
        "FISMConfig",
        "LightGCNConfig",
        "MatrixFactorizationConfig",
        "MQTokenizerConfig",
        "T5GenerativeRetrievalConfig",
    ),
    "models.modeling_collaborative": ("CollaborativeModel", "FISMModel", "LightGCNModel", "MatrixFactorizationModel"),
    "models.embedding_store": ("EmbeddingStore", "Store"),
    "models.modeling_mq_tokenizer": ("MQTokenizerModel",),
    "models.tokenization_tokenrec": ("TokenRecTokenizer",),
    "models.prompts": ("PromptTemplate", "SEEN_TEMPLATES", "UNSEEN_TEMPLATE", "render"),
    "models.modeling_t5_retrieval": ("T5ForGenerativeRetrieval",),
    "models.recommender": ("Recommender",),
    "models.pipeline_generative_retrieval": ("GenerativeRetrievalPipeline",),
    "evaluation.metrics": ("RankingMetrics", "evaluate_embeddings"),
    "training.initialization": ("build_tokenizer",),
    "training.recipe": ("Recipe",),
    "training.stages": ("SetEpoch",),
    "store.engines": ("open_store",),
    "store.faiss": ("FaissStore",),
    "store.milvus": ("MilvusStore",),
    "repository.reranking": ("rerank",),
    "repository.onnx": ("export_onnx", "use_onnx"),
    "repository.update": ("NewVectors", "read_vectors"),
    "repository.build": ("train",),
    "repository.repository": ("Repository",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_classes() -> None:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from .models.configuration_tokenrec import T5GenerativeRetrievalConfig
    from .models.modeling_collaborative import COLLABORATIVE_MODELS
    from .models.modeling_mq_tokenizer import MQTokenizerModel
    from .models.modeling_t5_retrieval import T5ForGenerativeRetrieval
    from .models.tokenization_tokenrec import TokenRecTokenizer

    models: list[Any] = [*COLLABORATIVE_MODELS.values(), MQTokenizerModel, T5ForGenerativeRetrieval]
    for model in models:
        AutoConfig.register(model.config_class.model_type, model.config_class)
        AutoModel.register(model.config_class, model)
    AutoTokenizer.register(T5GenerativeRetrievalConfig, TokenRecTokenizer)


def _register_pipeline() -> None:
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .models.pipeline_generative_retrieval import GenerativeRetrievalPipeline

    PIPELINE_REGISTRY.register_pipeline(
        "generative-retrieval", pipeline_class=GenerativeRetrievalPipeline, pt_model=AutoModel, type="text"
    )


def _once_imported(register: Callable[[], None], module_name: str) -> None:
    """Calls `register` once, when a module of transformers is imported and none of our own modules is half imported."""
    own = {f"{__name__}.{name}" for name in _NAMES if name.startswith("models.")}
    complete: set[str] = set()
    done = False

    def imported(module: ModuleType) -> None:
        nonlocal done
        complete.add(module.__name__)
        # Our modules import transformers, so the first of them may be half imported when that is done.
        if not done and module_name in complete and own & set(sys.modules) <= complete:
            done = True
            register()

    for name in (module_name, *own):
        when_imported(name)(imported)


# Not when an Auto class is imported: transformers imports those in the middle of modules that our classes need, among them
# `modeling_layers` and `configuration_t5`. Nothing of it is half imported when `import transformers` itself ends.
_once_imported(_register_classes, "transformers")
_once_imported(_register_pipeline, "transformers.pipelines")
