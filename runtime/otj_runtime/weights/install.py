"""Installs a version that lies in the mailbox into the generator.

Any rank can do it, and after a restart of the generator any rank may be the first to notice: a lock file beside the mailbox
makes the others wait, look again, and find it done.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.weights.control import POLL_SECONDS, GeneratorControl
from otj_runtime.weights.errors import WeightSyncFailed


class Phases:
    """Seconds spent in each named phase of one sync."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the duration of the block to phase `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


def install(control: GeneratorControl, mailbox: Path, version: int, phases: Phases) -> None:
    """Bring `version`, the latest in the mailbox, into the generator: init, pause, start, update, finish, reset_prefix_cache, resume.

    Between pause and resume nothing is generated. If a phase fails, resume is still asked for: a generator that is refused new
    weights keeps serving the old ones.

    Raises:
        WeightSyncFailed: naming the phase.
    """
    steps: list[tuple[str, Callable[[], None]]] = [
        ("start", control.start),
        ("update", lambda: control.update(version)),
        ("finish", lambda: control.finish(version)),
        ("reset_prefix_cache", control.reset_prefix_cache),
    ]
    with phases("init"):
        control.init_transfer(str(mailbox))
    try:
        with phases("pause"):
            control.pause()
        for name, step in steps:
            with phases(name):
                step()
    except WeightSyncFailed:
        with suppress(WeightSyncFailed):
            control.resume()
        raise
    with phases("resume"):
        control.resume()


@contextmanager
def only_one(lock: Path, *, deadline_s: float) -> Iterator[None]:
    """Hold the lock file `lock`; the kernel lets go of it when the process ends, however it ends.

    Raises:
        GeneratorLost: if another process holds it longer than `deadline_s` seconds.
    """
    end = time.monotonic() + deadline_s
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise GeneratorLost(f"another rank has been bringing the generator back for {deadline_s:.0f} s") from None
                time.sleep(POLL_SECONDS)
        yield
