"""TokenRec for the Hugging Face stack: users and items as tokens of T5, recommendations by vector retrieval.

Importing the package costs next to nothing: names are loaded when they are used, and `AutoConfig`, `AutoModel`,
`AutoTokenizer` and `pipeline` learn the *names* of the classes here as soon as their modules are imported, not before.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import types

from .store import open_store as open_store

__version__ = "0.1.0"

_MODULES = {
    "data.interactions": ("load_interactions",),
    "data.splits": ("leave_one_out",),
    "data.interaction_matrix": ("InteractionMatrix",),
    "data.collator": ("DataCollatorForGenerativeRetrieval", "PromptDataset"),
    "models.configuration_tokenrec": (
        "FISMConfig",
        "LightGCNConfig",
        "MatrixFactorizationConfig",
        "MQTokenizerConfig",
        "T5GenerativeRetrievalConfig",
    ),
    "models.modeling_collaborative": ("FISMModel", "HistoryEncoder", "LightGCNModel", "MatrixFactorizationModel"),
    "models.embedding_store": ("EmbeddingStore", "Store"),
    "models.modeling_mq_tokenizer": ("MQTokenizerModel",),
    "models.tokenization_tokenrec": ("TokenRecTokenizer",),
    "models.prompts": ("PromptTemplate", "SEEN_TEMPLATES", "UNSEEN_TEMPLATE", "render"),
    "models.modeling_t5_retrieval": ("T5ForGenerativeRetrieval",),
    "models.recommender": ("Recommender",),
    "models.pipeline_generative_retrieval": ("GenerativeRetrievalPipeline",),
    "evaluation.metrics": ("RankingMetrics", "evaluate_embeddings"),
    "training.recipe": ("Recipe", "load_recipe"),
    "training.stages": ("SetEpoch",),
    "store.faiss": ("FaissStore",),
    "store.milvus": ("MilvusStore",),
    "repository.update": ("NewVectors", "add_to_repository", "read_vectors", "remove_from_repository"),
    "repository.build": ("train",),
    "repository.repository": ("Repository",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted([*_HOME, "open_store"])

# model_type -> (configuration, model, tokenizer or None)
_AUTO = {
    "t5_generative_retrieval": ("T5GenerativeRetrievalConfig", "T5ForGenerativeRetrieval", "TokenRecTokenizer"),
    "tokenrec_mq_tokenizer": ("MQTokenizerConfig", "MQTokenizerModel", None),
    "tokenrec_lightgcn": ("LightGCNConfig", "LightGCNModel", None),
    "tokenrec_fism": ("FISMConfig", "FISMModel", None),
    "tokenrec_matrix_factorization": ("MatrixFactorizationConfig", "MatrixFactorizationModel", None),
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module("." + _HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])


def _register_configs(module) -> None:
    for model_type, (config, _, _) in _AUTO.items():
        module.CONFIG_MAPPING_NAMES[model_type] = config
        module.CONFIG_MAPPING._mapping.setdefault(model_type, config)


def _register_models(module) -> None:
    for model_type, (config, model, _) in _AUTO.items():
        module.MODEL_MAPPING_NAMES[model_type] = model
        module.MODEL_MAPPING._reverse_config_mapping[config] = model_type


def _register_tokenizers(module) -> None:
    for model_type, (config, _, tokenizer) in _AUTO.items():
        if tokenizer is not None:
            module.TOKENIZER_MAPPING_NAMES[model_type] = tokenizer
            module.TOKENIZER_MAPPING._reverse_config_mapping[config] = model_type


def _register_pipeline(module) -> None:
    module.PIPELINE_REGISTRY.supported_tasks["generative-retrieval"] = {
        "impl": f"{__name__}.models.pipeline_generative_retrieval.GenerativeRetrievalPipeline",
        "pt": (module.AutoModel,),
        "type": "text",
    }


_REGISTER = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizers,
    "transformers.pipelines": _register_pipeline,
}


class _AutoFinder(importlib.abc.MetaPathFinder):
    """Registers the names right after transformers' modules have been imported by whoever needs them."""

    _busy: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _REGISTER or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _REGISTER[name](module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _install() -> None:
    # transformers looks a model type's classes up as attributes of `transformers.models.<model_type>`.
    for model_type in _AUTO:
        alias = types.ModuleType(f"transformers.models.{model_type}")
        alias.__dict__.update(__getattr__=__getattr__, __file__=__file__, __path__=[])
        sys.modules.setdefault(alias.__name__, alias)
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
    sys.meta_path.insert(0, _AutoFinder())


_install()
