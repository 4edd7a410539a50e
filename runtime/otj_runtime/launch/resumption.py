"""What the next pod would start from, and whether starting it makes sense. Reads and writes the output folder, which outlives the pod.

    checkpoint-<step>/   complete ones, seen every few seconds and at the end -> the board -> the operator's CheckpointFresh
    failures.json        one entry per pod of this job that failed while training: its step, and the newest checkpoint then

Several failures at one and the same step, with no checkpoint beyond the first one's, are no bad luck: another pod would make the
same steps again and fail there. Counted here and not by the operator, because here the count lies beside the checkpoints that it
is about, and the exit code reaches podFailurePolicy without anybody else. A pod that was told to stop, or killed without a word, is
not counted; the latter is bounded by backoffLimit.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from pydantic import ValidationError

from otj_runtime.api import ApiModel, Reason
from otj_runtime.launch.board import Board
from otj_runtime.pod.errors import FailureNote, exit_code
from otj_runtime.train.checkpoints import newest_checkpoint

FAILURES_FILE = "failures.json"
SAME_STEP_FAILURES = 3
LOOK_SECONDS = 5.0


class Failure(ApiModel):
    """One pod that failed while training."""

    job: str
    step: int
    checkpoint: int | None


class Failures(ApiModel):
    """The content of failures.json, oldest first."""

    entries: list[Failure]


async def watch_checkpoints(output: Path, board: Board) -> None:
    """Keep the board's checkpoint what the folder holds, for ever."""
    while True:
        board.checkpoint = await asyncio.to_thread(newest_saved, output)
        await asyncio.sleep(LOOK_SECONDS)


def judge_failure(note: FailureNote, *, output: Path, job: str, step: int | None) -> FailureNote:
    """`note`, or the verdict that retrying leads nowhere. Leaves an entry in `output` where the failure counts.

    Args:
        job: identity of the job; empty for one that nobody retries.
        step: optimizer steps made; None or 0 if there was none, which says nothing about checkpoints.
    """
    if not job or not step or note.reason is Reason.TERMINATED or exit_code(note.reason).permanent:
        return note
    newest = newest_saved(output)
    failure = Failure(job=job, step=step, checkpoint=newest[0] if newest else None)
    entries = [*(entry for entry in _read(output / FAILURES_FILE) if entry.job == job), failure][-SAME_STEP_FAILURES:]
    try:
        (output / FAILURES_FILE).write_text(json.dumps(Failures(entries=entries).to_wire()))
    except OSError:
        return note  # a full or lost volume is a failure of its own, which the note may be about
    if len(entries) < SAME_STEP_FAILURES or any(entry != failure for entry in entries):
        return note
    have = "and there is none" if failure.checkpoint is None else f"the newest is still of step {failure.checkpoint}"
    message = f"failed {SAME_STEP_FAILURES} times at step {step} without a new checkpoint ({have}); the last time with {note.reason}: {note.message}"
    return note.model_copy(update={"reason": Reason.NO_NEW_CHECKPOINT, "message": message[:3500]})


def newest_saved(output: Path) -> tuple[int, float] | None:
    """Steps in the newest complete checkpoint and when it was made; None also if it goes away while it is looked at."""
    try:
        path = newest_checkpoint(output)
        return None if path is None else (int(path.name.removeprefix("checkpoint-")), path.stat().st_mtime)
    except OSError:
        return None


def _read(path: Path) -> list[Failure]:
    try:
        return Failures.model_validate_json(path.read_text()).entries
    except (OSError, ValidationError):
        return []
