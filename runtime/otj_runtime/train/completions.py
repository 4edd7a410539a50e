"""The table of completions: every completion of every step, with what it earned, as parquet for people and notebooks.

    groups of each generation, on every rank -> rows -> gathered at the log line -> <output>/completions/completions_00005.parquet

Names and columns are TRL's (step, prompt, completion, one per reward function, extra ones, advantage), so what reads its tables reads
these. It is written only with `log_completions`: a large run makes many.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from accelerate.utils import gather_object

from otj_runtime.rollout.types import Group

FOLDER = "completions"


class CompletionTable:
    """Collects completions between two log lines.

    Args:
        output: the output folder.
    """

    def __init__(self, output: Path) -> None:
        self._folder = output / FOLDER
        self._rows: list[dict[str, Any]] = []

    def add(self, groups: list[Group], advantages: Mapping[int, float]) -> None:
        """Note the completions of `groups`. `advantages`: by the id of the completion's object; one that is left out has none."""
        for group in groups:
            for i, completion in enumerate(group.completions):
                scores = {name: values[i] for name, values in (group.scores | group.extra).items()}
                row = {"prompt": group.sample["prompt"], "completion": group.texts[i], **scores}
                self._rows.append(row | {"advantage": advantages.get(id(completion))})

    def write(self, step: int, *, first: bool) -> None:
        """Write what was noted on all ranks as the table of `step`, on the rank that is `first`. Collective."""
        rows: list[dict[str, Any]] = gather_object(self._rows)
        self._rows = []
        if not first or not rows:
            return
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {"step": [step] * len(rows)} | {name: [row.get(name) for row in rows] for name in names if name != "advantage"}
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"completions_{step:05d}.parquet"
        draft = path.with_name(f".{path.name}")
        pyarrow.parquet.write_table(pyarrow.table(columns | {"advantage": [row["advantage"] for row in rows]}), draft)
        draft.replace(path)
