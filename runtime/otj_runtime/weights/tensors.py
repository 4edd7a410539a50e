"""Which tensors of a model make up the policy, and which rank writes which of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import TensorEntry


def policy_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The floating point parameters and persistent buffers of an unwrapped model, by checkpoint name, each memory once.

    Of names that share one memory (tied embeddings) the first in the model's order stands for all, as in
    `named_parameters`: it is the name that model loaders look for. Buffers come along because a generator that started with
    dummy weights has none of them.

    Raises:
        WeightSyncFailed: if a parameter is partitioned in a way that its shape does not show (DeepSpeed ZeRO-3).
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    for name, tensor in _named(model):
        if not tensor.is_floating_point():
            continue
        if hasattr(tensor, "ds_id"):
            raise WeightSyncFailed(f"parameter {name} is partitioned by DeepSpeed ZeRO-3: use strategy fsdp2 or ddp", phase="write")
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (local.untyped_storage().data_ptr(), int(local.storage_offset()), tuple(tensor.shape))
        if local.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = tensor
    return found


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters first, in the model's order, then persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    yield from parameters.items()
    state = model.state_dict(keep_vars=True)
    yield from ((name, tensor) for name, tensor in state.items() if name not in parameters and isinstance(tensor, torch.Tensor))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its shards. Collective if it is sharded: every rank must ask for the same tensors in the same order."""
    if isinstance(tensor, DTensor):
        gathered: torch.Tensor = tensor.full_tensor()
        return gathered
    return tensor


def reshard(model: torch.nn.Module) -> None:
    """Bring an FSDP model back to its shards: after a forward without backward, the root keeps its parameters gathered, as plain
    tensors whose memory another forward may free."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether any tensor is spread over the ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def shares(tensors: tuple[TensorEntry, ...], *, ranks: int) -> list[list[str]]:
    """Names for each rank to write: disjoint, together all, balanced by bytes (largest first, to the least loaded rank)."""
    loads = [(0, rank) for rank in range(ranks)]
    result: list[list[str]] = [[] for _ in range(ranks)]
    for entry in sorted(tensors, key=lambda entry: (-entry.nbytes, entry.name)):
        load, rank = heapq.heappop(loads)
        result[rank].append(entry.name)
        heapq.heappush(loads, (load + entry.nbytes, rank))
    return result
