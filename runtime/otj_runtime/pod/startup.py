"""How long the way to the first optimizer step was, by phase.

    pod starts -> model container -+-> launcher -> ranks load the model ----+-> first sync -> first step
                                   +-> vLLM starts with dummy weights ------+

The two sides start beside each other, so the first step cannot come before the slower of them; what it takes beyond that is the first
sync and the step itself. The model container, the first process of the pod, leaves a stamp; without one the launcher's own start counts.
Phases are looked for twice a second, which is as exact as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from otj_runtime.pod.config import PodConfig


def stamp_path(config: PodConfig) -> Path:
    """The file whose content is when the pod's first process began, in seconds since the epoch."""
    return Path(f"{config.run_directory}.began")


def leave_stamp(config: PodConfig) -> None:
    """Note that the pod begins now."""
    path = stamp_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{time.time()}\n")


class StartUp:
    """Seconds from the pod's start to each phase's end, as far as they have come.

    Args:
        began: seconds since the epoch.
        clock: the same, now.
    """

    def __init__(self, began: float, *, clock: Callable[[], float] = time.time) -> None:
        self._began = began
        self._clock = clock
        self.seconds: dict[str, float] = {}

    @classmethod
    def of(cls, config: PodConfig) -> StartUp:
        """That of the pod of `config`; the launcher has just started."""
        try:
            began = float(stamp_path(config).read_text())
        except (OSError, ValueError):
            began = time.time()
        found = cls(began)
        found.look(launcher=True)
        return found

    def look(self, **reached: bool) -> bool:
        """Note the phases that are reached for the first time; whether one was."""
        if reached.get("first_step"):
            # A step needs both sides, even if the generator's next look was not due yet when the step was told.
            reached = dict.fromkeys(reached, True)
        new = {phase: round(self._clock() - self._began, 1) for phase, now in reached.items() if now and phase not in self.seconds}
        self.seconds |= new
        return bool(new)

    def describe(self) -> str:
        """For the log."""
        return ", ".join(f"{phase} {seconds:g} s" for phase, seconds in self.seconds.items())
