"""Prompts that can be trained on: encoded once, and rows that are too long refused or dropped before the first step.

    Prompts --rank 0 of the node--> token ids of all prompts, flat, in a file --mapped by every rank--> TokenizedPrompts
    Stream  --every rank, row by row--> StreamedPrompts

A prompt is encoded once on each node: ranks share the ids as a memory-mapped file, 4 bytes a token, and generator and trainer take them
from the row. A stream cannot be looked through beforehand: each rank encodes its rows as it reads them, and the rule for long ones is
applied then. It is offered as a sequence without end, so that order, ranks and resuming need nothing new: a row's index is its place
among the rows kept, whoever reads it, and a rank that resumes reads past the rows of earlier steps.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from otj_runtime.data.load import Prompts, Stream
from otj_runtime.data.rows import RowSequence
from otj_runtime.data.tasks import Sample
from otj_runtime.data.tokenize import PROMPT_IDS, PromptEncoder
from otj_runtime.pod.errors import DatasetInvalid

log = logging.getLogger(__name__)

BATCH = 1024
"""Rows that are encoded together."""

ENDLESS = 1 << 40
"""Length of a stream: more rows than any run reads."""


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """What happens to a prompt of more than `max_tokens` tokens (None: no limit)."""

    max_tokens: int | None = None
    overlong: Literal["refuse", "drop"] = "refuse"

    def keeps(self, where: str, length: int) -> bool:
        """Whether a prompt of `length` tokens is trained on.

        Raises:
            DatasetInvalid: naming `where`, the length and the limit, if it is too long and such rows are refused.
        """
        if self.max_tokens is None or length <= self.max_tokens:
            return True
        if self.overlong == "drop":
            return False
        raise DatasetInvalid(
            f"{where}: its prompt has {length} tokens, the limit is {self.max_tokens} (the smaller of training.max_prompt_length and "
            "generation.maxModelLen - training.max_completion_length): raise it, remove the sample, or set training.overlong_prompts to drop"
        )


class TokenizedPrompts(RowSequence[Sample]):
    """Rows with their token ids under `PROMPT_IDS`.

    Args:
        prompts: the rows.
        kept: [rows kept] int64, their indices in `prompts`.
        ids: [tokens] int32, all prompts' tokens one after the other.
        ends: [rows kept] int64, where each prompt's tokens end in `ids`.
    """

    def __init__(self, prompts: Sequence[Sample], *, kept: np.ndarray, ids: np.ndarray, ends: np.ndarray) -> None:
        self._prompts = prompts
        self._kept = kept
        self._ids = ids
        self._ends = ends

    @property
    def dropped(self) -> int:
        """Rows that were left out because they are too long."""
        return len(self._prompts) - len(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def row(self, index: int) -> Sample:
        """See `RowSequence`."""
        begin = int(self._ends[index - 1]) if index else 0
        return {**self._prompts[int(self._kept[index])], PROMPT_IDS: self._ids[begin : int(self._ends[index])].tolist()}


class StreamedPrompts(RowSequence[Sample]):
    """A stream as a sequence of `ENDLESS` rows, begun again whenever it ends. Cheap to read forwards; going back begins again."""

    def __init__(self, stream: Stream, encoder: PromptEncoder, rule: LengthRule) -> None:
        self._stream = stream
        self._encoder = encoder
        self._rule = rule
        self._rows: Iterator[Sample] | None = None
        self._next = 0
        self.dropped = 0

    def __len__(self) -> int:
        return ENDLESS

    def row(self, index: int) -> Sample:
        """See `RowSequence`."""
        if self._rows is None or index < self._next:
            self._rows, self._next, self.dropped = self._read(), 0, 0
        for row in self._rows:
            self._next += 1
            if self._next > index:
                return row
        raise AssertionError("a stream begins again when it ends")

    def _read(self) -> Iterator[Sample]:
        number = 0
        while True:
            found = 0
            for place, row in enumerate(self._stream.open(number)):
                where = f"{self._stream.source}, row {place} of pass {number}"
                try:
                    ids = self._encoder.encode_row(row)
                except DatasetInvalid as error:
                    raise DatasetInvalid(f"{where}: {error}") from error
                if self._rule.keeps(where, len(ids)):
                    found += 1
                    yield {**row, PROMPT_IDS: ids}
                else:
                    self.dropped += 1
            if not found:
                raise DatasetInvalid(f"{self._stream.source}: no prompt has at most {self._rule.max_tokens} tokens")
            number += 1


def prepare(
    prompts: Prompts | Stream,
    encoder: PromptEncoder,
    rule: LengthRule,
    *,
    folder: Path | None = None,
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> TokenizedPrompts | StreamedPrompts:
    """`prompts` encoded, with every row's length checked by `rule`.

    Args:
        folder: where the ranks of a node share the token ids; None keeps them in this process.
        writes: whether this rank encodes; one of each node does. The others read.
        wait: returns when every rank has called it; called twice.

    Raises:
        DatasetInvalid: naming the first sample that cannot be encoded or is refused; if no row is left; if no prompt could fit.
    """
    if rule.max_tokens is not None and rule.max_tokens < 1:
        raise DatasetInvalid(
            f"no prompt fits: generation.maxModelLen leaves {rule.max_tokens} tokens beside training.max_completion_length; raise it"
        )
    if isinstance(prompts, Stream):
        return StreamedPrompts(prompts, encoder, rule)
    if folder is None:
        return TokenizedPrompts(prompts, **_encode(prompts, encoder, rule))
    if writes:
        _save(folder, _encode(prompts, encoder, rule))
    wait()
    shared = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    wait()
    if writes:  # mapped files live on without their names
        for name in ARRAYS:
            (folder / f"{name}.npy").unlink(missing_ok=True)
    return TokenizedPrompts(prompts, **shared)


ARRAYS = ("kept", "ids", "ends")


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}-", delete=False) as file:
            np.save(file, values)
        Path(file.name).replace(folder / f"{name}.npy")


def _encode(prompts: Sequence[Sample], encoder: PromptEncoder, rule: LengthRule) -> dict[str, np.ndarray]:
    kept: list[int] = []
    lengths: list[int] = []
    chunks: list[np.ndarray] = []
    for first in range(0, len(prompts), BATCH):
        rows = prompts[first : first + BATCH]
        found = encoder.encode_rows(rows, first=first)
        chosen = [i for i, ids in enumerate(found) if rule.keeps(f"sample {first + i}", len(ids))]
        kept += [first + i for i in chosen]
        lengths += [len(found[i]) for i in chosen]
        chunks.append(np.fromiter((token for i in chosen for token in found[i]), dtype=np.int32))
    if not kept:
        raise DatasetInvalid(f"all {len(prompts)} prompts have more than {rule.max_tokens} tokens: nothing is left to train on")
    if len(kept) < len(prompts):
        log.warning("dropped %d of %d prompts: they have more than %d tokens", len(prompts) - len(kept), len(prompts), rule.max_tokens)
    return {"kept": np.array(kept, dtype=np.int64), "ids": np.concatenate(chunks), "ends": np.cumsum(lengths, dtype=np.int64)}
