"""What is known of the run's progress: updates of the trainer in, the progress document out. No I/O; the caller brings the clock."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from otj_runtime.api import Progress
from otj_runtime.pod.metrics import LauncherReport, TrainerStatus
from otj_runtime.pod.split import advice_text
from otj_runtime.pod.transfer import Transfer

REWARD_NAMES = ("reward", "objective/scores")
"""Metrics that hold the mean reward: our name and TRL's GRPOTrainer's, then the name of TRL's OnlineDPOTrainer."""

READINGS: dict[str, tuple[str, ...]] = {
    "reward": REWARD_NAMES,
    "kl": ("kl", "objective/kl"),
    "tokens_per_second": ("tokens_per_second",),
    "sync_seconds": ("sync/total_s",),
    "staleness": ("async/staleness_mean",),
    "trainer_idle": ("idle/trainer",),
    "generator_idle": ("idle/generator",),
}
"""Fields of the progress document and the metrics that they come from, the first that is there."""


class Board:
    """The latest state of the run.

    Args:
        transfer: how weights reach the generator, where that is known.
    """

    def __init__(self, transfer: Transfer | None = None) -> None:
        self.transfer = transfer
        """How weights reach the generator: at first as announced, then as it turned out."""
        self.generator_ready = False
        self.ended = False
        self.startup: dict[str, float] = {}
        """Seconds from the pod's start to the phases reached so far."""
        self.overdue: str | None = None
        """What to say of a step that is late."""
        self.checkpoint: tuple[int, float] | None = None
        """Steps in the newest complete checkpoint, and seconds since the epoch at which it was saved."""
        self.last_update: float | None = None
        """Monotonic time of the last update."""
        self._metrics: dict[str, str] = {}
        self._remaining: tuple[float, int] | None = None
        self._step_seen: tuple[float, int] | None = None
        self._measured_step_seconds: float | None = None
        self._updated = ""

    def absorb(self, status: TrainerStatus, *, now: float, wall: datetime | None = None) -> None:
        """Take in one update that arrived at monotonic time `now`."""
        self._metrics |= {metric.name: metric.value for metric in status.metrics}
        self.last_update = now
        self._updated = _timestamp(wall or datetime.now(UTC))
        if status.estimatedRemainingSeconds is not None:
            self._remaining = (now, status.estimatedRemainingSeconds)
        self._measure(now)

    def _measure(self, now: float) -> None:
        """Seconds per step by the clock, for trainers that do not report them."""
        step = self.step
        if step is None:
            return
        if self._step_seen is not None and step > self._step_seen[1]:
            self._measured_step_seconds = (now - self._step_seen[0]) / (step - self._step_seen[1])
        if self._step_seen is None or step != self._step_seen[1]:
            self._step_seen = (now, step)

    def number(self, name: str) -> float | None:
        """The latest value of a metric; None if it was never reported or is no finite number."""
        try:
            value = float(self._metrics[name])
        except (KeyError, ValueError):
            return None
        return value if math.isfinite(value) else None

    def _first(self, names: tuple[str, ...]) -> float | None:
        return next((value for name in names if (value := self.number(name)) is not None), None)

    def _count(self, name: str) -> int | None:
        value = self.number(name)
        return int(value) if value is not None and value >= 0 else None

    @property
    def step(self) -> int | None:
        """Optimizer steps made; None before the first word of the trainer."""
        return self._count("current_step")

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps to make in all."""
        return self._count("total_steps")

    @property
    def world_size(self) -> int | None:
        """Training ranks, as the trainer counts them."""
        return self._count("world_size")

    @property
    def seconds_per_step(self) -> float | None:
        """Duration of the last step: as reported, else as measured between updates."""
        for name in ("seconds_per_step", "step_time"):
            if (value := self.number(name)) is not None:
                return value
        return self._measured_step_seconds

    def _remaining_seconds(self) -> int | None:
        if self.last_update is not None and self._remaining is not None and self._remaining[0] == self.last_update:
            return max(0, self._remaining[1])
        if self.step is None or self.total_steps is None or self.seconds_per_step is None:
            return None
        return max(0, round((self.total_steps - self.step) * self.seconds_per_step))

    def _advice(self) -> str | None:
        """The split that would be faster, if the trainer knows one."""
        numbers = {name: self.number(name) for name in ("split/generation_gpus", "step_time", "split/step_time")}
        return advice_text({name: value for name, value in numbers.items() if value is not None})

    def _weight_transfer(self) -> str | None:
        """The way of the weights, with the speed of the last sync."""
        if self.transfer is None:
            return None
        sent, seconds = self.number("sync/bytes"), self.number("sync/total_s")
        return self.transfer.describe(sent / 1e9 / seconds if sent is not None and seconds else None)

    def report(self) -> LauncherReport:
        """The progress document."""
        readings = {field: self._first(names) for field, names in READINGS.items()}
        seconds = self.seconds_per_step
        step, total = self.step, self.total_steps
        progress = Progress(
            step=step,
            total_steps=total,
            **{field: None if value is None else f"{value:.4g}" for field, value in readings.items()},
            advice=self._advice(),
            weight_transfer=self._weight_transfer(),
            seconds_per_step=None if seconds is None else f"{seconds:.4g}",
            remaining_seconds=self._remaining_seconds(),
            policy_version=self._count("policy_version"),
            world_size=self.world_size,
            checkpoint_step=None if self.checkpoint is None else self.checkpoint[0],
            checkpoint_time=None if self.checkpoint is None else _timestamp(datetime.fromtimestamp(self.checkpoint[1], UTC)),
            last_updated=self._updated or None,
        )
        phase = "ended" if self.ended else "training" if step else "starting"
        return LauncherReport(
            phase=phase,
            generator_ready=self.generator_ready,
            overdue=self.overdue,
            progress=progress,
            startup=self.startup,
            metrics=self._metrics,
        )


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
