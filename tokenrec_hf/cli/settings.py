"""Settings on the command line of `tokenrec`: recipes, dotted names and filters, from text to values."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

import yaml

from ..training.recipe import Recipe, SettingError

SHORTCUTS = {"seed": "seed", "loss_type": "retrieval.config.loss_type"}


class UsageError(ValueError):
    """An argument that there is not, or that contradicts another one."""


def _settings(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b 1 --c=x --flag` as `{"a.b": 1, "c": "x", "flag": True}`."""
    settings: dict[str, Any] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            settings[name] = scalar(value) if equals else True
            if equals:
                name = None
        elif name is None:
            raise UsageError(f"unrecognized arguments: {argument}")
        else:
            settings[name] = scalar(argument)
            name = None
    return settings


def scalar(text: str) -> Any:
    """The value that a piece of text stands for, as YAML 1.2 would read it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, bool) and text.lower() not in ("true", "false"):
        return text  # YAML 1.1 takes the `no` of --save_strategy for false
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # and does not take 1e-3 for a number
    return value


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that `tokenrec train` is asked for; `arguments.settings` become a dict by dotted name on the way.

    Raises:
        UsageError: an argument that there is not.
        ValueError: something is wrong in the file of `--config`.
    """
    settings = _settings(arguments.settings)
    bare = [name for name in settings if "." not in name and name not in SHORTCUTS]
    if bare:
        from dataclasses import fields

        from transformers import TrainingArguments

        known = {field.name for field in fields(TrainingArguments)}
        for name in bare:
            if name not in known:
                raise UsageError(
                    f"there is no argument --{name}; besides those of --help there are those of transformers' "
                    "TrainingArguments, and the settings of a recipe by their dotted names."
                )
    arguments.settings = {
        name if "." in name else SHORTCUTS.get(name, f"retrieval.training.{name}"): value
        for name, value in settings.items()
    }
    try:
        return Recipe.load(arguments.recipe, arguments.config, arguments.settings)
    except SettingError as error:
        given = arguments.settings
        if any(name.startswith(error.setting) or error.setting.startswith(name) for name in given):
            raise UsageError(str(error)) from None
        raise


def read_where(pairs: Sequence[str] | None) -> dict[str, list[Any]]:
    """`genre=jazz genre=folk in_stock=true` as `{"genre": ["jazz", "folk"], "in_stock": [True]}`."""
    where: dict[str, list[Any]] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--where {pair} is not NAME=VALUE.")
        where.setdefault(name, []).append(scalar(value))
    return where
