"""Which checkpoints count."""

from __future__ import annotations

from pathlib import Path

import pytest

from otj_runtime.train.checkpoints import (
    INCOMPLETE,
    checkpoint_step,
    complete_checkpoints,
    forget_incomplete,
    newest_checkpoint,
    publish_checkpoint,
    remove_old_checkpoints,
)


def incomplete(output: Path, step: int) -> None:
    folder = output / INCOMPLETE / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))


def test_a_checkpoint_is_invisible_until_it_is_whole(tmp_path: Path) -> None:
    incomplete(tmp_path, 10)
    assert newest_checkpoint(tmp_path) is None
    publish_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_newest_checkpoint_has_the_most_steps_not_the_largest_name(tmp_path: Path) -> None:
    for step in (100, 20):
        incomplete(tmp_path, step)
        publish_checkpoint(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


def test_publishing_a_step_again_replaces_it(tmp_path: Path) -> None:
    for _ in range(2):
        incomplete(tmp_path, 5)
        publish_checkpoint(tmp_path, 5)
    assert (tmp_path / "checkpoint-5" / "weights").read_text() == "5"


def test_only_the_newest_are_kept_and_never_none(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        incomplete(tmp_path, step)
        publish_checkpoint(tmp_path, step)
    remove_old_checkpoints(tmp_path, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    remove_old_checkpoints(tmp_path, keep=0)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_folders_that_only_look_like_checkpoints_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-final").mkdir()
    assert complete_checkpoints(tmp_path) == []


def test_what_a_killed_save_left_is_forgotten(tmp_path: Path) -> None:
    incomplete(tmp_path, 5)
    forget_incomplete(tmp_path)
    forget_incomplete(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "step"), [("checkpoint-12", 12), ("checkpoint-", None), ("checkpoint-1a", None), ("model", None)])
def test_the_name_tells_the_step(name: str, step: int | None) -> None:
    assert checkpoint_step(Path("output") / name) == step
