"""Writes `api/training_arguments.json` from the configuration classes: run `python -m otj_runtime.train.arguments` after changing them.

The API must know the arguments without importing torch; a test holds the file equal to what this module makes.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from importlib import resources
from typing import Any

from transformers import TrainingArguments

from otj_runtime.api.training import Algorithm
from otj_runtime.train.config import GRPOConfig, OnlineDPOConfig

CONFIGS: dict[Algorithm, type[TrainingArguments]] = {Algorithm.GRPO: GRPOConfig, Algorithm.ONLINE_DPO: OnlineDPOConfig}

WIDER = {"beta": ["array", "number"], "scale_rewards": ["boolean", "string"]}
"""JSON types of fields that take more than their annotation says."""

_NAMES = {int: "integer", float: "number", bool: "boolean", str: "string", list: "array", dict: "object"}


def json_types(hint: Any) -> list[str]:
    """JSON types of the values that a field annotated with `hint` takes, sorted."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return sorted({name for part in typing.get_args(hint) for name in json_types(part)})
    plain = origin or hint
    if isinstance(plain, type) and issubclass(plain, Enum):
        return ["string"]
    return [_NAMES[plain]] if plain in _NAMES else []


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    value = value.value if isinstance(value, Enum) else value
    return value if isinstance(value, (int, float, str, bool, list, dict)) else None


def _describe(name: str, field: dataclasses.Field[Any], defaults: dict[str, Any]) -> str:
    inherited = name in {f.name for f in dataclasses.fields(TrainingArguments)}
    text = f"`{name}` of transformers.TrainingArguments." if inherited else str(field.metadata["help"])
    if "Default" in text:
        return text
    shown = {algorithm: "none" if value is None else json.dumps(value) for algorithm, value in defaults.items()}
    if len(set(shown.values())) == 1:
        return f"{text} Default: {next(iter(shown.values()))}."
    return f"{text} Default: {', '.join(f'{value} for {algorithm}' for algorithm, value in shown.items())}."


def build_table() -> dict[str, dict[str, Any]]:
    """Arguments by name: JSON types, description, and the default under each algorithm that takes it."""
    table: dict[str, dict[str, Any]] = {}
    for algorithm, config in CONFIGS.items():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kinds = WIDER.get(field.name) or json_types(hints[field.name])
            if not field.init or field.name.startswith("_") or not kinds:
                continue
            row = table.setdefault(field.name, {"types": kinds, "defaults": {}})
            row["defaults"][str(algorithm)] = _default(field)
            row["description"] = _describe(field.name, field, row["defaults"])
    return dict(sorted(table.items()))


def render() -> str:
    """The file's text."""
    return json.dumps(build_table(), indent=1) + "\n"


if __name__ == "__main__":
    target = resources.files("otj_runtime.api").joinpath("training_arguments.json")
    with open(str(target), "w") as file:
        file.write(render())
