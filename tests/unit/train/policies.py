"""Small policies and trainers without a generator, for tests of what a method makes of groups."""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset

from otj_runtime.rollout.types import Completion, Group

END = 0
"""The tiny model's only special token: ends completions and fills up rows."""


def moved(model: Any, seed: int) -> Any:
    """A copy whose every parameter moved a little: another policy of the same shape."""
    copied = copy.deepcopy(model).train()
    move(copied, seed)
    return copied


def move(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.zero_grad()


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def group_of(rewards: list[float], *, lengths: list[int] | None = None, finished: list[bool] | None = None) -> Group:
    """A group whose completions are told apart by their first token, 1, 2, ..."""
    lengths = lengths or [1] * len(rewards)
    finished = finished or [True] * len(rewards)
    completions = [
        Completion([i + 1] * length, [-2.3] * length, finished=ends, policy_version=0)
        for i, (length, ends) in enumerate(zip(lengths, finished, strict=True))
    ]
    return Group({"prompt": "a"}, [3, 4], completions, texts=["a"] * len(rewards), rewards=list(rewards))


def idle_trainer(kind: type[Any], policy: tuple[Any, Any], args: Any, reference: Any) -> Any:
    """A trainer of `kind` to which groups are handed; it samples nothing itself.

    Args:
        policy: model and tokenizer.
        reference: the model to compare with; None for the policy without its adapters.
    """
    model, tokenizer = policy
    trainer = kind(
        model, lambda completions, **_: [0.0] * len(completions), args, Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer
    )
    trainer.reference = reference
    return trainer
