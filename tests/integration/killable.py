"""A training run for the tests that end it, in a process of its own.

It sends a signal to itself in the middle of work: `generate:N` in the Nth sampling of a generation, `backward:N` at the Nth backward pass,
`save:N` while the Nth checkpoint is written.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from otj_runtime import GRPOConfig, GRPOTrainer
from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.load import load_prompts
from otj_runtime.rewards import load_rewards
from otj_runtime.rollout.transformers_engine import TransformersEngine
from otj_runtime.train.checkpoints import newest_checkpoint
from otj_runtime.train.generator import Generator


def strike(owner: Any, method: str, number: int, call: int) -> None:
    """Send signal `number` to this process within call `call` (from 1) of `owner.method`."""
    original: Callable[..., Any] = getattr(owner, method)
    calls = [0]

    def struck(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return original(*args, **keywords)

    setattr(owner, method, struck)


PLACES = {"generate": (TransformersEngine, "generate"), "backward": (torch.Tensor, "backward"), "save": (Trainer, "_save_rng_state")}


def train(model: str, output: str, arguments: dict[str, Any], blow: tuple[str, str] | None, generator: Generator | None) -> None:
    """Train from the newest checkpoint to the end, or to the signal `blow[0]` at `blow[1]`; leave how it ended in the file `end`.

    Without a generator the ranks sample by themselves.
    """
    torch.set_num_threads(1)
    if blow is not None:
        place, call = blow[1].split(":")
        strike(*PLACES[place], getattr(signal, blow[0]), int(call))
    trainer = GRPOTrainer(
        model,
        load_rewards([], task="copy"),
        args=GRPOConfig(output_dir=output, use_cpu=True, use_vllm=generator is not None, **arguments),
        train_dataset=load_prompts(DatasetSpec(task="copy", args={"length": 4}), seed=0),
        generator=generator,
    )
    checkpoint = newest_checkpoint(Path(output))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    Path(output, "end").write_text(f"{'stopped' if trainer.stop.stopped else 'finished'} {trainer.state.global_step}")
