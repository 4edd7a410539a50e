"""Prompts of a job: a built-in task, a JSONL file, a folder or a name that `datasets` knows - all read the same way afterwards.

    source -> rows (anything with a length and an index) and their columns -> Prompts, which renames columns as rows are read

Files are read whole and checked line by line, because a bad line must be named before training, not at step 500; what `datasets`
loads stays memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, overload

from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.tasks import Sample, make_samples
from otj_runtime.pod.errors import DatasetInvalid

PROMPT = "prompt"

SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` leaves for one dataset, and for one with splits."""


class Rows(Protocol):
    """Dictionaries by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Prompts(Sequence[Sample]):
    """Rows under the names that the run uses.

    Args:
        rows: the source's rows.
        renamed: the run's name -> the source's name, which is not visible any more.
    """

    def __init__(self, rows: Rows, renamed: dict[str, str]) -> None:
        self._rows = rows
        self._renamed = renamed

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        hidden = set(self._renamed.values())
        kept = {name: value for name, value in row.items() if name not in hidden}
        return kept | {name: row[source] for name, source in self._renamed.items()}


def load_prompts(spec: DatasetSpec, *, seed: int) -> Prompts:
    """The rows to train on: dictionaries with `prompt` (text, or messages) and whatever columns the rewards read.

    Args:
        spec: the job's dataset.
        seed: of built-in tasks, unless `spec.args` has one.

    Raises:
        DatasetInvalid: if it cannot be found or read, is empty, or lacks a column.
    """
    source, rows, columns = _open(spec, seed)
    if not len(rows):
        raise DatasetInvalid(f"{source} has no rows: training needs at least one prompt")
    for name, column in spec.columns.items():
        if column not in columns:
            raise DatasetInvalid(f"{source} has no column {column}, which dataset.columns.{name} names; it has {', '.join(columns)}")
    if PROMPT not in spec.columns and PROMPT not in columns:
        raise DatasetInvalid(
            f"{source} has no column {PROMPT}; it has {', '.join(columns)}: name the one with the prompts in dataset.columns.{PROMPT}"
        )
    return Prompts(rows, spec.columns)


def held_out_prompts(spec: DatasetSpec) -> list[Sample]:
    """The rows that a built-in task keeps for measuring; none for other datasets."""
    if spec.task is None:
        return []
    return Prompts(make_samples(spec.task, spec.args, seed=0).held_out, spec.columns)[:]


def _open(spec: DatasetSpec, seed: int) -> tuple[str, Rows, list[str]]:
    """The dataset's name for messages, its rows, and their columns."""
    if spec.task is not None:
        rows = make_samples(spec.task, spec.args, seed=seed).train
        return f"task {spec.task}", rows, _columns(rows)
    if spec.path is not None and Path(spec.path).is_file():
        rows = read_jsonl(Path(spec.path))
        return spec.path, rows, _columns(rows)
    dataset = _load_dataset(spec)
    return f"dataset {spec.path or spec.name} (split {spec.split})", dataset, list(dataset.column_names)


def _columns(rows: list[Sample]) -> list[str]:
    return list(rows[0]) if rows else []


def read_jsonl(path: Path) -> list[Sample]:
    """The objects in `path`, one a line; blank lines do not count. A column that a line lacks is None there.

    Raises:
        DatasetInvalid: naming the line that is no JSON object.
    """
    rows = []
    try:
        # Not splitlines(): JSON strings may hold characters that it takes for the end of a line.
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append(_parse_line(line, path, number))
    except UnicodeDecodeError as error:
        raise DatasetInvalid(
            f"{path} is no JSONL file: it is no UTF-8 text ({error.reason} at byte {error.start}). {_OTHER_FILES}"
        ) from error
    except OSError as error:
        raise DatasetInvalid(f"{path} cannot be read: {error.strerror}") from error
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


_OTHER_FILES = "For other formats, give the folder that holds the file"


def _parse_line(line: str, path: Path, number: int) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DatasetInvalid(f"{path}, line {number} is no JSON: {error}; it begins {line[:80]!r}. {_OTHER_FILES}") from error
    if not isinstance(row, dict):
        raise DatasetInvalid(f'{path}, line {number} is a {type(row).__name__}, not an object like {{"prompt": ...}}: {line[:80]!r}')
    return row


def _load_dataset(spec: DatasetSpec) -> Any:
    """The split of `spec`, read by `datasets`; `spec.args` are further arguments of its loader."""
    import datasets

    folder = Path(spec.path) if spec.path is not None else None
    if folder is not None and not folder.exists():
        raise DatasetInvalid(f"dataset.path {folder} does not exist: check it, and the volume mounted there")
    try:
        if folder is not None and any((folder / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS)):
            return _split(datasets.load_from_disk(str(folder)), spec)
        return datasets.load_dataset(str(folder or spec.name), split=spec.split, **spec.args)
    except DatasetInvalid:
        raise
    except Exception as error:  # the loaders of `datasets` raise whatever their formats' readers do
        words = " ".join(str(error).split())[:600]
        raise DatasetInvalid(
            f"dataset {folder or spec.name} (split {spec.split}) cannot be loaded: {type(error).__name__}: {words}"
        ) from error


def _split(saved: Any, spec: DatasetSpec) -> Any:
    if not isinstance(saved, dict):
        return saved
    if spec.split not in saved:
        raise DatasetInvalid(f"dataset {spec.path} has no split {spec.split}; it has {', '.join(saved)}")
    return saved[spec.split]
