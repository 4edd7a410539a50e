"""Process trees: who descends from whom, and ending all of it. Linux only, standard library only.

torchrun starts every rank in a session of its own, so a signal to a process group reaches no rank. What holds is descent: the
caller becomes a subreaper, orphans are handed to it instead of to init, and a walk over /proc finds everything it ever started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

KILL_SECONDS = 10.0
"""How long SIGKILLed processes may take to vanish; only a process stuck in the kernel needs longer."""


def become_subreaper() -> None:
    """Make orphaned descendants children of this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int, *, parent: int) -> None:
    """Have this process get signal `number` when its parent ends, also when the parent, `parent`, has ended already."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def _table() -> dict[int, tuple[int, str]]:
    """Parent and state letter of every process."""
    table = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The command's name stands in parentheses and may hold anything.
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            table[int(entry)] = (int(parent), state)
    return table


def children(pid: int) -> list[int]:
    """Living children of `pid`."""
    return [child for child, (parent, state) in _table().items() if parent == pid and state != "Z"]


def zombies() -> set[int]:
    """Children of this process that ended and were not waited for."""
    return {child for child, (parent, state) in _table().items() if parent == os.getpid() and state == "Z"}


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, parents before their children."""
    table = _table()
    found = [pid]
    for ancestor in found:
        found.extend(child for child, (parent, _) in table.items() if parent == ancestor)
    return [child for child in found[1:] if table[child][1] != "Z"]


def signal_all(pids: list[int], number: int) -> None:
    """Send signal `number` to each; those that have ended are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap(pids: set[int]) -> None:
    """Take the exit statuses of these children, so that they leave the process table."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def kill_descendants() -> list[int]:
    """SIGKILL everything below this process, again until nothing is left, because a process may start another meanwhile.

    Returns:
        What was still there after KILL_SECONDS; normally nothing.
    """
    deadline = time.monotonic() + KILL_SECONDS
    while left := descendants(os.getpid()):
        if time.monotonic() > deadline:
            return left
        signal_all(left, signal.SIGKILL)
        time.sleep(0.02)
    return []
