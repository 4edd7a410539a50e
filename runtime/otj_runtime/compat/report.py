"""The built-in trainer's reporter on every `transformers.Trainer` of a script: metrics.jsonl, and progress with every log line.

transformers' own reporter of the same contract stays beside it: it tells of every step, though at most once in five seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from otj_runtime.train.report import Reporter


class ScriptReporter(Reporter):
    """A Reporter that also keeps the step, and adds what was measured beside the trainer.

    Args:
        extra: further metrics for the next line.
    """

    def __init__(self, *, output: Path, world_size: int, extra: Callable[[], dict[str, float]]) -> None:
        super().__init__(output=output, world_size=world_size)
        self._extra = extra
        self.step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin from the step of the checkpoint, if there is one."""
        self.step = state.global_step
        if state.is_world_process_zero:
            self.forget_after(state.global_step if state.global_step else -1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the step."""
        self.step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Report a line with what was measured beside it."""
        super().on_log(args, state, control, None if logs is None else logs | self._extra(), **kwargs)


def attach(module: ModuleType, reporter: ScriptReporter) -> None:
    """Give `reporter` to every Trainer that is made from now on. `module` is transformers.trainer."""
    module.DEFAULT_CALLBACKS.append(reporter)
