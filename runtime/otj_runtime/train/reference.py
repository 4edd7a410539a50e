"""The reference: the frozen model that a loss compares the policy with; and one that follows the policy (`sync_ref_model`).

TR-DPO (arXiv:2404.09656, "soft update"), every `ref_model_sync_steps` optimizer steps: reference <- share policy + (1 - share) reference.
A reference that moves is part of the run's state, so checkpoints hold it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from otj_runtime.train.config import GRPOConfig
from otj_runtime.weights.composed import available, unpartitioned, whole


def frozen(model: Any, *, device: torch.device) -> Any:
    """`model` as a reference on `device`, whole on every rank. Collective if ZeRO-3 has cut it."""
    return unpartitioned(model).to(device).eval().requires_grad_(False)


def frozen_copy(model: Any, *, device: torch.device) -> Any:
    """A reference that is `model` as it is now. Collective as `frozen`."""
    plain = unpartitioned(model)
    return frozen(copy.deepcopy(model) if plain is model else plain, device=device)


@torch.no_grad()
def mix(reference: Any, policy: Any, *, share: float) -> None:
    """Move every parameter of `reference` by `share` of its way to the policy's. Collective if the policy is sharded.

    Args:
        policy: the unwrapped policy, of the same shape.
        share: above 0, at most 1.
    """
    for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        mine.lerp_(whole(available(theirs)).to(mine), share)


class Following(TrainerCallback):
    """Mixes the policy into `reference` every few steps, before the checkpoint of such a step is written."""

    def __init__(self, reference: Any, accelerator: Any) -> None:
        self._reference = reference
        self._accelerator = accelerator

    def on_step_end(  # type: ignore[override]  # it only ever gets the arguments of its own trainer
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """See the class."""
        if state.global_step % args.ref_model_sync_steps == 0:
            mix(self._reference, self._accelerator.unwrap_model(model), share=args.ref_model_mixup_alpha)
