"""Whether the generator's parameters hold what was staged: checksums at both ends of every copy of a plan.

    staging, or the mailbox    checksum of the elements that a copy reads      } equal, copy by copy
    the model's parameters     checksum of the elements that it has written    }

What was staged is known to be what the trainer sent (`staging`); this closes the chain, and names what breaks it. It reads all weights
twice on the GPU, beside decoding, on a stream of its own, and nothing waits for it but `WeightSync.proven`.

Only copies can be checked so. What a loader computes (packed for a CPU, quantised) is proven by the probe alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from otj_runtime.weights.checksums import Checksums, Piece
from otj_runtime.weights.plan import Copy, Plan


@dataclass(frozen=True)
class Rows:
    """Rows of neighbouring elements that two views have in common: where the first one begins in each view's memory, and how far it is
    from there to the next, in elements."""

    count: int
    columns: int
    left: int
    left_stride: int
    right: int
    right_stride: int


def common_rows(shape: Sequence[int], left: Sequence[int], right: Sequence[int]) -> Iterator[Rows]:
    """Two views of `shape`, with strides `left` and `right`, in as few pieces as there can be."""
    dims: list[tuple[int, int, int]] = []
    for size, stride, other in zip(shape, left, right, strict=True):
        if size == 0:
            return
        if dims and dims[-1][1:] == (stride * size, other * size):  # one block in both
            dims[-1] = (dims[-1][0] * size, stride, other)
        elif size > 1:
            dims.append((size, stride, other))
    columns = dims.pop()[0] if dims and dims[-1][1:] == (1, 1) else 1
    rows, left_stride, right_stride = dims.pop() if dims else (1, 0, 0)
    for place in product(*(range(size) for size, _, _ in dims)):
        yield Rows(
            count=rows * columns,
            columns=columns,
            left=sum(index * stride for index, (_, stride, _) in zip(place, dims, strict=True)),
            left_stride=left_stride,
            right=sum(index * stride for index, (_, _, stride) in zip(place, dims, strict=True)),
            right_stride=right_stride,
        )


class InstalledCheck:
    """Compares the parameters that a plan has written with what they were copied from.

    Args:
        plan: of the installations that are checked.
        model: the generator's.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module) -> None:
        self._layout = plan.layout
        # Of copies to one place, the last one counts.
        self._copies = list({(c.destination.data_ptr(), c.shape, c.destination.stride()): c for c in plan.copies}.values())
        owners = {parameter.untyped_storage().data_ptr(): name for name, parameter in model.named_parameters()}
        self._owners = [owners.get(copy.destination.untyped_storage().data_ptr(), "a buffer") for copy in self._copies]
        self._device = self._copies[0].destination.device
        self._installed = [self._written(dtype) for dtype in {copy.destination.dtype for copy in self._copies}]
        self._sources: dict[int, Checksums] = {}

    def differing(self, tensors: Sequence[torch.Tensor]) -> list[str]:
        """What does not hold what `tensors` hold, each parameter with the tensor that it comes from. Works on the current stream, and
        waits for it.

        Args:
            tensors: the plan's layout, in memory that its device can read.
        """
        found = torch.stack([table.compute() for table in self._installed]).sum(dim=0)
        differ = (found != self._read(tensors).compute()).nonzero()[:, 0].tolist()
        return [f"{self._owners[index]} (from {self._layout.tensors[self._copies[index].tensor].name})" for index in differ]

    def _written(self, dtype: torch.dtype) -> Checksums:
        """What lies in parameters of `dtype`."""
        pieces = [
            piece
            for index, copy in enumerate(self._copies)
            if copy.destination.dtype == dtype
            for piece in written_pieces(copy, target=index)
        ]
        return self._sums(pieces, dtype)

    def _read(self, tensors: Sequence[torch.Tensor]) -> Checksums:
        """What the copies read of `tensors`; made once for each place where they lie."""
        place = tensors[0].data_ptr()
        if place not in self._sources:
            pieces = [
                piece
                for index, copy in enumerate(self._copies)
                for piece in read_pieces(
                    copy, address=tensors[copy.tensor].data_ptr(), itemsize=tensors[copy.tensor].itemsize, target=index
                )
            ]
            self._sources[place] = self._sums(pieces, tensors[0].dtype)
        return self._sources[place]

    def _sums(self, pieces: list[Piece], source: torch.dtype) -> Checksums:
        dtype = self._layout.tensors[0].torch_dtype
        return Checksums(pieces, targets=len(self._copies), source=source, dtype=dtype, device=self._device)


def written_pieces(copy: Copy, *, target: int) -> Iterator[Piece]:
    """Where the elements of a copy lie after it, each with its place in the tensor that it comes from."""
    address, itemsize = copy.destination.data_ptr(), copy.destination.itemsize
    for rows in common_rows(copy.shape, copy.destination.stride(), copy.stride):
        yield _piece(rows, address + rows.left * itemsize, rows.left_stride, copy, target)


def read_pieces(copy: Copy, *, address: int, itemsize: int, target: int) -> Iterator[Piece]:
    """Where they lie before it, in a tensor that begins at `address`."""
    for rows in common_rows(copy.shape, copy.destination.stride(), copy.stride):
        yield _piece(rows, address + (copy.offset + rows.right) * itemsize, rows.right_stride, copy, target)


def _piece(rows: Rows, address: int, stride: int, copy: Copy, target: int) -> Piece:
    return Piece(
        address=address,
        count=rows.count,
        columns=rows.columns,
        stride=stride,
        position=copy.offset + rows.right,
        position_stride=rows.right_stride,
        target=target,
    )
