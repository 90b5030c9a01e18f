"""Recipes: all settings of a training run as one YAML file.

A recipe has a section a stage. The three that ship with the package (`paper`, `best`, `cpu`; `quickstart` is the demo's) are
complete; a file of one's own needs only what differs. Knows what settings there are, not what they do.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RECIPES = ("paper", "best", "cpu", "quickstart")
_FOLDER = Path(__file__).parents[1] / "assets" / "recipes"
# Sections whose keys are those of a configuration class or of TrainingArguments, checked there.
_OPEN = ("config", "training")


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number; for YAML 1.1 it is text, because it has no point."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_recipe(
    name: str = "cpu", config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A complete recipe.

    Args:
        name: one of `paper`, `best`, `cpu`, `quickstart`.
        config: a YAML file whose entries replace those of the named recipe; its own `recipe:` entry overrides `name`.
        overrides: single settings by dotted name, e.g. `{"retrieval.config.loss_type": "cosine_ranking"}`.

    Raises:
        ValueError: an unknown recipe or setting, or a file that is no YAML mapping.
        FileNotFoundError: `config` does not exist.
    """
    changes = _read(Path(config)) if config is not None else {}
    name = changes.get("recipe", name)
    if name not in RECIPES:
        raise ValueError(
            f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)} or pass a file with --config."
        )
    recipe = _read(_FOLDER / f"{name}.yaml")
    _merge(recipe, changes, str(config))
    for dotted, value in (overrides or {}).items():
        nested: Any = value
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        _merge(recipe, nested, f"setting {dotted}")
    return recipe


def save_recipe(recipe: Mapping[str, Any], path: Path) -> None:
    """Writes a recipe so that `load_recipe(config=path)` gives it back."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


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
