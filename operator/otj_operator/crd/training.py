"""`spec.training` as a typed object: one property per argument of GRPOConfig and OnlineDPOConfig.

So the API server itself names a misspelt argument (strict validation) and a mistyped one (the schema), and CEL checks what
`otj_runtime.api.training` checks in Python. Arguments that the job itself decides are declared too: only so can
the API server say which field decides them.

A rule stands at the argument itself wherever it needs no other: each look of a rule into an object makes a map of all its properties
anew, and this one has more than a hundred. Such looks were half of what the API server did to create a job.
"""

from __future__ import annotations

from typing import Any

from otj_operator.crd.schema import Schema, preserving, told
from otj_runtime.api import Algorithm, training_arguments
from otj_runtime.api.training import GROUPS_ARE_TORN, NOT_FOR_SCRIPTS, RESERVED, TOO_FEW_IN_A_GROUP, Argument, reserved_arguments


def training_schema(description: str) -> Schema:
    """The schema of `spec.training`."""
    properties = {name: _argument(name, argument) for name, argument in sorted(training_arguments().items())}
    decided = {name: _reserved(name, argument) for name, argument in sorted(reserved_arguments().items())}
    return {
        "description": description,
        "type": "object",
        "default": {},
        "properties": properties | decided,
    }


def job_rules() -> list[Schema]:
    """Rules about training that need other fields too; they stand at `spec`."""
    return [*map(_algorithm_rule, Algorithm), _batch_rule(), _script_rule()]


def _visible(argument: Argument) -> bool:
    """Whether CEL can see the argument: one that may have several types, or a list of anything, has no type there. The operator's
    own check sees it all the same."""
    return len(argument.types) == 1 and argument.types != ("array",)


def _argument(name: str, argument: Argument) -> Schema:
    rules = {"x-kubernetes-validations": [_group_rule()]} if name == "num_generations" else {}
    return {"description": argument.description, **_type(argument), **rules}


def _reserved(name: str, argument: Argument) -> Schema:
    # CEL cannot see what has no type, so one is picked where the argument may have several; it is refused whatever it holds.
    if "object" in argument.types:
        kind = preserving()
    elif "array" in argument.types:
        kind = {"type": "array", "items": {"type": "number"}}
    else:
        kind = _type(argument)
    rule = {"rule": "false", "message": f"training.{name}: is decided by the job; set {RESERVED[name]} instead"}
    return {"description": f"Not for jobs: set {RESERVED[name]} instead.", **kind, "x-kubernetes-validations": [rule]}


def _type(argument: Argument) -> Schema:
    match argument.types:
        case ("object",):
            return preserving()
        case ("array",):
            return {"type": "array", "items": {"x-kubernetes-preserve-unknown-fields": True}}
        case (single,):
            return {"type": single}
        case _:
            return {"x-kubernetes-preserve-unknown-fields": True}


def _group_rule() -> Schema:
    return {
        "rule": "self >= 2",
        **told(f"training.num_generations: {TOO_FEW_IN_A_GROUP}", "self"),
    }


def _algorithm_rule(algorithm: Algorithm) -> Schema:
    foreign = [name for name, argument in sorted(training_arguments().items()) if algorithm not in argument.defaults and _visible(argument)]
    free = " && ".join(f"!has(training.{name})" for name in foreign)
    first = " : ".join([*(f"has(self.training.{name}) ? '{name}'" for name in foreign), "''"])
    return {
        "rule": f"self.algorithm != '{algorithm}' || {_with_training(free)}",
        **told(f"training.%s: unknown argument of {algorithm}Config", first),
    }


def _script_rule() -> Schema:
    """The object is always there, by its default, so each of its fields is asked for."""
    given = " || ".join(f"has(self.training.{name})" for name, argument in sorted(training_arguments().items()) if _visible(argument))
    return {"rule": f"!has(self.trainer) || !({given})", "message": f"training: {NOT_FOR_SCRIPTS}"}


def _batch_rule() -> Schema:
    """Groups must not be torn apart: num_generations divides the completions of a rank."""
    group, per_rank = _value("num_generations", of="training"), _per_rank(of="training")
    return {
        "rule": _with_training(f"{group} < 2 || ({per_rank}) % {group} == 0"),
        **told(
            f"training.num_generations: {GROUPS_ARE_TORN}", _value("num_generations", of="self.training"), _per_rank(of="self.training")
        ),
    }


def _with_training(rule: str) -> str:
    """`rule` with `training` for `self.training`, which is a map made anew wherever it is written; CEL has no other way to name it."""
    return f"[self.training].all(training, {rule})"


def _per_rank(*, of: str) -> str:
    """CEL for the completions of a rank in one batch."""
    shared = f"(has({of}.steps_per_generation) ? {of}.steps_per_generation : {_value('gradient_accumulation_steps', of=of)})"
    return f"{_value('per_device_train_batch_size', of=of)} * {shared}"


def _value(name: str, *, of: str) -> str:
    """CEL for the value of an argument, its default under the job's algorithm if it is not given."""
    defaults = training_arguments()[name].defaults
    return f"(has({of}.{name}) ? {of}.{name} : {_default(defaults)})"


def _default(defaults: dict[Algorithm, Any]) -> str:
    grpo, dpo = defaults[Algorithm.GRPO], defaults[Algorithm.ONLINE_DPO]
    return str(grpo) if grpo == dpo else f"(self.algorithm == '{Algorithm.GRPO}' ? {grpo} : {dpo})"
