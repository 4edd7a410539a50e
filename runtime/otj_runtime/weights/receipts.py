"""Receipts: what each worker of the generator tells the trainer through the mailbox file, without a request.

    worker   stages tensors beside decoding -> put(STAGED, sequence), or put(FAILED, sequence, text)
    trainer  waits for the receipt of every worker, then asks for the installation
    worker   compares what it installed with what it staged, beside decoding -> put(INSTALLED, sequence), or FAILED
    trainer  waits for that as well, before it trains on what was sampled

A receipt is one small block per worker. The text is stored before the state and the state before the sequence, and only one side
stores, so a trainer that sees the sequence sees the rest (both run on one host, whose stores become visible in order).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from otj_runtime.weights.errors import WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.layout import RECEIPT_BYTES, WORKERS, Layout

_HEAD = struct.Struct("<QQ")  # sequence, state
POLL_SECONDS = 0.0001


class State(IntEnum):
    """How far a worker is with a sequence."""

    NONE = 0
    STAGED = 1
    FAILED = 2
    INSTALLED = 3


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

    def wait_staged(self, *, sequence: int, workers: int, deadline_s: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Return when every worker has staged `sequence`.

        Args:
            alive: asked once a second, because a generator that died says nothing more.

        Raises:
            WeightSyncFailed: with the text of the first worker that failed, or when `deadline_s` seconds have passed.
        """
        for worker in range(workers):
            found = self._wait(worker, sequence, {State.STAGED, State.INSTALLED}, deadline_s, alive, "update", "stage the weights")
            if found.state is State.FAILED:
                raise WeightSyncFailed(f"update: worker {worker}: {found.text}", phase="update")

    def wait_installed(self, *, sequence: int, workers: int, deadline_s: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Return when every worker has found that it holds what it staged under `sequence`.

        Raises:
            WeightsDiverged: with the text of the first worker that does not.
            WeightSyncFailed: when `deadline_s` seconds have passed.
        """
        for worker in range(workers):
            found = self._wait(worker, sequence, {State.INSTALLED}, deadline_s, alive, "proof", "check what it installed")
            if found.state is State.FAILED:
                raise WeightsDiverged(f"worker {worker} of the generator: {found.text}")

    def _wait(
        self, worker: int, sequence: int, states: set[State], deadline_s: float, alive: Callable[[], bool], phase: str, what: str
    ) -> Receipt:
        """The worker's receipt, once it has reached one of `states` or failed; a version that another one has replaced never will."""
        end, ask = time.monotonic() + deadline_s, time.monotonic() + 1
        while (receipt := self.get(worker)).sequence != sequence or receipt.state not in {*states, State.FAILED}:
            now = time.monotonic()
            if receipt.sequence > sequence:
                raise WeightSyncFailed(f"{phase}: worker {worker} went on to another version, it did not {what}", phase=phase)
            if now > end:
                raise WeightSyncFailed(f"{phase}: worker {worker} did not {what} in {deadline_s:.0f} s", phase=phase)
            if now > ask:
                if not alive():
                    raise WeightSyncFailed(f"{phase}: the generator is gone, worker {worker} did not {what}", phase=phase)
                ask = now + 1
            time.sleep(POLL_SECONDS)
        return receipt
