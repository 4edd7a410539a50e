"""The folder of a run: who may use it and what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from otj_runtime.local.folder import RunFolder
from otj_runtime.local.options import UsageError
from tests.unit.local.jobs import job


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def used(folder: RunFolder) -> None:
    """Let a run of the usual job leave a checkpoint, a cache and a log."""
    with folder.held(job(), clean=False):
        (folder.output / "checkpoint-3").mkdir()
        (folder.output / ".cache").mkdir()
        folder.log("trainer").touch()
        (folder.shared_memory / "mailbox").touch()


def test_the_same_job_goes_on_where_it_was(folder: RunFolder) -> None:
    used(folder)
    with folder.held(job(training={"max_steps": 9}), clean=False):
        assert (folder.output / "checkpoint-3").is_dir()
        assert not folder.log("trainer").exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (job(name="other"), "metadata.name"),
        (job(model={"path": "/other"}), "spec.model"),
        (job(dataset={"task": "reverse"}), "spec.dataset"),
        (job(algorithm="OnlineDPO"), "spec.algorithm"),
    ],
)
def test_a_different_job_is_kept_out_of_the_checkpoints(folder: RunFolder, other: object, named: str) -> None:
    used(folder)
    with pytest.raises(UsageError, match=f"holds another run \\({named} differ"), folder.held(other, clean=False):  # type: ignore[arg-type]
        pass


def test_clean_starts_over_but_keeps_caches(folder: RunFolder) -> None:
    used(folder)
    with folder.held(job(name="other"), clean=True):
        assert [entry.name for entry in folder.output.iterdir()] == [".cache"]


def test_two_runs_at_once_are_refused(folder: RunFolder) -> None:
    with (
        folder.held(job(), clean=False),
        pytest.raises(UsageError, match="in use by another"),
        RunFolder(folder.root).held(job(), clean=False),
    ):
        pass


def test_shared_memory_ends_with_the_run_and_a_killed_runs_is_found_by_the_next(folder: RunFolder) -> None:
    folder.shared_memory.mkdir()
    (folder.shared_memory / "stale").touch()
    with folder.held(job(), clean=False):
        assert list(folder.shared_memory.iterdir()) == []
    assert not folder.shared_memory.exists()
