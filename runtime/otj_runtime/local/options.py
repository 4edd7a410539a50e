"""What the user of `otj run` may say besides the job, and its parsing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from otj_runtime.api import InvalidJobError, OnlineTrainingJob, load_document, parse_job


class UsageError(ValueError):
    """The command cannot be carried out as given; the text says what to write instead."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of one run."""

    job_file: Path
    run_dir: Path | None = None
    """Folder of the run. Default: runs/<name of the job>."""
    volumes: dict[str, Path] = field(default_factory=dict)
    """Folders in place of volumes, by the volume's name."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every container, over the job's own."""
    clean: bool = False
    """Start over instead of going on from the newest checkpoint."""
    result: Path | None = None
    """File for the result, as JSON."""
    overrides: tuple[str, ...] = ()
    """path=value: fields of the spec to replace."""


def pairs(texts: Iterable[str], *, option: str) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary.

    Raises:
        UsageError: if one has no name or no equals sign.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} {text}: write NAME=VALUE")
        found[name] = value
    return found


def override(document: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`document`, a job, with each `path=value` set below `spec`; values are YAML. The document is changed in place.

    Raises:
        InvalidJobError: if a path leads through something that has no fields.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not path or not equals:
            raise InvalidJobError(f"--set {assignment}: write path=value, such as training.max_steps=5")
        *parents, last = path.removeprefix("spec.").split(".")
        place = document.setdefault("spec", {})
        for name in parents:
            place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise InvalidJobError(f"--set {assignment}: {'.'.join(parents)} is no group of fields")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidJobError(f"--set {assignment}: {text!r} is no YAML value") from error
    return document


def read_job(path: Path, overrides: Iterable[str]) -> OnlineTrainingJob:
    """The job in `path` with fields replaced.

    Raises:
        InvalidJobError: if it is no valid job.
        UsageError: if the file cannot be read.
    """
    try:
        document = load_document(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return parse_job(override(document, overrides))
