"""Staging: a worker brings a version's tensors near while the generator still decodes, and checks them, before any of them is installed.

    thread   for each tensor, in the layout's order: wait until a trainer has written it -> take it -> check it
             -> wait until the version is published -> compare all checksums -> receipt
             a version that is a patch: apply it to the version before, in a buffer; without that, to the slot first
    engine   wait(), then install from `tensors`
    thread   compare what was installed with what was staged -> receipt

On a CPU nothing is copied: tensors are taken where they lie, in the mailbox. On a GPU they are copied to a buffer by the copy engine, on a
stream of their own, in runs of up to `RUN_BYTES`, as the trainer's copies arrive, a large tensor part by part; the checksums are computed
where they land. Where trainer and generator share a GPU nothing is copied either: see `borrowed`.

It may be begun long before the trainer writes: the next version's ticket is known as soon as the one before is installed, where versions
are sent whole. Its thread then waits until what was installed is compared.

With a limit the buffer is a ring. The tensors that fit are staged ahead; the rest follow while the engine installs, so
generation pauses for as long as they take to cross the bus, and they are checked only afterwards.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from otj_runtime.weights.checksums import Checksums
from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.mailbox import MailboxReader
from otj_runtime.weights.patch import Patch, apply
from otj_runtime.weights.plan import Place, ring
from otj_runtime.weights.receipts import POLL_SECONDS, Receipt, State

RUN_BYTES = 64 << 20
"""Bytes of one copy to the GPU at most. Less is copied as soon as it has arrived, so this matters only to catch up."""

ARRIVAL_SECONDS = 300.0
"""How long the trainer may take from one tensor to the next. For the first there is no limit: it trains."""

IDLE_POLL_SECONDS = 0.001
"""Between two looks for the first tensor, beside an engine that decodes."""


class Staging:
    """One version on its way; what both kinds share: the thread, the order, the receipt.

    Args:
        reader: the mailbox.
        worker: this worker's number, whose receipt it writes.

    Attributes:
        on_device: whether the worker's GPU can install from it by replaying copies.
        partial: whether it holds less than all tensors at a time.
    """

    on_device = False
    partial = False
    _side: torch.cuda.Stream | None = None  # of what this thread does on the device, beside decoding; None on a CPU

    def __init__(self, reader: MailboxReader, worker: int) -> None:
        self.reader = reader
        self._worker = worker
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self._holds: int | None = None  # sequence of the version that the buffer holds whole
        self._ticket: Ticket | None = None
        self._confirming: threading.Thread | None = None

    def begin(self, ticket: Ticket) -> None:
        """Start to stage what is, or will be, written under `ticket`, instead of what was staged before.

        Nothing changes if that has been started already. The version is no more than a name until it is published.
        """
        if self._has_begun(ticket):
            self._ticket = ticket
            return
        self._give_up()
        self._stopped.clear()
        self._failure, self._ticket = None, ticket
        self._thread = threading.Thread(target=self._run, args=(ticket, self._confirming), name="otj-staging", daemon=True)
        self._thread.start()

    def _has_begun(self, ticket: Ticket) -> bool:
        begun = self._ticket
        if begun is None or self._failure is not None or self._stopped.is_set():
            return False
        return replace(begun, version=ticket.version) == ticket

    def require_published(self) -> None:
        """An installation waits for what is staged, and the engine for it: never for a version that is only looked out for.

        Raises:
            MailboxError: if what was begun last is not published yet.
        """
        if self._ticket is not None and not self.reader.is_published(self._ticket):
            raise MailboxError(
                f"version {self._ticket.version} is not published yet: another trainer has begun the next one, install again"
            )

    def take(self) -> Ticket:
        """The ticket of what is staged, to be installed now.

        Raises:
            MailboxError: if nothing was begun since the last time.
        """
        if self._ticket is None:
            raise MailboxError("nothing was staged: update_weights comes before finish_weight_update")
        ticket, self._ticket = self._ticket, None
        return ticket

    def stop(self) -> None:
        """Give up what is under way; when this returns, no thread reads the mailbox or the buffer."""
        self._give_up()
        if self._confirming is not None:
            self._confirming.join()

    def _give_up(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Return when everything is staged and fits its checksums.

        Raises:
            MailboxError: if it does not.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise MailboxError(str(self._failure)) from self._failure

    def drain(self) -> None:
        """As `wait`, for an installation that reads the mailbox itself."""
        self.wait()

    def confirm(self, ticket: Ticket, compare: Callable[[], list[str]]) -> None:
        """Give the receipt of an installation, beside decoding, and before anything else is staged.

        Args:
            compare: names the parameters that do not hold what was staged.
        """
        self._confirming = threading.Thread(target=self._confirm, args=(ticket, compare), name="otj-confirming", daemon=True)
        self._confirming.start()

    def _confirm(self, ticket: Ticket, compare: Callable[[], list[str]]) -> None:
        try:
            with self._beside():
                differing = compare()
            state, text = State.INSTALLED, ""
            if differing:
                state = State.FAILED
                text = f"{len(differing)} parameters do not hold what was sent as version {ticket.version}, the first is {differing[0]}"
        except Exception as error:
            state, text = State.FAILED, f"what was installed could not be checked: {error!r}"
        self.reader.receipts.put(self._worker, Receipt(ticket.sequence, state, text))

    def _run(self, ticket: Ticket, confirming: threading.Thread | None) -> None:
        if confirming is not None:  # it reads the buffer; waited for here, because `begin` holds up the engine
            confirming.join()
        try:
            if ticket.steps:
                self._patch(ticket)
            else:
                self._stage(ticket)
            self.reader.await_published(ticket, stopped=self._stopped.is_set, deadline_s=ARRIVAL_SECONDS)
            self._check(ticket)
            self.reader.receipts.put(self._worker, Receipt(ticket.sequence, State.STAGED))
        except Exception as error:
            self._failure = error
            if not self._stopped.is_set():  # else it may be begun anew, and a trainer must not read that it failed
                self.reader.receipts.put(self._worker, Receipt(ticket.sequence, State.FAILED, str(error)))

    def _stage(self, ticket: Ticket) -> None:
        """Bring a version near that is whole."""
        raise NotImplementedError

    def _check(self, ticket: Ticket) -> None:
        """Compare what is near with the trainer's checksums."""
        raise NotImplementedError

    def content(self, ticket: Ticket) -> list[torch.Tensor]:
        """The layout's tensors of the version that was staged, for a loader."""
        raise NotImplementedError

    def near(self, ticket: Ticket) -> list[torch.Tensor]:
        """The layout's tensors, where a replay reads them. Only `on_device`."""
        return self.content(ticket)

    def kept(self, ticket: Ticket) -> list[torch.Tensor]:
        """The layout's tensors, where the version that was installed can still be read. Only `on_device`."""
        return self.near(ticket)

    def _beside(self) -> AbstractContextManager[object]:
        """In the block, this thread's work on the device goes beside decoding."""
        if self._side is None:
            return nullcontext()
        torch.cuda.set_device(self._side.device)
        stream: AbstractContextManager[object] = torch.cuda.stream(self._side)
        return stream

    def _patch(self, ticket: Ticket) -> None:
        """Make the ticket's version of the one in the buffer, if patches lead from there, else of the one in the slot."""
        lineage = self.reader.lineage(ticket)
        done = lineage.index(self._holds) if self._holds in lineage else None
        self._holds = None
        if done is None:
            self._take_slot(self.reader.slot_bytes(ticket.slot))
        for patch in self.reader.log.patches(lineage, done=done or 0, stopped=self._stopped.is_set, deadline_s=ARRIVAL_SECONDS):
            self._apply(patch)

    def _take_slot(self, slot: torch.Tensor) -> None:
        raise NotImplementedError

    def _apply(self, patch: Patch) -> None:
        raise NotImplementedError

    def _arrived(self, ticket: Ticket, index: int) -> int:
        """Wait for tensor `index`; return the end of the run of tensors that have arrived from there on."""
        return self._wait_beyond(index, lambda: self.reader.arrived(ticket, index), ticket, index)

    def _wait_beyond(self, reached: int, look: Callable[[], int], ticket: Ticket, index: int) -> int:
        """Wait until `look` finds more than `reached`, which tensor `index` holds up; return what it found."""
        first = index == reached == 0
        end = math.inf if first else time.monotonic() + ARRIVAL_SECONDS
        while (found := look()) == reached:
            if self._stopped.is_set():
                raise MailboxError(f"version {ticket.version} was given up")
            if time.monotonic() > end:
                name = self.reader.layout.tensors[index].name
                raise MailboxError(f"version {ticket.version}: tensor {name} was not written for {ARRIVAL_SECONDS:.0f} s")
            time.sleep(IDLE_POLL_SECONDS if first else POLL_SECONDS)
        return found


class HostStaging(Staging):
    """Tensors taken where they lie in the mailbox, each checked as it arrives; those of a patched version from a buffer."""

    _buffer = torch.empty(0, dtype=torch.uint8)

    def _stage(self, ticket: Ticket) -> None:
        index = 0
        while index < len(self.reader.layout.tensors):
            end = self._arrived(ticket, index)
            for position in range(index, end):
                self.reader.check_tensor(ticket, position)
            index = end

    def _check(self, ticket: Ticket) -> None:
        """Of a whole version each tensor was checked, and `await_published` has checked the table of checksums."""
        if ticket.steps:
            for position in range(len(self.reader.layout.tensors)):
                self.reader.check_tensor(ticket, position, self._buffer)
            self._holds = ticket.sequence

    def content(self, ticket: Ticket) -> list[torch.Tensor]:
        if ticket.steps:
            return [entry.view(self._buffer) for entry in self.reader.layout.tensors]
        return self.reader.tensors(ticket.slot)

    def _take_slot(self, slot: torch.Tensor) -> None:
        self._buffer = slot.clone()

    def _apply(self, patch: Patch) -> None:
        apply(patch, self._buffer)


class DeviceStaging(Staging):
    """Tensors in a buffer on the worker's GPU.

    Args:
        limit: bytes that the buffer may take; None for all tensors.
    """

    on_device = True

    def __init__(self, reader: MailboxReader, worker: int, *, device: torch.device, limit: int | None) -> None:
        super().__init__(reader, worker)
        layout = reader.layout
        self._device = device
        sizes = [entry.nbytes for entry in layout.tensors]
        self.partial = limit is not None and limit < layout.slot_bytes
        if self.partial and layout.regions:
            raise MailboxError("patches need all weights staged: set no limit of staging_bytes, or send every version whole")
        capacity = limit if limit is not None and self.partial else layout.slot_bytes
        self.places = ring(sizes, capacity) if self.partial else [Place(entry.offset, 0) for entry in layout.tensors]
        self.buffer = torch.empty(capacity, dtype=torch.uint8, device=device)
        self.tensors = [self._view(index) for index in range(len(sizes))]
        self._stream = torch.cuda.Stream(device)
        self._side = self._sum_stream = torch.cuda.Stream(device)
        self._sums = Checksums.of(self.tensors, dtype=layout.tensors[0].torch_dtype, device=device)
        self._installed = 0
        self._copied: list[tuple[int, torch.cuda.Event]] = []
        self._progress = threading.Condition()

    def _view(self, index: int) -> torch.Tensor:
        entry, place = self.reader.layout.tensors[index], self.places[index]
        return self.buffer[place.offset : place.offset + entry.nbytes].view(entry.torch_dtype).view(entry.shape)

    def _give_up(self) -> None:
        self._stopped.set()
        with self._progress:
            self._progress.notify_all()
        super()._give_up()
        self._installed, self._copied = 0, []

    def _stage(self, ticket: Ticket) -> None:
        torch.cuda.set_device(self._device)
        self._holds = None
        tensors = self.reader.layout.tensors
        host = self.reader.slot_bytes(ticket.slot)
        self._sum_stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._sum_stream):
            self._sums.sums.zero_()
        index = announced = 0
        while index < len(tensors):
            self._room(index)
            end = self._bring(ticket, index, host)
            done = torch.cuda.Event()
            done.record(self._stream)
            with torch.cuda.stream(self._sum_stream):
                self._sum_stream.wait_event(done)
                self._sums.add(index, end)
                summed = torch.cuda.Event()
                summed.record(self._sum_stream)
            with self._progress:
                self._copied.append((end, summed))
                self._progress.notify_all()
            index = end
            if self.partial and not announced and index < len(tensors) and self.places[index].after > self._installed:
                announced = index
                summed.synchronize()
                self.reader.receipts.put(self._worker, Receipt(ticket.sequence, State.STAGED))
        self._sum_stream.synchronize()

    def _bring(self, ticket: Ticket, index: int, host: torch.Tensor) -> int:
        """Ask for the copies of a run of tensors that begins with tensor `index`, as they arrive; its end."""
        first = self.reader.layout.tensors[index]
        if first.nbytes > RUN_BYTES:
            done = 0
            while done < first.nbytes:
                arrived = self._wait_beyond(done, lambda: self.reader.progress(ticket, index), ticket, index)
                self._copy(host, index, done, arrived)
                done = arrived
            return index + 1
        end = self._run_end(index, self._arrived(ticket, index))
        last = self.reader.layout.tensors[end - 1]
        self._copy(host, index, 0, last.offset + last.nbytes - first.offset)
        return end

    def _copy(self, host: torch.Tensor, index: int, begin: int, end: int) -> None:
        """Ask for the copy of the bytes from `begin` to `end`, counted from the start of tensor `index`."""
        source, target = self.reader.layout.tensors[index].offset, self.places[index].offset
        with torch.cuda.stream(self._stream):
            self.buffer[target + begin : target + end].copy_(host[source + begin : source + end], non_blocking=True)

    def _room(self, index: int) -> None:
        """Wait until what lies in the place of tensor `index` has been installed."""
        with self._progress:
            while self.places[index].after > self._installed:
                if self._stopped.is_set():
                    raise MailboxError("staging was given up")
                self._progress.wait(timeout=1.0)

    def _run_end(self, index: int, arrived: int) -> int:
        """End of the run that one copy can take from `index`: next to each other on both sides, there already, with room."""
        tensors, places = self.reader.layout.tensors, self.places
        start, shift = tensors[index].offset, places[index].offset - tensors[index].offset
        end = index + 1
        while (
            end < arrived
            and tensors[end].offset + tensors[end].nbytes - start <= RUN_BYTES
            and places[end].offset - tensors[end].offset == shift
            and places[end].after <= self._installed
        ):
            end += 1
        return end

    def _check(self, ticket: Ticket) -> None:
        if ticket.steps:
            with torch.cuda.stream(self._stream):
                self._sums.compute()
            self._stream.synchronize()
        self.reader.compare(ticket, self._sums.values())
        self._holds = None if self.partial else ticket.sequence

    def content(self, ticket: Ticket) -> list[torch.Tensor]:
        return self.tensors if ticket.steps else self.reader.tensors(ticket.slot)

    def near(self, ticket: Ticket) -> list[torch.Tensor]:
        return self.tensors

    def kept(self, ticket: Ticket) -> list[torch.Tensor]:
        # A buffer that is a ring does not hold them any more. The GPU reads the pinned mailbox as well, if not as fast.
        return self.reader.tensors(ticket.slot) if self.partial else self.tensors

    def _take_slot(self, slot: torch.Tensor) -> None:
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            self.buffer.copy_(slot, non_blocking=True)

    def _apply(self, patch: Patch) -> None:
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            apply(Patch(*(part.to(self._device, non_blocking=True) for part in patch.parts)), self.buffer)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The runs of tensors, each as soon as the current stream may read it. After each, call `installed`."""
        begin = done = 0
        total = len(self.reader.layout.tensors)
        while begin < total:
            with self._progress:
                while len(self._copied) <= done:
                    if self._failure is not None or self._stopped.is_set():
                        raise MailboxError(f"staging failed during the installation: {self._failure}")
                    self._progress.wait(timeout=1.0)
                end, event = self._copied[done]
            torch.cuda.current_stream().wait_event(event)
            yield begin, end
            begin, done = end, done + 1

    def drain(self) -> None:
        """As `wait`; what would wait for its place need not."""
        for _, end in self.runs():
            self.installed(end)
        self.wait()

    def installed(self, end: int) -> None:
        """Tensors up to `end` have been read: their place may be written again."""
        torch.cuda.current_stream().synchronize()
        with self._progress:
            self._installed = end
            self._progress.notify_all()
