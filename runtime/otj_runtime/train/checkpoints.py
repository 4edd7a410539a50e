"""Checkpoints that are complete or invisible.

transformers writes a checkpoint file by file into its final folder; a pod that dies in between leaves half of one, and picking it
as "the latest" is how a resume goes wrong. So it is written below `.incomplete/` and renamed when every rank is done.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

INCOMPLETE = ".incomplete"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(path: Path) -> int | None:
    """Optimizer steps behind the checkpoint at `path`; None if it is none."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def complete_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints in `output`, oldest step first."""
    found = [(step, path) for path in output.glob("checkpoint-*") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found)]


def newest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the most steps, if there is any."""
    found = complete_checkpoints(output)
    return found[-1] if found else None


def forget_incomplete(output: Path) -> None:
    """Remove what a run that was killed while it saved has left."""
    shutil.rmtree(output / INCOMPLETE, ignore_errors=True)


def publish_checkpoint(output: Path, step: int) -> Path:
    """Make the finished `.incomplete/checkpoint-<step>` visible. A complete one of the same step is replaced.

    Its files are on the disk before its name is: a machine that dies must not leave a visible checkpoint of empty files either.
    """
    name = f"checkpoint-{step}"
    target = output / name
    if target.exists():
        remove_checkpoint(target)
    whole = output / INCOMPLETE / name
    for path in (*whole.rglob("*"), whole):
        _to_disk(path)
    whole.rename(target)
    _to_disk(output)
    return target


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(path: Path) -> None:
    """Make a checkpoint invisible, then remove it: what dies in between must not leave half of one in its place."""
    doomed = path.parent / INCOMPLETE / f"removed-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_old_checkpoints(output: Path, *, keep: int | None) -> None:
    """Leave the newest `keep` complete checkpoints; None keeps all."""
    if keep is None:
        return
    for path in complete_checkpoints(output)[: -max(1, keep)]:
        remove_checkpoint(path)
