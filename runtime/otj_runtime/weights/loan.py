"""Weights that the generator reads where the trainer has them: in the memory of the GPU that both are on, or of one that its own may map.

    trainer  handles(tensors)            CUDA's IPC handles of this rank's tensors, as JSON; once, and again for a generator that restarted
    worker   borrow(loan, layout)        the same memory, as tensors of its own
    trainer  Lender.lend(ticket)         at each push: the weights are final; their checksums -> the mailbox file
    worker   sums what it sees, compares, installs, compares again (`borrowed`)
    trainer  writes the version into its slot beside all that, for a generator that restarts

The host's memory and its bus are passed by, so a push takes milliseconds. What it trades: the trainer must leave its weights as they are until the
version is proven (which it does in any case), and only tensors that lie whole in a rank's memory can be lent: none that are sharded, or
merged for the occasion.

The handles are torch's, of its allocator's blocks. They travel as text, never pickled: the generator must not unpickle what a socket brings.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from otj_runtime.weights.checksums import Checksums
from otj_runtime.weights.composed import Composed, PolicyTensor, is_collective
from otj_runtime.weights.errors import MailboxError, WeightSyncFailed
from otj_runtime.weights.layout import Layout, Ticket
from otj_runtime.weights.mailbox import MailboxWriter

Handle = dict[str, Any]
Loan = Mapping[str, Sequence[Handle]]
"""By the UUID of a GPU, rank 0's first: handles of the layout's tensors, in its order, of the rank that is on it."""


def gpu_uuid(device: torch.device) -> str:
    """The GPU's name for both sides, whatever number CUDA_VISIBLE_DEVICES gives it; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


def lendable(tensors: Mapping[str, PolicyTensor]) -> list[torch.Tensor]:
    """The tensors, if each lies in this rank's memory as it is sent.

    Raises:
        WeightSyncFailed: naming the first that does not.
    """
    found: list[torch.Tensor] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, Composed) or is_collective(tensor):
            raise _unlendable(f"{name} is made for each push: it is sharded, or an adapter is merged into it")
        if not tensor.is_contiguous():
            raise _unlendable(f"{name} is not contiguous")
        if found and (tensor.dtype, tensor.device) != (found[0].dtype, found[0].device):
            raise _unlendable(f"{name} is {tensor.dtype} on {tensor.device}, others are {found[0].dtype} on {found[0].device}")
        found.append(tensor.detach())
    return found


def _unlendable(reason: str) -> WeightSyncFailed:
    return WeightSyncFailed(f"lend: {reason}", phase="lend")


def handles(tensors: Iterable[torch.Tensor]) -> list[Handle]:
    """What another process needs to read these tensors of a GPU.

    Raises:
        RuntimeError: if CUDA hands out none, as of memory in `expandable_segments`.
    """
    return [_handle(tensor) for tensor in tensors]


def _handle(tensor: torch.Tensor) -> Handle:
    _, handle, size, offset, counter, counter_offset, event, _ = tensor.untyped_storage()._share_cuda_()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "start": tensor.storage_offset(),
        "storage_handle": _text(handle),
        "storage_size_bytes": size,
        "storage_offset_bytes": offset,
        "ref_counter_handle": _text(counter),
        "ref_counter_offset": counter_offset,
        "event_handle": _text(event),
        "event_sync_required": False,  # `Lender.settle` waits, and an event of another GPU may not open
    }


def borrow(loan: Loan, layout: Layout, device: torch.device) -> tuple[list[torch.Tensor], bool]:
    """The layout's tensors in the memory of the rank on this GPU, else of rank 0 on another; to be read only. And whether it is this GPU.

    Raises:
        MailboxError: if what is lent does not fit the layout.
        RuntimeError: if CUDA does not open a handle.
    """
    own = loan.get(gpu_uuid(device))
    found = own if own is not None else next(iter(loan.values()))
    if len(found) != len(layout.tensors):
        raise MailboxError(f"{len(found)} tensors are lent, the mailbox was made for {len(layout.tensors)}")
    index = device.index if device.index is not None else torch.cuda.current_device()
    return [_borrowed(handle, entry.shape, index) for handle, entry in zip(found, layout.tensors, strict=True)], own is not None


def _borrowed(handle: Handle, shape: tuple[int, ...], device: int) -> torch.Tensor:
    found = dict(handle)
    dtype, start = getattr(torch, found.pop("dtype")), found.pop("start")
    known = {name: base64.b64decode(value) if isinstance(value, str) else value for name, value in found.items()}
    stride = torch.empty(shape, device="meta").stride()
    tensor: torch.Tensor = rebuild_cuda_tensor(
        torch.Tensor,
        shape,
        stride,
        start,
        torch.storage.TypedStorage,
        dtype,
        device,
        requires_grad=False,
        **known,
    )
    return tensor


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Lender:
    """One rank's weights, as the mailbox tells of them.

    Args:
        writer: the mailbox.
        tensors: what is lent, in the layout's order; they must stay where they are.
    """

    def __init__(self, writer: MailboxWriter, tensors: Sequence[torch.Tensor]) -> None:
        self._writer = writer
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._device = tensors[0].device
        self._sums = Checksums.of(tensors, dtype=writer.layout.tensors[0].torch_dtype, device=self._device)

    def settle(self, tensors: Sequence[torch.Tensor]) -> None:
        """Wait for what changes the tensors still. On every rank, because a worker reads those of the rank on its GPU.

        Raises:
            MailboxError: if they lie elsewhere than those that were lent.
        """
        if [tensor.data_ptr() for tensor in tensors] != self._addresses:
            raise MailboxError(
                "the policy's weights have moved in memory since they were lent to the generator: leave the model on its GPU, or say "
                "generation.weightTransfer: mailbox"
            )
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def lend(self, ticket: Ticket) -> int:
        """Say that the tensors hold the ticket's version; return their bytes in the generator's dtype. They stay as they are until it is proven.
        Rank 0 only, when every rank has settled.
        """
        self._sums.compute()
        for position, (entry, checksum) in enumerate(zip(self._writer.layout.tensors, self._sums.values(), strict=True)):
            self._writer.note_checksum(ticket, position, checksum)
            self._writer.note(ticket, position, entry.nbytes)
        return self._writer.layout.payload_bytes
