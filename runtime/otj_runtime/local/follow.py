"""The run's story so far, read from metrics.jsonl as it grows."""

from __future__ import annotations

import os
from pathlib import Path

from otj_runtime.pod.metrics import HeldOut, MetricsLine, read_metrics, values


class Story:
    """The lines of a metrics file. A resumed run replaces the file by a shorter one; then the story is read again.

    Args:
        path: the file; it need not exist yet.
        began: seconds since the epoch; earlier lines are of earlier runs in the same folder.
    """

    def __init__(self, path: Path, *, began: float) -> None:
        self._path = path
        self._began = began
        self._offset = 0
        self._file: int | None = None
        self.lines: list[MetricsLine] = []

    def refresh(self) -> list[MetricsLine]:
        """Read on. Returns the new lines of this run."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return []
        if status.st_ino != self._file or status.st_size < self._offset:
            self._file, self._offset, self.lines = status.st_ino, 0, []
        new, self._offset = read_metrics(self._path, offset=self._offset)
        self.lines += new
        return [line for line in new if line.time >= self._began]

    @property
    def steps(self) -> list[MetricsLine]:
        """The lines that tell of a step, not of an evaluation."""
        return [line for line in self.lines if line.metrics and "eval_reward" not in line.metrics]

    @property
    def heldout(self) -> list[HeldOut]:
        """Held-out evaluations, oldest first."""
        return [line.heldout for line in self.lines if line.heldout is not None]

    @property
    def rewards(self) -> list[float]:
        """The mean reward of each step."""
        return list(values(self.lines, "reward"))

    @property
    def first_reward_after(self) -> float | None:
        """Seconds from the start of this run to its first reward."""
        times = [line.time for line in self.steps if "reward" in line.metrics and line.time >= self._began]
        return times[0] - self._began if times else None

    def tokens_per_second(self) -> float | None:
        """Completion tokens per second over the last steps; None while there is nothing to tell it from."""
        told = [line for line in self.steps if "tokens_generated" in line.metrics][-6:]
        if len(told) < 2 or told[-1].time <= told[0].time:
            return None
        made = told[-1].metrics["tokens_generated"] - told[0].metrics["tokens_generated"]
        return made / (told[-1].time - told[0].time) if made > 0 else None

    def seconds_left(self) -> float | None:
        """Estimated seconds to the last step, from the pace of the last steps."""
        if not self.steps:
            return None
        last = self.steps[-1]
        times = [line.metrics["step_time"] for line in self.steps[-10:] if "step_time" in line.metrics]
        return (last.total_steps - last.step) * sum(times) / len(times) if times else None
