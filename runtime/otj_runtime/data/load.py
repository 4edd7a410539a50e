"""Prompts of a job: a built-in task, a JSONL file, other files or names that `datasets` knows - all read the same way afterwards.

    source -> rows (anything with a length and an index) and their columns -> Prompts, which renames columns as rows are read
           -> a stream, which has neither length nor index               -> Stream, renamed alike

What is loaded here stays where it is, memory-mapped or on disk; `prepare` encodes it and decides about rows that are too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.jsonl import JsonLines
from otj_runtime.data.rows import RowSequence
from otj_runtime.data.tasks import Sample, make_samples
from otj_runtime.pod.errors import DatasetInvalid

PROMPT = "prompt"

SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` leaves for one dataset, and for one with splits."""

FORMATS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
"""Single files that `datasets` reads; any other file is taken for JSONL."""


class Rows(Protocol):
    """Dictionaries by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Prompts(RowSequence[Sample]):
    """Rows under the names that the run uses.

    Args:
        rows: the source's rows.
        renamed: the run's name -> the source's name, which is not visible any more.
        source: what people call the source, if it has a name.
    """

    def __init__(self, rows: Rows, renamed: dict[str, str], *, source: str | None = None) -> None:
        self.source = source
        self._rows = rows
        self._renamed = renamed

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Sample:
        """See `RowSequence`."""
        return _rename(self._rows[index], self._renamed)


@dataclass(frozen=True)
class Stream:
    """Rows that can only be read from the beginning, as often as one likes.

    Attributes:
        source: the dataset's name for messages.
        open: starts pass number `n` over the rows, from 0.
    """

    source: str
    open: Callable[[int], Iterator[Sample]]


def load_prompts(spec: DatasetSpec, *, seed: int, split: str | None = None, limit: int | None = None) -> Prompts | Stream:
    """The rows to train on: dictionaries with `prompt` (text, or messages) and whatever columns the rewards read.

    Args:
        spec: the job's dataset.
        seed: of built-in tasks, unless `spec.args` has one, and of a stream's shuffling.
        split: another split than `spec.split`.
        limit: of a JSONL file, check and offer so many rows only.

    Raises:
        DatasetInvalid: if it cannot be found or read, is empty, or lacks a column.
    """
    source, rows, columns = _open(spec, seed, split or spec.split, limit)
    if spec.streaming:
        if (first := next(iter(rows), None)) is None:
            raise DatasetInvalid(f"{source} has no rows: training needs at least one prompt")
        columns = list(first)
    elif not len(rows):
        raise DatasetInvalid(f"{source} has no rows: training needs at least one prompt")
    _check_columns(source, columns, spec.columns)
    return _stream(source, rows, spec.columns, seed) if spec.streaming else Prompts(rows, spec.columns, source=source)


def _check_columns(source: str, columns: list[str], renamed: dict[str, str]) -> None:
    for name, column in renamed.items():
        if column not in columns:
            raise DatasetInvalid(f"{source} has no column {column}, which dataset.columns.{name} names; it has {', '.join(columns)}")
    if PROMPT not in renamed and PROMPT not in columns:
        raise DatasetInvalid(
            f"{source} has no column {PROMPT}; it has {', '.join(columns)}: name the one with the prompts in dataset.columns.{PROMPT}"
        )


def prompts_of(dataset: Any, *, seed: int) -> Prompts | Stream:
    """The same from an object of a Python script: a dataset of `datasets`, streaming or not, or a list of dictionaries.

    Raises:
        DatasetInvalid: if it is empty or lacks the column `prompt`.
    """
    source = f"train_dataset ({type(dataset).__name__})"
    streaming = not hasattr(dataset, "__len__")
    first = next(iter(dataset), None) if streaming else dataset[0] if len(dataset) else None
    if first is None:
        raise DatasetInvalid(f"{source} has no rows: training needs at least one prompt")
    _check_columns(source, list(first), {})
    return _stream(source, dataset, {}, seed) if streaming else Prompts(dataset, {})


SHUFFLE_BUFFER = 1000
"""Rows of a stream among which the next one is drawn."""


def _stream(source: str, dataset: Any, renamed: dict[str, str], seed: int) -> Stream:
    def start(number: int) -> Iterator[Sample]:
        shuffled = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if hasattr(dataset, "shuffle") else dataset
        if hasattr(shuffled, "set_epoch"):
            shuffled.set_epoch(number)
        return (_rename(row, renamed) for row in shuffled)

    return Stream(source, start)


def _rename(row: Sample, renamed: dict[str, str]) -> Sample:
    hidden = set(renamed.values())
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {name: row[source] for name, source in renamed.items()}


def held_out_prompts(spec: DatasetSpec, *, seed: int = 0) -> Sequence[Sample]:
    """The rows kept for measuring: the job's `evalSplit`, or those that a built-in task keeps; none otherwise.

    Raises:
        DatasetInvalid: as `load_prompts`, and if the dataset has no splits: then what is measured would be what is trained on.
    """
    if spec.task is not None:
        return Prompts(make_samples(spec.task, spec.args, seed=0).held_out, spec.columns)
    if spec.eval_split is None:
        return []
    path = Path(spec.path) if spec.path is not None else None
    if path is not None and (path.is_file() or (path / SAVED_DATASET).is_file()):
        raise DatasetInvalid(
            f"dataset.evalSplit: {path} is one split, and trained on; give a folder with a file for each, such as train.jsonl and "
            f"{spec.eval_split}.jsonl"
        )
    whole = spec.model_copy(update={"streaming": False})
    found = load_prompts(whole, seed=seed, split=spec.eval_split)
    assert isinstance(found, Prompts)
    return found


def _open(spec: DatasetSpec, seed: int, split: str, limit: int | None) -> tuple[str, Any, list[str]]:
    """The dataset's name for messages, its rows, and their columns; a stream's columns are not known yet."""
    if spec.task is not None:
        rows = make_samples(spec.task, spec.args, seed=seed).train
        return f"task {spec.task}", rows, list(rows[0]) if len(rows) else []
    path = Path(spec.path) if spec.path is not None else None
    if path is not None and path.is_file() and path.suffix not in FORMATS and not spec.streaming:
        lines = JsonLines(path, limit=limit)
        return str(path), lines, lines.column_names
    dataset = _load_dataset(spec, split)
    return f"dataset {spec.path or spec.name} (split {split})", dataset, list(dataset.column_names or [])


def _load_dataset(spec: DatasetSpec, split: str) -> Any:
    """The split of `spec`, read by `datasets`; `spec.args` are further arguments of its loader."""
    import datasets

    path = Path(spec.path) if spec.path is not None else None
    if path is not None and not path.exists():
        raise DatasetInvalid(f"dataset.path {path} does not exist: check it, and the volume mounted there")
    try:
        if path is not None and any((path / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS)):
            saved = _split(datasets.load_from_disk(str(path)), spec, split)
            return saved.to_iterable_dataset() if spec.streaming else saved
        if path is not None and path.is_file():
            kind = FORMATS.get(path.suffix, "json")  # a single file is one split, whatever the job calls it
            return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=spec.streaming, **spec.args)
        return datasets.load_dataset(str(path or spec.name), split=split, streaming=spec.streaming, **spec.args)
    except DatasetInvalid:
        raise
    except Exception as error:  # the loaders of `datasets` raise whatever their formats' readers do
        words = " ".join(str(error).split())[:600]
        raise DatasetInvalid(f"dataset {path or spec.name} (split {split}) cannot be loaded: {type(error).__name__}: {words}") from error


def _split(saved: Any, spec: DatasetSpec, split: str) -> Any:
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise DatasetInvalid(f"dataset {spec.path} has no split {split}; it has {', '.join(saved)}")
    return saved[split]
