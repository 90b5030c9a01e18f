"""Recipes: the typed settings of a training run, read and validated once from YAML and the command line.

A recipe has a section for each stage. The three recipes of the package (`paper`, `best`, and `quickstart` for the demo)
are complete; a user's file needs only the settings that differ. Fields of the models' configurations and of transformers'
`TrainingArguments` keep their names and are validated by these classes.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..models.codes import atomic_write

if TYPE_CHECKING:
    from ..models.configuration_tokenrec import CollaborativeConfig, MQTokenizerConfig

RECIPES = ("paper", "best", "quickstart")
AUTO = "auto"
# Items up to which all compete in a softmax, and the number that a batch draws above, where `num_negatives` is `auto`.
ALL_COMPETE, COMPETITORS = 10_000, 2_048
# The largest residual codebook of items whose size is `auto`; the time of k-means grows with it.
MOST_CODEWORDS = 4096
_FOLDER = Path(__file__).parents[1] / "assets" / "recipes"
# Sections with the fields of a configuration class or of TrainingArguments.
_OPEN = ("config", "training")

# The value of a field of another class, which knows its type.
Setting = Any
Positive = Annotated[int, Field(ge=1)]


class SettingError(ValueError):
    """A setting that does not exist or has an impossible value.

    Args:
        setting: its dotted name.
        message: the sentence that says so.
    """

    def __init__(self, setting: str, message: str):
        super().__init__(message)
        self.setting = setting


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StageSettings(_Section):
    """A stage that `Trainer` runs.

    Args:
        config: fields of the model's configuration.
        training: fields of transformers' `TrainingArguments`.
        evaluate_every: epochs between two evaluations (steps, for MQ-Tokenizers).
    """

    config: dict[str, Setting]
    training: dict[str, Setting]
    evaluate_every: Annotated[int | float, Field(gt=0)]


class SelectedStageSettings(StageSettings):
    """A stage whose length is chosen on validation.

    Args:
        patience: evaluations without a better NDCG@20 after which training stops.
        most_steps: the largest number of training steps; limits the epochs of `training`.
        num_negatives: items without an interaction that are drawn for each example; those of a batch compete in a softmax. With 0
            all items compete. `auto`: 0 for up to `ALL_COMPETE` items, and `COMPETITORS` a batch for more.
    """

    patience: Positive
    most_steps: Positive | None
    num_negatives: Annotated[int, Field(ge=0)] | Literal["auto"]

    def negatives(self, num_items: int) -> int:
        """`num_negatives` where there are as many items."""
        if isinstance(self.num_negatives, int):
            return self.num_negatives
        return 0 if num_items <= ALL_COMPETE else max(1, COMPETITORS // self.training["per_device_train_batch_size"])


class CollaborativeSettings(SelectedStageSettings):
    """Step 0, see [`SelectedStageSettings`].

    Args:
        model: the kind of collaborative model.
    """

    model: Literal["lightgcn", "matrix_factorization", "fism"]

    def model_configuration(self) -> CollaborativeConfig:
        """The configuration of the model, with the fields that this kind of model has and that are not `auto`."""
        config_class = _collaborative_configs()[self.model]
        known = config_class().to_dict()
        return config_class(**{name: value for name, value in self.config.items() if name in known and value != AUTO})

    @property
    def chooses_half_life(self) -> bool:
        """Whether the half-life is chosen on validation: it is `auto`, and this kind of model has one."""
        return self.config.get("half_life") == AUTO and hasattr(_collaborative_configs()[self.model](), "half_life")


class MQTokenizerSettings(StageSettings):
    """Step 1, see [`StageSettings`].

    Args:
        user_codebooks: K of users; None for that of items.
    """

    user_codebooks: Positive | None

    def model_configuration(self, kind: str, embedding_dim: int, num_vectors: int) -> MQTokenizerConfig:
        """The configuration of the MQ-Tokenizer of `"user"` or `"item"`.

        A `codebook_size` of `auto` is 256 for up to 10,000 vectors and 512 for more, the paper's choices for small and large
        data. For items with `residual`, it is the first power of two from a third of their number on, at most `MOST_CODEWORDS`:
        T5 learns more about items when few of them share a codeword.
        """
        from ..models.configuration_tokenrec import MQTokenizerConfig

        config = {**self.config, "embedding_dim": embedding_dim}
        if config.get("codebook_size") == AUTO:
            size = 256 if num_vectors <= 10_000 else 512
            if kind == "item" and config.get("residual"):
                size = min(max(size, 1 << max(num_vectors // 3 - 1, 0).bit_length()), MOST_CODEWORDS)
            config["codebook_size"] = size
        if kind == "user" and self.user_codebooks is not None:
            config["num_codebooks"] = self.user_codebooks
        return MQTokenizerConfig(**config)


class PromptSettings(_Section):
    """The prompts of step 2.

    Args:
        max_length: tokens of the longest prompt.
        max_history: items of the longest history.
        train_history: items of the longest history while training.
        shuffle_history: random order of a history; `auto`: random unless the model has a `half_life`.
    """

    max_length: Positive
    max_history: Positive
    train_history: Positive
    shuffle_history: bool | Literal["auto"]


class RetrievalSettings(SelectedStageSettings):
    """Step 2, see [`SelectedStageSettings`].

    Args:
        backbone: folder or Hub name of a T5 checkpoint; None trains the T5 of `config` from scratch.
        vocabulary: a T5 tokenizer or `spiece.model`; None takes the backbone's, or the small one of the package.
    """

    backbone: str | None
    vocabulary: str | None

    @property
    def loss_type(self) -> str:
        """`cosine_ranking` (Eq. 20) or `softmax`."""
        from ..models.configuration_tokenrec import T5GenerativeRetrievalConfig

        return str(self.config.get("loss_type", T5GenerativeRetrievalConfig.loss_type))


class Recipe(_Section):
    """All settings of a training run; the files in `tokenrec_hf/assets/recipes` comment on each.

    Args:
        recipe: the name of the recipe that the settings are based on.
        seed: of everything random.
        collaborative, mq_tokenizer, prompts, retrieval: the sections.

    Example:
        >>> recipe = Recipe.load("best", overrides={"seed": 1})
        >>> recipe.collaborative.model
        'fism'
    """

    recipe: Literal["paper", "best", "quickstart"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    collaborative: CollaborativeSettings
    mq_tokenizer: MQTokenizerSettings
    prompts: PromptSettings
    retrieval: RetrievalSettings

    @property
    def reads_history(self) -> bool:
        """Whether T5 is a sequence model beside the collaborative vectors (`"history"` pooling)."""
        return self.retrieval.config.get("pooling") == "history"

    @property
    def collator_arguments(self) -> dict[str, Any]:
        """The arguments of the collator that training and evaluation share."""
        return {"seed": self.seed, **self.prompts.model_dump()}

    @classmethod
    def load(
        cls, name: str = "best", config: str | os.PathLike | None = None, overrides: Mapping[str, Setting] | None = None
    ) -> Recipe:
        """A complete recipe, validated.

        Args:
            name: one of `paper`, `best`, `quickstart`.
            config: a YAML file with entries that replace those of the named recipe; its `recipe:` entry overrides `name`.
            overrides: single settings by dotted name, e.g. `{"retrieval.config.loss_type": "cosine_ranking"}`.

        Raises:
            ValueError: an unknown recipe or a file that is no YAML mapping; [`SettingError`] for an unknown or impossible
                setting.
            FileNotFoundError: `config` does not exist.
        """
        changes = _read(Path(config)) if config is not None else {}
        name = changes.get("recipe", name)
        if name not in RECIPES:
            raise SettingError(
                "recipe",
                f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)} or pass a file with --config.",
            )
        settings = _read(_FOLDER / f"{name}.yaml")
        _merge(settings, changes, str(config))
        for dotted, value in (overrides or {}).items():
            nested: Setting = value
            for part in reversed(dotted.split(".")):
                nested = {part: nested}
            _merge(settings, nested, f"setting {dotted}")
        recipe = cls.from_dict(settings)
        _check_reporters(recipe)
        return recipe

    @classmethod
    def from_dict(cls, settings: Mapping[str, Setting]) -> Recipe:
        """The recipe of complete settings, as `to_dict` returns them.

        Raises:
            SettingError: an unknown or impossible setting; the message gives its dotted name.
        """
        try:
            recipe = cls.model_validate(copy.deepcopy(dict(settings)))
        except ValidationError as error:
            raise _structure_error(error) from None
        for section, stage in recipe:
            if isinstance(stage, StageSettings):
                _check_config(section, stage)
                _check_training(section, stage)
        _check_combinations(recipe)
        return recipe

    @classmethod
    def open(cls, path: str | os.PathLike) -> Recipe:
        """The recipe in a file that [`~Recipe.save`] wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no YAML file, or has an unknown or impossible setting, or not all.
        """
        return cls.from_dict(_read(Path(path)))

    def to_dict(self) -> dict[str, Setting]:
        """All settings as plain values."""
        return self.model_dump()

    def changed(self, **overrides: Setting) -> Recipe:
        """A recipe with settings replaced, by dotted name: `recipe.changed(**{"prompts.max_history": 32})`.

        Raises:
            SettingError: there is no such setting, or its value is impossible.
        """
        settings = self.to_dict()
        for dotted, value in overrides.items():
            *path, last = dotted.split(".")
            place: Setting = settings
            for part in path:
                place = place.get(part)
                if not isinstance(place, dict):
                    raise SettingError(dotted, f"there is no setting {dotted!r}; check its name.")
            place[last] = value
        return Recipe.from_dict(settings)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the recipe, whole or not at all; [`~Recipe.open`] returns it."""
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


# Reading --------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number; in YAML 1.1 it is text, because it has no point."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _read(path: Path) -> dict[str, Setting]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}; check --config.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines; see a recipe.yaml that training wrote.")
    return content


def _merge(settings: dict[str, Setting], changes: Mapping[str, Setting], origin: str, path: Sequence[str] = ()) -> None:
    for key, value in changes.items():
        place = ".".join([*path, str(key)])
        is_open = bool(path) and path[-1] in _OPEN
        if key not in settings and not is_open:
            message = f"{origin}: there is no setting {place!r}; here there are {', '.join(settings)}."
            raise SettingError(place, message)
        if not isinstance(settings.get(key), dict) or is_open:
            settings[key] = copy.deepcopy(value)
        elif isinstance(value, Mapping):
            _merge(settings[key], value, origin, [*path, key])
        else:
            raise SettingError(place, f"{origin}: {place} is a section with settings of its own, not a value.")


# Validation -----------------------------------------------------------------------------------------------------------


def _structure_error(error: ValidationError) -> SettingError:
    """The first finding of pydantic as one sentence; the alternatives of a union are findings at one place."""
    found = error.errors(include_url=False)
    place, value = found[0]["loc"][:2], found[0]["input"]
    setting = ".".join(map(str, place))
    if found[0]["type"] == "extra_forbidden":
        return SettingError(setting, f"there is no setting {setting!r}.")
    if found[0]["type"] == "missing":
        return SettingError(setting, f"the setting {setting} is missing.")
    wanted = [one["msg"].removeprefix("Input should be ") for one in found if one["loc"][:2] == place]
    return SettingError(setting, f"{setting} is {value!r} but must be {' or '.join(wanted)}.")


def _check_config(section: str, stage: StageSettings) -> None:
    """Refuses names and values that the configuration of the stage's model does not take."""
    from huggingface_hub.errors import StrictDataclassError

    from ..models.configuration_tokenrec import MQTokenizerConfig, T5GenerativeRetrievalConfig

    others: set[str] = set()
    config_class: type = MQTokenizerConfig if isinstance(stage, MQTokenizerSettings) else T5GenerativeRetrievalConfig
    if isinstance(stage, CollaborativeSettings):
        config_class = _collaborative_configs()[stage.model]
        # A setting of another kind of model may stay in the recipe when the model is changed.
        others = {name for other in _collaborative_configs().values() for name in other().to_dict()}
        others -= set(config_class().to_dict())
    usual = config_class()
    chosen = {name: value for name, value in stage.config.items() if value != AUTO and name not in others}
    for name, value in chosen.items():
        _check_field(f"{section}.config.{name}", value, hasattr(usual, name), getattr(usual, name, None), config_class)
    try:
        config_class(**chosen)
    except (ValueError, StrictDataclassError) as error:
        raise SettingError(f"{section}.config", f"{section}.config: {error}") from None


def _collaborative_configs() -> dict[str, type[CollaborativeConfig]]:
    from ..models.modeling_collaborative import COLLABORATIVE_MODELS

    return {name: model.config_class for name, model in COLLABORATIVE_MODELS.items()}  # type: ignore[misc]


def _check_training(section: str, stage: StageSettings) -> None:
    """Refuses names and text that `TrainingArguments` do not take.

    They are not built: a recipe of a GPU (`bf16`) must be readable on other machines.
    """
    from transformers import TrainingArguments

    usual = {field.name: field.default for field in fields(TrainingArguments)}
    for name, value in stage.training.items():
        _check_field(f"{section}.training.{name}", value, name in usual, usual.get(name), TrainingArguments)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        value, place = stage.training.get(name, 1), f"{section}.training.{name}"
        if not isinstance(value, int) or value < 1:
            raise SettingError(place, f"{place} is {value} but must be a whole number of at least 1.")
    if not (epochs := stage.training.get("num_train_epochs", 1)) > 0:
        place = f"{section}.training.num_train_epochs"
        raise SettingError(place, f"{place} is {epochs} but must be positive.")
    if not 0 <= (rate := stage.training.get("learning_rate", 0.0)) < math.inf:
        place = f"{section}.training.learning_rate"
        raise SettingError(place, f"{place} is {rate} but must be a finite number of at least 0.")


def _check_reporters(recipe: Recipe) -> None:
    """Refuses services to report to that are not installed here; a recipe that is only read may name them."""
    from transformers.integrations import get_available_reporting_integrations

    known = {"all", "none", *get_available_reporting_integrations()}
    for section, stage in recipe:
        asked = (stage.training.get("report_to") if isinstance(stage, StageSettings) else None) or []
        if missing := {*([asked] if isinstance(asked, str) else asked)} - known:
            place = f"{section}.training.report_to"
            raise SettingError(place, f"{place} is {min(missing)!r}, which is not installed; install it, or take none.")


def _check_field(place: str, value: Setting, is_known: bool, usual: Setting, owner: type) -> None:
    if not is_known:
        raise SettingError(place, f"there is no setting {place!r}; {owner.__name__} has no such field.")
    if isinstance(usual, (int, float)) and not isinstance(usual, bool) and isinstance(value, str):
        raise SettingError(place, f"{place} is {value!r} but must be a number.")


def _check_combinations(recipe: Recipe) -> None:
    """Refuses settings that contradict each other."""
    collaborative = recipe.collaborative
    if getattr(collaborative.model_configuration(), "loss_type", None) == "bpr" and collaborative.num_negatives in (
        0,
        AUTO,
    ):
        raise SettingError(
            "collaborative.num_negatives",
            f"collaborative.num_negatives is {collaborative.num_negatives}, but the loss of {collaborative.model} needs 1 (collaborative.config.loss_type=bpr).",
        )
    if recipe.reads_history and not recipe.mq_tokenizer.config.get("residual"):
        raise SettingError(
            "retrieval.config.pooling",
            "retrieval.config.pooling=history needs mq_tokenizer.config.residual=true: only residual codewords add up.",
        )
