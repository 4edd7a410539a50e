"""How a run fails: one exception with a reason, one exit code per cause, and the note that tells the operator.

A training rank raises `RunError`; its process writes a `FailureNote` into the run directory, because `accelerate launch` turns
every exit code into 1. The launcher reads the first note, writes it as the container's termination message and exits with the
code of its reason. So the cause survives the processes, needs no network, and podFailurePolicy can tell a user's error from bad luck.
"""

from __future__ import annotations

import json
import os
import time
from enum import IntEnum
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from otj_runtime.api import Progress, Reason, ToldModel


class RunError(Exception):
    """The run cannot go on. Subclasses set `reason`; the text says what was wrong, where, and the fix."""

    reason: ClassVar[Reason] = Reason.TRAINER_CRASHED


class InvalidSpec(RunError):
    """The resolved configuration does not fit what was found in the pod."""

    reason = Reason.INVALID_SPEC


class ModelNotFound(RunError):
    """The model's folder or name leads nowhere."""

    reason = Reason.MODEL_NOT_FOUND


class DatasetInvalid(RunError):
    """The dataset cannot be loaded, or a sample of it cannot be used."""

    reason = Reason.DATASET_INVALID


class RewardImportFailed(RunError):
    """A reward function cannot be imported or bound to its arguments."""

    reason = Reason.REWARD_IMPORT_FAILED


class RewardFailed(RunError):
    """A reward function raised, hung, or returned the wrong thing."""

    reason = Reason.REWARD_FAILED


class WorldSizeMismatch(RunError):
    """Another number of training ranks came up than the job asked for."""

    reason = Reason.WORLD_SIZE_MISMATCH


class NoNewCheckpoint(RunError):
    """The run failed again and again at the same step, and another pod would start from the same checkpoint."""

    reason = Reason.NO_NEW_CHECKPOINT


class GeneratorNotReady(RunError):
    """The generator did not answer before its deadline."""

    reason = Reason.GENERATOR_NOT_READY


class GeneratorLost(RunError):
    """The generator stopped answering and did not come back before its deadline."""

    reason = Reason.GENERATOR_LOST


class Stalled(RunError):
    """Nothing moved within a deadline; the text names what was waited for."""

    reason = Reason.STALLED


class Terminated(RunError):
    """The process was told to stop."""

    reason = Reason.TERMINATED


class ExitCode(IntEnum):
    """Exit codes of the trainer container. 64 to 79: the user's input, never retried; 80 to 99: retried up to backoffLimit, but
    TERMINATED, which is what a pod answers that was told to stop, is not counted.

    The model container uses the same codes.
    """

    SUCCESS = 0
    INVALID_SPEC = 64
    MODEL_NOT_FOUND = 65
    DATASET_INVALID = 66
    REWARD_IMPORT_FAILED = 67
    REWARD_FAILED = 68
    WORLD_SIZE_MISMATCH = 69
    WEIGHTS_DIVERGED = 70
    NO_NEW_CHECKPOINT = 71
    GENERATOR_NOT_READY = 80
    GENERATOR_LOST = 81
    WEIGHT_SYNC_FAILED = 82
    TRAINER_CRASHED = 83
    STALLED = 84
    TERMINATED = 85

    @property
    def permanent(self) -> bool:
        """Whether another pod would fail the same way."""
        return 64 <= self < 80

    @property
    def reason(self) -> Reason:
        """The reason with this code's name."""
        return Reason.FINISHED if self is ExitCode.SUCCESS else Reason[self.name]


def exit_code(reason: Reason) -> ExitCode:
    """The exit code of a failure reason.

    Raises:
        KeyError: if no process ends with this reason.
    """
    return ExitCode[reason.name]


class FailureNote(ToldModel):
    """Why a run ended, as one JSON line: the container's termination message."""

    reason: Reason
    message: str = Field(max_length=3500, description="Termination messages hold 4096 bytes.")
    rank: int | None = None
    time: float = 0.0
    progress: Progress | None = Field(
        None, description="How far the run was; the launcher's word, nobody can pull it from the port any more."
    )

    @classmethod
    def of(cls, error: BaseException, *, rank: int | None = None) -> FailureNote:
        """The note of an exception; anything but a RunError counts as a crash."""
        reason = error.reason if isinstance(error, RunError) else Reason.TRAINER_CRASHED
        text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        return cls(reason=reason, message=text[:3500] or reason.advice, rank=rank, time=time.time())

    def write(self, directory: Path) -> None:
        """Leave the note in `directory` whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        name = "failure.json" if self.rank is None else f"failure-{self.rank}.json"
        draft = directory / f".{name}.{os.getpid()}"
        draft.write_text(self.to_json())
        draft.replace(directory / name)

    def to_json(self) -> str:
        """The note as one line."""
        return json.dumps(self.to_wire())

    @classmethod
    def first(cls, directory: Path) -> FailureNote | None:
        """The earliest note in `directory`: later ones tell of ranks that failed because the first did."""
        notes = [cls.model_validate_json(path.read_text()) for path in sorted(directory.glob("failure*.json"))]
        return min(notes, key=lambda note: note.time, default=None)
