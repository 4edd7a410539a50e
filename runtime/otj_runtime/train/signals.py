"""SIGTERM: finish the step, save a checkpoint, stop. Every rank must decide the same, so they ask each other after each step."""

from __future__ import annotations

import signal
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """Turns SIGTERM into a checkpoint and a clean stop at the next step boundary.

    Args:
        accelerator: reduces the ranks' flags; a signal may reach some ranks one step earlier than others.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._asked = False
        self.stopped = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if any rank was asked to."""
        asked = torch.tensor(float(self._asked), device=self._accelerator.device)
        if float(self._accelerator.reduce(asked, reduction="sum")) > 0:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
