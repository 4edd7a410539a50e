"""Why a run ended: one failure note out of what the ranks left, what the launcher saw, and what was printed. Pure."""

from __future__ import annotations

import json
from collections import deque

from otj_runtime.api import Reason
from otj_runtime.pod.errors import FailureNote

TERMINATION_BYTES = 4096
"""Kubernetes cuts termination messages there, and cut JSON is no JSON."""

TAIL_LINES = 200
LINE_CHARACTERS = 500
MESSAGE_CHARACTERS = 2500

_TRACEBACK = "Traceback (most recent call last):"
_TORCHRUN_LOG = "torch/distributed/elastic/"
_LAUNCHERS = ("accelerate/commands/launch.py", "torch/distributed/run.py", "torch/distributed/launcher")


class Tail:
    """The last lines of a stream, cut to a length that memory and messages can bear."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._open = ""

    def feed(self, chunk: bytes) -> None:
        """Take in what was printed."""
        *whole, self._open = (self._open + chunk.decode(errors="replace")).split("\n")
        self._open = self._open[-LINE_CHARACTERS:]
        self._lines.extend(line.rstrip("\r")[:LINE_CHARACTERS] for line in whole)

    def lines(self) -> list[str]:
        """The lines, oldest first."""
        return [*self._lines, self._open] if self._open else list(self._lines)


def decide(
    *, status: int, rank_note: FailureNote | None, own_note: FailureNote | None, asked_to_stop: bool, tail: list[str]
) -> FailureNote | None:
    """The cause of the end; None for success. The earliest note counts: later ones tell of what followed.

    Args:
        status: exit status of `accelerate launch`; negative for a signal.
        rank_note: the first note of the ranks.
        own_note: why the launcher ended the ranks, if it did.
        asked_to_stop: whether the launcher was told to stop. If not, a rank that says so was stopped by torchrun after another
            rank had died without a word (killed for memory, say), and that death is the cause.
        tail: the last lines that were printed.
    """
    if rank_note is not None and rank_note.reason is Reason.TERMINATED and not asked_to_stop:
        rank_note = None
    stopped = own_note is not None and own_note.reason is Reason.TERMINATED
    if status == 0 and rank_note is None and (own_note is None or stopped):
        return None  # every rank ended well, though perhaps just when it was told to stop
    if stopped and rank_note is not None and rank_note.reason is Reason.TERMINATED:
        return rank_note  # it says what was saved
    notes = [note for note in (rank_note, own_note) if note is not None]
    return min(notes, key=lambda note: note.time) if notes else crash(status, tail)


def crash(status: int, tail: list[str]) -> FailureNote:
    """The note of ranks that ended without one."""
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return FailureNote(reason=Reason.TRAINER_CRASHED, message=f"training ended with {how}: {digest(tail) or 'nothing was printed'}"[:3500])


def digest(tail: list[str]) -> str:
    """The end of what the ranks printed. Tracebacks of the launchers above them say only that a rank failed, so they are left out,
    as are torchrun's log lines and what several ranks printed alike."""
    blocks: list[list[str]] = [[]]
    for line in tail:
        if _TRACEBACK in line:
            blocks.append([])
        if line.strip() and _TORCHRUN_LOG not in line:
            blocks[-1].append(line)
    different = list(dict.fromkeys(tuple(block) for block in blocks if block))
    of_ranks = [block for block in different if not any(name in line for line in block for name in _LAUNCHERS)]
    return "\n".join(line for block in (of_ranks or different) for line in block)[-MESSAGE_CHARACTERS:]


def termination_message(note: FailureNote) -> str:
    """The note as JSON that fits into a termination message; its message loses its beginning if need be, then it loses the progress."""
    text = note.to_json()
    while (excess := len(text.encode()) - TERMINATION_BYTES) > 0:
        shorter = {"message": note.message[max(1, excess // 6) :]} if note.message else {"progress": None}
        note = note.model_copy(update=shorter)
        text = json.dumps(note.to_wire())
    return text
