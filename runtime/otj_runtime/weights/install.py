"""Installs a version into the generator, from the mailbox.

    start, update(ticket)     the workers begin to stage, while the generator decodes; the trainer may still be writing, or not have begun
    receipts                  every worker has all of it, and its checksums fit
    install                   one call: between two engine steps

Any rank can do it, and after a restart of the generator any rank may be the first to notice: a lock file beside the mailbox
makes the others wait, look again, and find it done.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.weights.control import DEADLINES, POLL_SECONDS, GeneratorControl
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.loan import Loan
from otj_runtime.weights.receipts import Receipts


class Phases:
    """Seconds spent in each named phase of one sync."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the duration of the block to phase `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass
class Installer:
    """One trainer's way to install.

    Attributes:
        staging_bytes: what staging may take of the generator's GPU memory, None for no limit.
        loan: weights that the workers can read where the trainer has them; nothing is staged then.
    """

    control: GeneratorControl
    mailbox: Path
    staging_bytes: int | None = None
    loan: Loan | None = None
    _workers: int = 0
    _open: bool = False

    def forget(self) -> None:
        """The generator may have been restarted: introduce the mailbox to it again next time."""
        self._workers, self._open = 0, False

    def begin(self, ticket: Ticket, phases: Phases) -> None:
        """Let the workers stage what is written under `ticket`.

        Raises:
            WeightSyncFailed: naming the phase.
        """
        if not self._workers:
            with phases("init"):
                self.introduce()
        with phases("update"):
            if self._open:
                self._open = False
                with suppress(WeightSyncFailed):  # another rank may have closed it, by installing again
                    self.control.update(ticket)
                    return
        with phases("start"):
            self.open()
        self._open = False
        with phases("update"):
            self.control.update(ticket)

    def introduce(self) -> None:
        """Tell the workers where the weights will be.

        Raises:
            WeightSyncFailed: if a worker cannot reach them.
        """
        self.control.init_transfer(str(self.mailbox), self.staging_bytes, self.loan)
        self._workers = self.control.workers()

    def instead(self, ticket: Ticket, phases: Phases) -> None:
        """Let the workers stage this ticket's version in place of the one that `begin` named.

        Raises:
            WeightSyncFailed: naming the phase.
        """
        with phases("update"):
            self.control.update(ticket)

    def expect(self, ticket: Ticket) -> None:
        """Let the workers look out for `ticket`, which is to be drawn next, so that they stage its first bytes as soon as they are there.

        It is a hint: `begin` asks again, and for another one if it came otherwise.

        Raises:
            WeightSyncFailed: if it cannot be said.
        """
        self.open()
        self.control.update(ticket)

    def open(self) -> None:
        """Open the next update, which may be done long before it; if one is open still, of a trainer that is gone or a sync that failed,
        give that up first.

        Raises:
            WeightSyncFailed: if it cannot be opened.
        """
        try:
            self.control.start()
        except WeightSyncFailed:
            self.control.give_up()
            self.control.start()
        self._open = True

    def end(self, ticket: Ticket, receipts: Receipts, phases: Phases) -> None:
        """Wait until every worker has staged it, then install it.

        Raises:
            WeightSyncFailed: naming the phase. The generator keeps its weights, unless a limited staging met a checksum that does not fit.
        """
        with phases("stage"):
            receipts.wait_staged(
                sequence=ticket.sequence, workers=self._workers, deadline_s=DEADLINES["update"], alive=self.control.healthy
            )
        with phases("install"):
            phases.seconds["paused"] = self.control.install(ticket.version)

    def scores(self, ticket: Ticket, receipts: Receipts, sequences: list[list[int]]) -> list[list[list[float]]]:
        """The generator's half of the proof: how each engine scores the probe, once every worker has found that its parameters hold what it
        staged. Workers check that beside decoding.

        Raises:
            WeightsDiverged: naming the parameter.
            WeightSyncFailed: if a worker says nothing, or the generator cannot be asked.
        """
        found = self.control.score(sequences)
        receipts.wait_installed(
            sequence=ticket.sequence, workers=self._workers, deadline_s=DEADLINES["install"], alive=self.control.healthy
        )
        return found

    def again(self, ticket: Ticket, receipts: Receipts) -> None:
        """Install once more what is published under `ticket`, in a generator that may have been restarted.

        Raises:
            WeightSyncFailed: naming the phase.
        """
        receipts.clear()
        self.forget()
        self.begin(ticket, Phases())
        self.end(ticket, receipts, Phases())


@contextmanager
def only_one(lock: Path, *, deadline_s: float) -> Iterator[None]:
    """Hold the lock file `lock`; the kernel lets go of it when the process ends, however it ends.

    Raises:
        GeneratorLost: if another process holds it longer than `deadline_s` seconds.
    """
    end = time.monotonic() + deadline_s
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise GeneratorLost(f"another rank has been bringing the generator back for {deadline_s:.0f} s") from None
                time.sleep(POLL_SECONDS)
        yield
