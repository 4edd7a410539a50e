"""The plan of an installation: which piece of which tensor goes to which piece of which parameter.

A generator's parameters are fused (q, k and v in one), sharded over its workers and tied; only the model's own `load_weights` knows how.
So it runs once, under a recorder that notes every copy whose source lies in the tensors it was given. From then on an installation is
these copies again, from wherever the tensors lie by then, in a few launches and without any of the model's Python.

    record(load, tensors)     the model's load_weights, once      -> Plan: (destination, place in the slot, shape, stride)
    plan.sources(buffer)      the same places in another buffer   -> tensors to copy from, in the plan's order

A backend of vLLM that hands tensors to `load_weights` as they arrive gets a `ReplayingLoader` in the model's place, which does both.

What it trades: it holds for models whose loading only copies. A loader that computes (quantisation, a packed layout) leaves
parameters that no copy reaches; `untouched` names them, and the installation falls back to vLLM's own reload.

`ring` lays tensors out in a buffer that is smaller than all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from otj_runtime.weights.layout import ALIGNMENT, Layout


@dataclass(frozen=True)
class Copy:
    """One recorded copy.

    Attributes:
        destination: part of a parameter.
        tensor: index of the layout's tensor that it comes from.
        offset: elements from the start of that tensor.
        shape, stride: of the source, in elements.
    """

    destination: torch.Tensor
    tensor: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Copies in the order in which they were recorded; `loaded` are the names that the model says it loaded, None if it does not."""

    layout: Layout
    copies: tuple[Copy, ...]
    loaded: frozenset[str] | None

    def untouched(self, model: torch.nn.Module) -> list[str]:
        """Parameters of `model` whose memory no copy reaches."""
        return _untouched(self.copies, model)

    def sources(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What each copy reads, if the layout's tensors lie where `tensors` lie."""
        return [_source(copy, tensors[copy.tensor]) for copy in self.copies]


def record(load: Callable[[Iterator[tuple[str, torch.Tensor]]], Any], layout: Layout, tensors: Sequence[torch.Tensor]) -> Plan:
    """Load `tensors`, the layout's, with `load` and note how.

    Args:
        load: the model's load_weights.
        tensors: one for each of the layout's, contiguous.
    """
    with _Recorder(tensors) as recorder:
        loaded = load(iter((entry.name, tensor) for entry, tensor in zip(layout.tensors, tensors, strict=True)))
    return Plan(layout=layout, copies=tuple(recorder.copies), loaded=None if loaded is None else frozenset(loaded))


class ReplayingLoader:
    """A model's `load_weights`, which runs for tensors that it has not seen; for the others it makes the same copies again.

    Args:
        model: its parameters must stay where they are.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._copies: dict[tuple[str, torch.Size, torch.dtype], list[Copy]] = {}
        self._missed: list[str] | None = None  # asked for at every update, while nothing is decoded; changes with what is recorded alone

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load these, on the current stream."""
        with torch.no_grad():
            destinations, sources, unknown = [], [], []
            for name, tensor in weights:
                known = self._copies.get((name, tensor.shape, tensor.dtype))
                if known is None:
                    unknown.append((name, tensor))
                    continue
                destinations += [copy.destination for copy in known]
                sources += [_source(copy, tensor) for copy in known]
            if destinations:
                torch._foreach_copy_(destinations, sources)
            if unknown:
                self._record(unknown)

    def untouched(self) -> list[str]:
        """Parameters that nothing was copied to so far."""
        if self._missed is None:
            self._missed = _untouched((copy for copies in self._copies.values() for copy in copies), self._model)
        return self._missed

    def _record(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self._missed = None
        with _Recorder([tensor for _, tensor in named]) as recorder:
            self._model.load_weights(iter(named))
        for name, tensor in named:
            self._copies[name, tensor.shape, tensor.dtype] = []
        for copy in recorder.copies:
            name, tensor = named[copy.tensor]
            self._copies[name, tensor.shape, tensor.dtype].append(copy)


def _source(copy: Copy, tensor: torch.Tensor) -> torch.Tensor:
    """What `copy` reads of `tensor`."""
    return torch.as_strided(tensor, copy.shape, copy.stride, tensor.storage_offset() + copy.offset)


def _untouched(copies: Iterable[Copy], model: torch.nn.Module) -> list[str]:
    """Parameters of `model` whose memory none of the copies reaches."""
    reached = {copy.destination.untyped_storage().data_ptr() for copy in copies}
    return [name for name, parameter in model.named_parameters() if parameter.untyped_storage().data_ptr() not in reached]


class _Recorder(TorchDispatchMode):
    """Notes copies whose source lies in one of the tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[Copy] = []
        self._storages: dict[int, list[tuple[int, int, int]]] = {}
        for index, tensor in enumerate(tensors):
            self._storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((tensor.data_ptr(), tensor.nbytes, index))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and isinstance(args[1], torch.Tensor):
            self._note(args[0], args[1])
        return result

    def _note(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        for begin, nbytes, index in self._storages.get(source.untyped_storage().data_ptr(), ()):
            if begin <= source.data_ptr() < begin + nbytes:
                offset = (source.data_ptr() - begin) // source.itemsize
                shape = torch.broadcast_shapes(source.shape, destination.shape)
                stride = source.expand(shape).stride()
                self.copies.append(Copy(destination.detach(), index, offset, tuple(shape), tuple(stride)))
                return


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the staging buffer, in bytes, and how many tensors must have been installed before it may be put there."""

    offset: int
    after: int


def ring(sizes: Iterable[int], capacity: int) -> list[Place]:
    """Places for tensors of these sizes, in order, in a buffer of `capacity` bytes that is written round and round.

    Raises:
        ValueError: if a tensor is larger than the buffer.
    """
    places: list[Place] = []
    live: deque[tuple[int, int, int]] = deque()  # begin, end, index: oldest first
    cursor = after = 0
    for index, size in enumerate(sizes):
        if size > capacity:
            raise ValueError(f"tensor {index} has {size} bytes, the staging buffer {capacity}: raise its limit")
        if cursor + size > capacity:
            cursor = 0
        while live and _collides(live[0], cursor, cursor + size, live, index):
            after = max(after, live.popleft()[2] + 1)
        places.append(Place(offset=cursor, after=after))
        live.append((cursor, cursor + size, index))
        cursor = -(-(cursor + size) // ALIGNMENT) * ALIGNMENT
    return places


def _collides(oldest: tuple[int, int, int], begin: int, end: int, live: deque[tuple[int, int, int]], index: int) -> bool:
    """Whether a tensor at `begin` to `end` would overwrite any live one; the oldest must go first, since they are installed in order."""
    return any(other[0] < end and begin < other[1] for other in live)
