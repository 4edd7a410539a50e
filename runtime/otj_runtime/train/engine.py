"""Which engine completes the prompts of a run: the generator that the pod brings, one that rank 0 starts, or the policy itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from otj_runtime.rollout.transformers_engine import TransformersEngine
from otj_runtime.rollout.types import RolloutEngine
from otj_runtime.train.child import ChildGenerator, ServerPlan
from otj_runtime.train.generator import Generator, connect
from otj_runtime.train.loading import end_tokens
from otj_runtime.train.sampling import Weights
from otj_runtime.weights.ranks import Ranks

START_SECONDS = 300.0
"""How long ranks wait for rank 0 to start a generator's process; the generator itself may take longer."""


def make_engine(
    *,
    policy: Any,
    tokenizer: Any,
    prompts: Iterable[list[int]],
    generator: Generator | None,
    plan: ServerPlan | None,
    output: Path,
    owner: object,
) -> tuple[RolloutEngine, Weights | None]:
    """The engine, and the way of the weights to it; None if it uses the policy itself. Collective if there is a `plan`.

    Args:
        policy: the unwrapped policy.
        prompts: token ids of the run's prompts, the same on every rank.
        generator: a running one.
        plan: what to start if there is none.
        output: folder of a started generator's log.
        owner: a started generator ends with this object, or with the process.
    """
    ends = end_tokens(policy, tokenizer)
    failure: Callable[[], str | None] | None = None
    if plan is not None:
        generator, failure = _start(plan, policy, tokenizer, output, owner)
    if generator is None:
        return TransformersEngine(policy, pad_id=tokenizer.pad_token_id, eos_ids=ends), None
    connection = connect(generator, model=policy, end_tokens=ends, prompts=prompts, failure=failure)
    return connection.engine, connection.weights


def _start(plan: ServerPlan, policy: Any, tokenizer: Any, output: Path, owner: object) -> tuple[Generator, Callable[[], str | None] | None]:
    """Start the generator on rank 0; every rank learns where it is, and rank 0 what becomes of it."""
    children: list[ChildGenerator] = []

    def start() -> Generator:
        child = ChildGenerator(plan, model=policy, tokenizer=tokenizer, output=output)
        weakref.finalize(owner, child.close)
        children.append(child)
        return child.generator

    generator = Ranks(timeout_s=START_SECONDS).lead(start, phase="generator")
    return generator, children[0].failure if children else None
