"""The common ground of the API models: camelCase on the wire, Python names in code, unknown fields refused by name.

Rules that need no cluster are written once, as CEL with the message a user reads. The CRD carries them for the API server;
`otj run` and the operator raise the same message from a Python check of the same `Rule`, because CEL does not run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One validation rule of a model: `cel` for the API server, `holds` for Python, one message for both.

    A message may show values: `values` fills its %s and %d here, `cel_values` the same ones there. `field` is where the API server
    says it, relative to the model.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]
    values: Callable[[Any], tuple[Any, ...]] | None = None
    cel_values: tuple[str, ...] = ()
    field: str = ""

    def told_of(self, model: Any) -> str:
        """The message about `model`, which breaks the rule."""
        return self.message if self.values is None else self.message % self.values(model)


class ApiModel(BaseModel):
    """A model of the API. Subclasses list their cross-field rules in `rules`; the CRD generator and validation read them."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True)

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _hold_rules(self) -> ApiModel:
        for rule in self.rules:
            if not rule.holds(self):
                raise ValueError(rule.told_of(self))
        return self

    def to_wire(self) -> dict[str, Any]:
        """The JSON form the API server stores: camelCase, unset optionals absent."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


class ToldModel(ApiModel):
    """What one process tells another that may be of another version, as in a rolling upgrade: fields not known here are left out."""

    model_config = ConfigDict(extra="ignore")
