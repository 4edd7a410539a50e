"""A folder that is made once: whole when its marker says so, made again otherwise.

    build into a draft beside the folder -> move file by file into it -> write the marker

Every move is atomic and makes the same file whoever does it, so two processes at once do no harm, a crash leaves at worst a folder
without a marker, and a file of somebody else's is never removed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

MARKER = ".complete"
"""Name of the file that says what the folder was made from. It is written last."""

CONFIG_FILE = "config.json"
"""Moved last but the marker: many take it for the sign of a whole model."""

FILE_MODE = 0o644
"""Safetensors makes files that only their owner reads, but a pod that mounts the folder runs as somebody else."""


def is_complete(directory: Path, origin: str) -> bool:
    """Whether `directory` was made from `origin`, to the end."""
    marker = directory / MARKER
    return marker.is_file() and marker.read_text() == origin


def mark_complete(directory: Path, origin: str) -> None:
    """Say that `directory` holds everything of `origin`."""
    draft = directory / f"{MARKER}.{uuid4().hex}"
    draft.write_text(origin)
    draft.replace(directory / MARKER)


def make_once(directory: Path, origin: str, build: Callable[[Path], None]) -> None:
    """Fill `directory` with the files that `build` puts into the empty folder it gets, unless it holds them already.

    Args:
        directory: the folder, made if it is missing.
        origin: what it is made from; another origin makes it again.
        build: makes the files; no folders below.
    """
    if is_complete(directory, origin):
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as name:
        draft = Path(name)
        build(draft)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            path.chmod(FILE_MODE)
            path.replace(directory / path.name)
    mark_complete(directory, origin)
