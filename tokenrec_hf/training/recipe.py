"""Recipes: all settings of a training run, typed, and read and checked once from YAML and the command line.

A recipe has a section for each stage. The four that ship with the package (`paper`, `best`, `cpu`, and the demo's
`quickstart`) are complete; a file of your own needs only the settings that differ.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from ..models.configuration_tokenrec import CollaborativeConfig, MQTokenizerConfig

RECIPES = ("paper", "best", "cpu", "quickstart")
AUTO = "auto"
_FOLDER = Path(__file__).parents[1] / "assets" / "recipes"
# Sections whose keys are those of a configuration class or of TrainingArguments.
_OPEN = ("config", "training")

# A value of a field of another class, which knows its type and checks it.
Setting = Any


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Stage(_Section):
    """A stage that `Trainer` runs.

    Args:
        config: fields of the model's configuration.
        training: fields of transformers' `TrainingArguments`.
        evaluate_every: epochs between two evaluations (steps, for MQ-Tokenizers).
    """

    config: dict[str, Setting]
    training: dict[str, Setting]
    evaluate_every: int = Field(ge=1)


class _SelectedStage(_Stage):
    """A stage whose length is chosen on validation.

    Args:
        patience: evaluations without a better NDCG@20 after which training stops.
        most_steps: the most training steps, where the epochs of `training` would take more.
    """

    patience: int = Field(ge=1)
    most_steps: int | None = Field(ge=1)


class CollaborativeSettings(_SelectedStage):
    """Step 0, see [`_SelectedStage`].

    Args:
        model: kind of the collaborative model.
        num_negatives: items without an interaction that are drawn for each interaction.
        augment_norm: add the dimension that makes cosine rank as the dot product does.
    """

    model: Literal["lightgcn", "matrix_factorization", "fism"]
    num_negatives: int = Field(ge=0)
    augment_norm: bool

    def model_configuration(self, **chosen: Setting) -> CollaborativeConfig:
        """The configuration of the model; `chosen` replaces fields, those that are `auto` among them.

        Recipes describe LightGCN; other kinds of models take the fields that they have.
        """
        from ..models.modeling_collaborative import COLLABORATIVE_MODELS

        kind = COLLABORATIVE_MODELS[self.model].config_class
        known = kind().to_dict()
        fields = {name: value for name, value in self.config.items() if name in known and value != AUTO}
        return kind(**{**fields, **chosen})


class MQTokenizerSettings(_Stage):
    """Step 1, see [`_Stage`].

    Args:
        user_codebooks: K of users, where it is not that of items.
    """

    user_codebooks: int | None = Field(ge=1)

    def model_configuration(self, kind: str, embedding_dim: int, num_vectors: int) -> MQTokenizerConfig:
        """The configuration of the MQ-Tokenizer of `"user"` or `"item"`.

        A `codebook_size` of `auto` is 256 for up to 10,000 vectors and 512 for more, the paper's choices for small and large
        data.
        """
        from ..models.configuration_tokenrec import MQTokenizerConfig

        fields = {**self.config, "embedding_dim": embedding_dim}
        if fields.get("codebook_size") == AUTO:
            fields["codebook_size"] = 256 if num_vectors <= 10_000 else 512
        if kind == "user" and self.user_codebooks is not None:
            fields["num_codebooks"] = self.user_codebooks
        return MQTokenizerConfig(**fields)


class PromptSettings(_Section):
    """The prompts of step 2.

    Args:
        max_length: tokens of the longest prompt.
        max_history: items of the longest history; `auto`: 100, or four half-lives.
        train_history: items of the longest history while training.
        targets_per_prompt: the most items to retrieve for a training prompt.
        history_only: share of training prompts that name no user.
        shuffle_history: random order of a history; `auto`: unless a `half_life` says that order counts.
    """

    max_length: int = Field(ge=1)
    max_history: int | Literal["auto"]
    train_history: int = Field(ge=1)
    targets_per_prompt: int = Field(ge=1)
    history_only: float = Field(ge=0, le=1, strict=False)
    shuffle_history: bool | Literal["auto"]


class RetrievalSettings(_SelectedStage):
    """Step 2, see [`_SelectedStage`].

    Args:
        backbone: folder or Hub name of a T5 checkpoint; None trains the T5 that `config` describes from scratch.
        vocabulary: a T5 tokenizer or `spiece.model`; None takes the backbone's, or the small one of the package.
        num_negatives: competitors of a sampled softmax for each prompt; 0 lets all items compete.
    """

    backbone: str | None
    vocabulary: str | None
    num_negatives: int = Field(ge=0)

    @property
    def loss_type(self) -> str:
        """`cosine_ranking` (Eq. 20) or `softmax`."""
        from ..models.configuration_tokenrec import T5GenerativeRetrievalConfig

        return str(self.config.get("loss_type", T5GenerativeRetrievalConfig.loss_type))


class Recipe(_Section):
    """All settings of a training run; see the files in `tokenrec_hf/assets/recipes` for the meaning of each.

    Args:
        recipe: the name of the recipe that it began as.
        seed: of everything random.
        collaborative, mq_tokenizer, prompts, retrieval: the sections.

    Example:
        >>> recipe = Recipe.load("best", overrides={"seed": 1})
        >>> recipe.collaborative.model
        'fism'
    """

    recipe: Literal["paper", "best", "cpu", "quickstart"]
    seed: int
    collaborative: CollaborativeSettings
    mq_tokenizer: MQTokenizerSettings
    prompts: PromptSettings
    retrieval: RetrievalSettings

    @classmethod
    def load(
        cls, name: str = "cpu", config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Recipe:
        """A complete recipe, checked.

        Args:
            name: one of `paper`, `best`, `cpu`, `quickstart`.
            config: a YAML file whose entries replace those of the named recipe; its own `recipe:` entry overrides `name`.
            overrides: single settings by dotted name, e.g. `{"retrieval.config.loss_type": "cosine_ranking"}`.

        Raises:
            ValueError: an unknown recipe, an unknown or impossible setting, or a file that is no YAML mapping.
            FileNotFoundError: `config` does not exist.
        """
        changes = _read(Path(config)) if config is not None else {}
        name = changes.get("recipe", name)
        if name not in RECIPES:
            raise ValueError(
                f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)} or pass a file with --config."
            )
        settings = _read(_FOLDER / f"{name}.yaml")
        _merge(settings, changes, str(config))
        for dotted, value in (overrides or {}).items():
            nested: Any = value
            for part in reversed(dotted.split(".")):
                nested = {part: nested}
            _merge(settings, nested, f"setting {dotted}")
        return cls.from_dict(settings)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe of complete settings, as `to_dict` gives them.

        Raises:
            ValueError: an unknown or impossible setting; the message gives its dotted name.
        """
        try:
            recipe = cls.model_validate(copy.deepcopy(dict(settings)))
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            place = ".".join(map(str, found["loc"][: 2 if found["loc"][0] != "seed" else 1]))
            raise ValueError(f"{place} is {found['input']!r}: {_lower(found['msg'])}.") from None
        _check_models(recipe)
        _check_combinations(recipe)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return self.model_dump()

    def changed(self, **overrides: Any) -> Recipe:
        """A recipe with settings replaced, by dotted name: `recipe.changed(**{"prompts.max_history": 32})`."""
        settings = self.to_dict()
        for dotted, value in overrides.items():
            *path, last = dotted.split(".")
            place = settings
            for part in path:
                place = place[part]
            place[last] = value
        return Recipe.from_dict(settings)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the recipe, whole or not at all; `Recipe.load(config=path)` gives it back."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number; for YAML 1.1 it is text, because it has no point."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}; check --config.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines; see a recipe.yaml that training wrote.")
    return content


def _merge(recipe: dict[str, Any], changes: Mapping[str, Any], origin: str, path: Sequence[str] = ()) -> None:
    for key, value in changes.items():
        place = ".".join([*path, str(key)])
        is_open = bool(path) and path[-1] in _OPEN
        if key not in recipe and not is_open:
            raise ValueError(f"{origin}: there is no setting {place!r}; here there are {', '.join(recipe)}.")
        if isinstance(recipe.get(key), dict):
            if not isinstance(value, Mapping):
                raise ValueError(f"{origin}: {place} is a section with settings of its own, not a value.")
            _merge(recipe[key], value, origin, [*path, key])
        else:
            recipe[key] = copy.deepcopy(value)


def _check_models(recipe: Recipe) -> None:
    """Refuses names and values that the models' configurations or `TrainingArguments` do not take."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import TrainingArguments

    from ..models.configuration_tokenrec import MQTokenizerConfig, T5GenerativeRetrievalConfig
    from ..models.modeling_collaborative import COLLABORATIVE_MODELS

    kind = COLLABORATIVE_MODELS[recipe.collaborative.model].config_class
    # A setting of another kind of model may stay in the recipe when the model is changed.
    others = {name for other in COLLABORATIVE_MODELS.values() for name in other.config_class().to_dict()}
    others -= set(kind().to_dict())
    stages: dict[str, tuple[_Stage, Any]] = {
        "collaborative": (recipe.collaborative, kind),
        "mq_tokenizer": (recipe.mq_tokenizer, MQTokenizerConfig),
        "retrieval": (recipe.retrieval, T5GenerativeRetrievalConfig),
    }
    for section, (stage, config_class) in stages.items():
        fields = {name: value for name, value in stage.config.items() if value != AUTO and name not in others}
        for place, values, make in (
            ("config", fields, config_class),
            ("training", stage.training, partial(TrainingArguments, output_dir="unused")),
        ):
            usual = make()
            for name, value in values.items():
                dotted = f"{section}.{place}.{name}"
                if not hasattr(usual, name):
                    raise ValueError(f"there is no setting {dotted!r}; {type(usual).__name__} has no such field.")
                default = getattr(usual, name)
                if isinstance(default, (int, float)) and not isinstance(default, bool) and isinstance(value, str):
                    raise ValueError(f"{dotted} is {value!r} but must be a number.")
            try:
                make(**values)
            except (ValueError, StrictDataclassError) as error:
                raise ValueError(f"{section}.{place}: {error}") from None
        if stage.training["per_device_train_batch_size"] < 1:
            raise ValueError(f"{section}.training.per_device_train_batch_size must be at least 1.")


def _check_combinations(recipe: Recipe) -> None:
    """Refuses settings that contradict each other across sections."""
    if recipe.collaborative.model == "fism" and recipe.collaborative.augment_norm:
        raise ValueError(
            "collaborative.augment_norm does nothing for fism, whose items all have the same length; set it to false."
        )
    if recipe.retrieval.config.get("user_shortcut") and not recipe.mq_tokenizer.config.get("residual"):
        raise ValueError(
            "retrieval.config.user_shortcut needs mq_tokenizer.config.residual=true: only such codewords add up."
        )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def load_recipe(
    name: str = "cpu", config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """TEMPORARY: `Recipe.load` as a dict, until all callers take a [`Recipe`]."""
    return Recipe.load(name, config, overrides).to_dict()


def save_recipe(recipe: Mapping[str, Any], path: Path) -> None:
    """TEMPORARY: see `load_recipe`."""
    Recipe.from_dict(recipe).save(path)
