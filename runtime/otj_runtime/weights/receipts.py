"""Receipts: what each worker of the generator tells the trainer through the mailbox file, without a request.

    worker   stages tensors beside decoding -> put(STAGED, sequence), or put(FAILED, sequence, text)
    trainer  waits for the receipt of every worker, then asks for the installation

A receipt is one small block per worker. The text is stored before the state and the state before the sequence, and only one side
stores, so a trainer that sees the sequence sees the rest (both run on one host, whose stores become visible in order).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import RECEIPT_BYTES, WORKERS, Layout

_HEAD = struct.Struct("<QQ")  # sequence, state
POLL_SECONDS = 0.0001


class State(IntEnum):
    """How far a worker is with a sequence."""

    NONE = 0
    STAGED = 1
    FAILED = 2


@dataclass(frozen=True)
class Receipt:
    """State of one worker for one sequence; `text` says what failed."""

    sequence: int
    state: State
    text: str = ""


class Receipts:
    """The receipts of one mailbox file.

    Args:
        data: the file, mapped so that others see what is stored.
    """

    def __init__(self, data: memoryview, layout: Layout) -> None:
        self._data = data
        self._offset = layout.receipts_offset

    def clear(self) -> None:
        """Forget all of them. The trainer's rank 0 only, before workers are told of a new sequence."""
        self._data[self._offset : self._offset + WORKERS * RECEIPT_BYTES] = bytes(WORKERS * RECEIPT_BYTES)

    def put(self, worker: int, receipt: Receipt) -> None:
        """Store what `worker` has to say."""
        offset = self._offset + worker * RECEIPT_BYTES
        text = receipt.text.encode()[: RECEIPT_BYTES - _HEAD.size]
        self._data[offset + _HEAD.size : offset + RECEIPT_BYTES] = text.ljust(RECEIPT_BYTES - _HEAD.size, b"\0")
        self._data[offset + 8 : offset + 16] = int(receipt.state).to_bytes(8, "little")
        self._data[offset : offset + 8] = receipt.sequence.to_bytes(8, "little")

    def get(self, worker: int) -> Receipt:
        """What `worker` said last."""
        offset = self._offset + worker * RECEIPT_BYTES
        sequence, state = _HEAD.unpack_from(self._data, offset)
        text = bytes(self._data[offset + _HEAD.size : offset + RECEIPT_BYTES]).rstrip(b"\0") if state == State.FAILED else b""
        return Receipt(sequence=sequence, state=State(state), text=text.decode(errors="replace"))

    def wait(self, *, sequence: int, workers: int, deadline_s: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Return when every worker has staged `sequence`.

        Args:
            alive: asked once a second, because a generator that died says nothing more.

        Raises:
            WeightSyncFailed: with the text of the first worker that failed, or when `deadline_s` seconds have passed.
        """
        end, ask = time.monotonic() + deadline_s, time.monotonic() + 1
        for worker in range(workers):
            while (receipt := self.get(worker)).sequence != sequence or receipt.state is State.NONE:
                now = time.monotonic()
                if now > end:
                    raise WeightSyncFailed(f"update: worker {worker} did not stage the weights in {deadline_s:.0f} s", phase="update")
                if now > ask:
                    if not alive():
                        raise WeightSyncFailed(f"update: the generator is gone, worker {worker} had not staged the weights", phase="update")
                    ask = now + 1
                time.sleep(POLL_SECONDS)
            if receipt.state is State.FAILED:
                raise WeightSyncFailed(f"update: worker {worker}: {receipt.text}", phase="update")
