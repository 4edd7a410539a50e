"""Which tensors of a model make up the policy, and which rank writes which of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from otj_runtime.weights.composed import Composed, PolicyTensor, available, is_collective, is_partitioned, merged
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import TensorEntry


def policy_tensors(model: torch.nn.Module) -> dict[str, PolicyTensor]:
    """The floating point parameters and persistent buffers of an unwrapped model, by checkpoint name, each memory once.

    Of names that share one memory (tied embeddings) the first in the model's order stands for all, as in
    `named_parameters`: it is the name that model loaders look for. Buffers come along because a generator that started with
    dummy weights has none of them. A PEFT model's tensors are those of its base model with the adapter merged.

    Raises:
        WeightSyncFailed: if the model has an adapter that cannot be merged.
    """
    found: dict[str, PolicyTensor] = {}
    seen: set[Any] = set()
    for name, tensor in _with_adapter(model) if hasattr(model, "peft_config") else _named(model):
        if isinstance(tensor, Composed):
            found[name] = tensor
        elif tensor.is_floating_point() and (place := _place(tensor)) not in seen:
            seen.add(place)
            found[name] = available(tensor)
    return found


def _place(tensor: torch.Tensor) -> Any:
    """Where the tensor lies, equal for two names of one memory. An empty tensor lies nowhere, and is equal to no other."""
    if is_partitioned(tensor):
        return tensor.ds_id  # type: ignore[attr-defined]
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return object()
    return local.untyped_storage().data_ptr(), int(local.storage_offset()), tuple(tensor.shape)


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters first, in the model's order, then persistent buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):  # a state_dict would take as long as all the rest of a push
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _with_adapter(model: Any) -> Iterator[tuple[str, PolicyTensor]]:
    """As `_named`, of a PEFT model, by the names of its base model: layers merged, modules that are trained whole in place of the
    originals."""
    adapter = model.active_adapters[0]
    if (kind := model.peft_config[adapter].peft_type) != "LORA":
        raise WeightSyncFailed(f"an adapter of type {kind.value} cannot be merged into the policy: use LoRA", phase="write")
    for name, tensor in _named(model):
        layer, base, _ = name.rpartition(".base_layer.weight")
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(f".modules_to_save.{adapter}", "")
        if base:
            yield plain, merged(plain, model.get_submodule(layer), adapter)
        elif ".lora_" not in name and ".original_module." not in name:
            yield plain, tensor


def reshard(model: torch.nn.Module) -> None:
    """Bring an FSDP model back to its shards: after a forward without backward, the root keeps its parameters gathered, as plain
    tensors whose memory another forward may free."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensors: Iterable[PolicyTensor]) -> bool:
    """Whether any of a model's tensors is spread over the ranks: one rank alone cannot compute with it, nor make the tensor whole."""
    return any(is_collective(available(tensor) if isinstance(tensor, torch.Tensor) else tensor) for tensor in tensors)


def shares(tensors: tuple[TensorEntry, ...], *, ranks: int) -> list[list[str]]:
    """Names for each rank to write: disjoint, together all, balanced by bytes (largest first, to the least loaded rank)."""
    loads = [(0, rank) for rank in range(ranks)]
    result: list[list[str]] = [[] for _ in range(ranks)]
    for entry in sorted(tensors, key=lambda entry: (-entry.nbytes, entry.name)):
        load, rank = heapq.heappop(loads)
        result[rank].append(entry.name)
        heapq.heappush(loads, (load + entry.nbytes, rank))
    return result
