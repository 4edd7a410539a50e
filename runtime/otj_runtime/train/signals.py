"""SIGTERM: stop soon, with a checkpoint. Every rank must decide the same at the same place, so they ask each other.

    waiting for rollouts        given up at once, on the rank that is told; the ranks ask each other as soon as each has its own or gave up
    in an evaluation            the same; what it has found is lost
    between two micro-batches   the ranks ask each other; the begun optimizer step is forgotten and made again by the resumed run
    after an optimizer step     the ranks ask each other

So a signal waits for one micro-batch at most (without vLLM, for one batch of completions), with one exception: a weight sync under way
ends first. All ranks take part in it, and the generator stands still in its middle: a rank that left would leave the others in a
collective and the generator paused. It takes a fraction of a step, or, with a generator that has just been lost, until that is back
(`RETURN_SECONDS`), which the pod's grace period may cut short; then the last periodic checkpoint is the one that survives.

transformers has a callback for this (`enable_jit_checkpoint`), which each rank follows on its own, three seconds later and not before the
batches of a step are there; ours takes its place under the same name.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """Ends a wait of the main thread. No Exception: those would be swallowed or reported by whatever it waits in."""


class StopRequested(Exception):
    """The ranks agreed to stop instead of making the next step."""


class StopOnSignal(TrainerCallback):
    """Turns SIGTERM into a checkpoint and a clean end of training.

    Args:
        accelerator: reduces the ranks' flags; a signal may reach some ranks earlier than others.
        save: saves a checkpoint of the last finished step, in the middle of the next. Collective.
    """

    def __init__(self, accelerator: Any, save: Callable[[], None]) -> None:
        self._accelerator = accelerator
        self._save = save
        self._asked = False
        self._waiting = False
        self.stopped = False
        """Whether a signal ended the training."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Obey SIGTERM inside; afterwards it does what it did before. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def attempt(self, wait: Callable[[], T]) -> T | None:
        """What `wait` returns; None if a signal ended it. It must wait for nothing that other ranks take part in, and `agreed` must follow
        on every rank."""
        try:
            self._waiting = True
            return None if self._asked else wait()
        except Interrupted:
            return None
        finally:
            self._waiting = False

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        asked = torch.tensor(float(self._asked), device=self._accelerator.device)
        return float(self._accelerator.reduce(asked, reduction="sum")) > 0

    def stop(self, control: TrainerControl) -> None:
        """Save what the last finished step left, and end. Collective."""
        self.stopped = True
        self._save()
        control.should_training_stop = True

    def stop_after_step(self, control: TrainerControl) -> None:
        """Let transformers save the step that has just ended, and end."""
        self.stopped = True
        control.should_save = True
        control.should_training_stop = True

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the step that has begun, if any rank was asked to."""
        if self.agreed():
            self.stop(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if any rank was asked to. transformers saves, after it has reported the step."""
        if self.agreed():
            self.stop_after_step(control)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked = True
        if self._waiting:
            self._waiting = False
            raise Interrupted
