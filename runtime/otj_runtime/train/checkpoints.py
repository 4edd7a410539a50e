"""Checkpoints that are complete or invisible.

transformers writes a checkpoint file by file into its final folder; a pod that dies in between leaves half of one, and picking it
as "the latest" is how a resume goes wrong. So it is written below `.incomplete/` and renamed when every rank is done.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

INCOMPLETE = ".incomplete"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints in `output`, oldest step first."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the most steps, if there is any."""
    found = complete_checkpoints(output)
    return found[-1] if found else None


def publish_checkpoint(output: Path, step: int) -> Path:
    """Make the finished `.incomplete/checkpoint-<step>` visible. A complete one of the same step is replaced."""
    name = f"checkpoint-{step}"
    target = output / name
    if target.exists():
        shutil.rmtree(target)
    (output / INCOMPLETE / name).rename(target)
    return target


def remove_old_checkpoints(output: Path, *, keep: int | None) -> None:
    """Leave the newest `keep` complete checkpoints; None keeps all."""
    if keep is None:
        return
    for path in complete_checkpoints(output)[: -max(1, keep)]:
        shutil.rmtree(path)
