"""Every task of the package reasoning-gym as a dataset: `reasoning_gym/NAME`, made by rule and verified by rule.

A row is made when it is read, from the seed and its index alone, so that a million of them cost nothing until then. Held-out rows have
the indices after those of training: the generator never starts from the same seed for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from otj_runtime.data.rows import RowSequence
from otj_runtime.pod.errors import DatasetInvalid

PREFIX = "reasoning_gym/"

HELD_OUT = 64

INSTRUCTION = "Think about the task, then give the final answer, and nothing else, between <answer> and </answer>."

Row = dict[str, Any]


class Puzzles(RowSequence[Row]):
    """Rows `first` to `first + count` of a task: prompt, question, answer, metadata."""

    def __init__(self, made: Any, *, first: int, count: int, instruction: str) -> None:
        self._made = made
        self._indices = range(first, first + count)
        self._instruction = instruction

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    def row(self, index: int) -> Row:
        """See `RowSequence`."""
        row = self._made[self._indices[index]]
        system = [{"role": "system", "content": self._instruction}] if self._instruction else []
        return {"prompt": [*system, {"role": "user", "content": row["question"]}], **row}


def make_puzzles(name: str, args: dict[str, Any], *, seed: int) -> tuple[Puzzles, Puzzles]:
    """Rows to train on and rows held out of the task `name`, which begins with PREFIX.

    Args:
        args: `size` (1000 unless given), `seed`, `instruction` (the system message; empty for none), and the task's own settings.
        seed: the seed unless `args` has one.

    Raises:
        DatasetInvalid: if the package is missing, or it does not know the task or a setting.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DatasetInvalid(f"dataset.task {name} needs the package reasoning-gym: install online-training-runtime[tasks]") from error
    task = name.removeprefix(PREFIX)
    if task not in DATASETS:
        close = get_close_matches(task, DATASETS, n=1)
        hint = f"; did you mean {PREFIX}{close[0]}?" if close else f"; there are {', '.join(sorted(DATASETS))}"
        raise DatasetInvalid(f"dataset.task: reasoning-gym has no task {task}{hint}")
    settings = {"seed": seed, "size": 1000} | args
    instruction = settings.pop("instruction", INSTRUCTION)
    size = settings.pop("size")
    try:
        made = reasoning_gym.create_dataset(task, size=size + HELD_OUT, **settings)
        train, held_out = (
            Puzzles(made, first=first, count=count, instruction=instruction) for first, count in ((0, size), (size, HELD_OUT))
        )
        _ = train[0]
    except Exception as error:  # settings are checked by assertions, by constructors, and by making a row
        raise DatasetInvalid(f"dataset.args: reasoning-gym's task {task} refuses {settings}: {type(error).__name__}: {error}") from error
    return train, held_out
