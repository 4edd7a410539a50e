"""`spec.training` as a typed object: one property per argument of GRPOConfig and OnlineDPOConfig.

So the API server itself names a misspelt argument (strict validation) and a mistyped one (the schema), and CEL checks what
`otj_runtime.api.training` checks in Python. Arguments that the job itself decides are declared too: only so can
the API server say which field decides them.
"""

from __future__ import annotations

from typing import Any

from otj_operator.crd.schema import Schema, preserving, told
from otj_runtime.api import Algorithm, training_arguments
from otj_runtime.api.training import GROUPS_ARE_TORN, NOT_FOR_SCRIPTS, RESERVED, TOO_FEW_IN_A_GROUP, Argument, reserved_arguments


def training_schema(description: str) -> Schema:
    """The schema of `spec.training`."""
    properties = {name: _argument(argument) for name, argument in sorted(training_arguments().items())}
    decided = {name: _reserved(name, argument) for name, argument in sorted(reserved_arguments().items())}
    return {
        "description": description,
        "type": "object",
        "default": {},
        "properties": properties | decided,
        "x-kubernetes-validations": [*map(_reserved_rule, decided), _group_rule()],
    }


def job_rules() -> list[Schema]:
    """Rules about training that need other fields too; they stand at `spec`."""
    foreign = (
        (name, algorithm)
        for name, argument in sorted(training_arguments().items())
        for algorithm in Algorithm
        if algorithm not in argument.defaults and _visible(argument)
    )
    return [*(_algorithm_rule(name, algorithm) for name, algorithm in foreign), _batch_rule(), _script_rule()]


def _visible(argument: Argument) -> bool:
    """Whether CEL can see the argument: one that may have several types, or a list of anything, has no type there. The operator's
    own check sees it all the same."""
    return len(argument.types) == 1 and argument.types != ("array",)


def _argument(argument: Argument) -> Schema:
    return {"description": argument.description, **_type(argument)}


def _reserved(name: str, argument: Argument) -> Schema:
    # CEL cannot see what has no type, so one is picked where the argument may have several; it is refused whatever it holds.
    if "object" in argument.types:
        kind = preserving()
    elif "array" in argument.types:
        kind = {"type": "array", "items": {"type": "number"}}
    else:
        kind = _type(argument)
    return {"description": f"Not for jobs: set {RESERVED[name]} instead.", **kind}


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


def _reserved_rule(name: str) -> Schema:
    return {"rule": f"!has(self.{name})", "message": f"training.{name}: is decided by the job; set {RESERVED[name]} instead"}


def _group_rule() -> Schema:
    return {
        "rule": "!has(self.num_generations) || self.num_generations >= 2",
        **told(f"training.num_generations: {TOO_FEW_IN_A_GROUP}", "self.num_generations"),
    }


def _algorithm_rule(name: str, algorithm: Algorithm) -> Schema:
    return {
        "rule": f"self.algorithm != '{algorithm}' || !has(self.training.{name})",
        "message": f"training.{name}: unknown argument of {algorithm}Config",
    }


def _script_rule() -> Schema:
    """The object is always there, by its default, so each of its fields is asked for."""
    given = " || ".join(f"has(self.training.{name})" for name, argument in sorted(training_arguments().items()) if _visible(argument))
    return {"rule": f"!has(self.trainer) || !({given})", "message": f"training: {NOT_FOR_SCRIPTS}"}


def _batch_rule() -> Schema:
    """Groups must not be torn apart: num_generations divides the completions of a rank."""
    shared = f"(has(self.training.steps_per_generation) ? self.training.steps_per_generation : {_value('gradient_accumulation_steps')})"
    per_rank = f"{_value('per_device_train_batch_size')} * {shared}"
    group = _value("num_generations")
    return {
        "rule": f"{group} < 2 || ({per_rank}) % {group} == 0",
        **told(f"training.num_generations: {GROUPS_ARE_TORN}", group, per_rank),
    }


def _value(name: str) -> str:
    """CEL for the value of an argument, its default under the job's algorithm if it is not given."""
    defaults = training_arguments()[name].defaults
    return f"(has(self.training.{name}) ? self.training.{name} : {_default(defaults)})"


def _default(defaults: dict[Algorithm, Any]) -> str:
    grpo, dpo = defaults[Algorithm.GRPO], defaults[Algorithm.ONLINE_DPO]
    return str(grpo) if grpo == dpo else f"(self.algorithm == '{Algorithm.GRPO}' ? {grpo} : {dpo})"
