"""Keeps secrets out of the object: a token that is written as a value is read by everybody who may read the run, its Job or its pod.

What a value is cannot be known, so names decide, and a few names and values that are known to be harmless pass: ML has tokens that
are no secrets (`EOS_TOKEN`), and switches and paths are named like what they switch or hold. The way out of a wrong guess is
`valueFrom.configMapKeyRef`, or another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from otj_runtime.api.base import ApiModel, Rule

# Patterns are for RE2 (the API server) and Python alike.
_WORD = "(password|passwd|passphrase|secret|apikey)"
_SECRET_NAME = f"(?i)((^|_)(token|key|pwd|credentials?)|{_WORD})$"
_HARMLESS_NAME = (
    "(?i)(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|start|end|image|video|audio|special|public|sort|cache|primary|partition|prompt|text|label|"
    "column|input|output|answer|question|group)_(token|key)$"
)
_HARMLESS_VALUES = ("", "0", "1", "true", "false", "True", "False", "TRUE", "FALSE", "yes", "no", "none", "None")
_HARMLESS_STARTS = ("/", "<", "$(")
"""A path, a token of a vocabulary, a reference to another variable."""

_SECRET_WORD = (
    "(?i)^-([^=]*[-_.])?((api|access|secret|private|auth)[-_]?key|(hf|hub|auth|api|access|wandb)[-_]?token|password|secret)(=|$)"
    r"|^--token(=|$)|\$\(\w*(token|_key|password|secret)\)"
)
"""An option that takes a secret, or a reference to a variable that holds one. A `--..._key` or `--..._token` may be a column or a word of
the vocabulary in many scripts."""

_SECRET_ARGUMENT = (
    f"(?i)((^|[-_.])(token|pwd|credentials?|(access|account|auth|private)[-_]?key)|{_WORD}|api[-_]key|(access|api|auth|hf|hub)token"
    "|authorization)$"
)
"""A keyword argument that takes a secret. Other than a variable, one that ends in `key` mostly names a column."""

SECRET_ARGUMENT = (
    "looks like a secret, which shows to everybody who may read this object, its Job or its pod; put it into a Secret, bring it as a "
    "variable by env[].valueFrom.secretKeyRef, and let the code read that: datasets reads HF_TOKEN by itself, a judge what apiKeyEnv names"
)
"""What is said of a text under such a name, in the arguments of a function."""


def names_a_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as names go."""
    return re.search(_SECRET_NAME, name) is not None and re.search(_HARMLESS_NAME, name) is None


def tells_nothing(value: str) -> bool:
    """Whether a value is no secret, whatever its variable is called."""
    return value in _HARMLESS_VALUES or value.startswith(_HARMLESS_STARTS)


def no_secret_in(words: str, *, python: str, reader: str) -> Rule:
    """The rule that a list of words of a command line carries no secret. `words` and `python` name it on the wire and here; `reader` is
    what reads variables instead."""
    return Rule(
        cel=f"!has(self.{words}) || !self.{words}.exists(word, word.matches('{_quoted(_SECRET_WORD)}'))",
        message=f"{words}: a secret in an argument shows in the Job and in ps; bring it as a variable by "
        f"env[].valueFrom.secretKeyRef, which {reader} reads by itself",
        holds=lambda m: not any(re.search(_SECRET_WORD, word) for word in getattr(m, python)),
        field=words,
    )


def secret_argument_cel(name: str, value: str) -> str:
    """CEL for: `value`, of whatever type, is a secret by its `name`."""
    starts = "".join(f" && !{value}.startsWith('{start}')" for start in _HARMLESS_STARTS)
    return (
        f"type({value}) == string && !({value} in {list(_HARMLESS_VALUES)}){starts}"
        f" && {name}.matches('{_SECRET_ARGUMENT}') && !{name}.matches('{_HARMLESS_NAME}')"
    )


def _without_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    for path in _secrets_in(arguments):
        raise ValueError(f"{path}: {SECRET_ARGUMENT}")
    return arguments


def _secrets_in(value: Any, path: str = "") -> Iterator[str]:
    """Paths of the secrets in `value`, however deep."""
    if isinstance(value, list):
        for item in value:
            yield from _secrets_in(item, path)
    elif isinstance(value, dict):
        for name, child in value.items():
            below = f"{path}.{name}" if path else name
            if not isinstance(child, str):
                yield from _secrets_in(child, below)
            elif re.search(_SECRET_ARGUMENT, name) and not re.search(_HARMLESS_NAME, name) and not tells_nothing(child):
                yield below


Arguments = Annotated[dict[str, Any], AfterValidator(_without_secrets)]
"""Arguments of a function, none of them a secret. Rules in the CRD cannot see into them: an admission policy does, two levels deep, and
the operator and `otj run` refuse what lies deeper."""


class Variable(ApiModel):
    """A variable of the containers' environment, as in a pod; what is not declared here passes through."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=1024)] = Field(description="Name of the variable.")
    value: Annotated[str, Field(max_length=32768)] | None = Field(
        None, description="Its value, in clear: secrets come by valueFrom.secretKeyRef. Default: what valueFrom brings, or nothing."
    )

    rules = (
        Rule(
            cel=f"!has(self.value) || self.value in {list(_HARMLESS_VALUES)} || "
            + " || ".join(f"self.value.startsWith('{start}')" for start in _HARMLESS_STARTS)
            + f" || !self.name.matches('{_SECRET_NAME}') || self.name.matches('{_HARMLESS_NAME}')",
            message="value: %s looks like a secret, which a value shows to everybody who may read this object; put it into a Secret and "
            "name that in valueFrom.secretKeyRef (what is no secret may come from a valueFrom.configMapKeyRef)",
            holds=lambda v: v.value is None or tells_nothing(v.value) or not names_a_secret(v.name),
            values=lambda v: (v.name,),
            cel_values=("self.name",),
            field="value",
        ),
    )

    def to_wire(self) -> dict[str, Any]:
        """The entry of a container's env."""
        return self.model_dump(by_alias=True, exclude_unset=True, mode="json")


def _quoted(pattern: str) -> str:
    """`pattern` within a CEL string."""
    return pattern.replace("\\", "\\\\")
