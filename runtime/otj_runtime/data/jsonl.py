"""JSONL files as rows by index: checked once from beginning to end, then read line by line where they lie.

    file -> one pass: every line parsed, its offset kept, columns gathered -> rows parsed again when they are asked for

A bad line must be named before training, not at step 500, so all are parsed; only the offsets stay in memory, 8 bytes a row, because
every training rank holds the dataset and a file may have millions of rows.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from otj_runtime.pod.errors import DatasetInvalid

_OTHER_FILES = "For other formats, give the folder that holds the file"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines:
    """The objects in a file, one a line; blank lines do not count. A column that a line lacks is None there.

    Args:
        path: the file, UTF-8.
        limit: look at so many rows only. Default: all.

    Raises:
        DatasetInvalid: naming the line that is no JSON object.
    """

    def __init__(self, path: Path, *, limit: int | None = None) -> None:
        self._path = path
        self._offsets = array("q")
        self._columns: dict[str, None] = {}
        try:
            self._check(limit)
        except OSError as error:
            raise DatasetInvalid(f"{path} cannot be read: {error.strerror}") from error

    @property
    def column_names(self) -> list[str]:
        """Every name that some line has, in the order in which they appear."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            row = json.loads(file.readline().decode())
        return {name: row.get(name) for name in self._columns}

    def _check(self, limit: int | None) -> None:
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(_BYTE_ORDER_MARK):
                    offset, line = len(_BYTE_ORDER_MARK), line[len(_BYTE_ORDER_MARK) :]
                if line.strip():
                    self._columns |= dict.fromkeys(_parse_line(line, self._path, number))
                    self._offsets.append(offset)
                if limit is not None and len(self._offsets) >= limit:
                    return
                offset += len(line)


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DatasetInvalid(
            f"{path}, line {number} is no UTF-8 text ({error.reason} at its byte {error.start}), so this is no JSONL file. {_OTHER_FILES}"
        ) from error
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DatasetInvalid(f"{path}, line {number} is no JSON: {error}; it begins {text[:80]!r}. {_OTHER_FILES}") from error
    if not isinstance(row, dict):
        raise DatasetInvalid(f'{path}, line {number} is a {type(row).__name__}, not an object like {{"prompt": ...}}: {text[:80]!r}')
    return row
