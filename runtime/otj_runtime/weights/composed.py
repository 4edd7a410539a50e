"""Tensors of the policy that do not lie in this rank's memory as the generator wants them: made when they are written, one at a time.

    DeepSpeed ZeRO-3   a parameter is cut into pieces over the ranks       -> gathered whole, copied, cut again
    LoRA               a layer is its frozen weight and two thin matrices  -> W + scaling * B A, in a copy: training weights never change

So a push needs the memory of the largest tensor (twice, while it is merged), not of the model. Both compose: a LoRA layer's matrices
may themselves be cut (FSDP2, ZeRO-3), and are gathered first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor

from otj_runtime.weights.errors import WeightSyncFailed


@dataclass(frozen=True)
class Composed:
    """A tensor to be made.

    Attributes:
        shape: of the whole tensor.
        collective: whether all ranks must make it together, in the same order.
        make: makes it; floating point, of any dtype and device.
    """

    shape: tuple[int, ...]
    collective: bool
    make: Callable[[], torch.Tensor]


PolicyTensor: TypeAlias = torch.Tensor | Composed


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has cut the parameter into pieces; its own shape does not show it."""
    return hasattr(tensor, "ds_id")


def whole(tensor: PolicyTensor) -> torch.Tensor:
    """The tensor with all its shards. Collective if it is sharded: every rank must ask for the same tensors in the same order."""
    if isinstance(tensor, Composed):
        return tensor.make()
    if isinstance(tensor, DTensor):
        gathered: torch.Tensor = tensor.full_tensor()
        return gathered
    return tensor


def gathered(parameter: Any) -> Composed:
    """A parameter that ZeRO-3 has cut, as a copy of the whole."""

    def make() -> torch.Tensor:
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            taken: torch.Tensor = parameter.data.clone()
        return taken

    return Composed(shape=tuple(parameter.ds_shape), collective=True, make=make)


def unpartitioned(model: Any) -> Any:
    """`model`; a whole copy of it, if ZeRO-3 has cut it. Collective.

    transformers cuts every model that it loads in a run with ZeRO-3, but only the one that learns gets an engine which puts the pieces
    together for a forward pass.
    """
    cut = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    if not cut:
        return model
    from deepspeed import zero

    with zero.GatheredParameters(cut):
        return copy.deepcopy(model)  # torch copies a parameter's data alone, so the copy knows nothing of pieces


def available(tensor: torch.Tensor) -> PolicyTensor:
    """`tensor`, or what makes it whole."""
    return gathered(tensor) if is_partitioned(tensor) else tensor


def merged(name: str, layer: Any, adapter: str) -> Composed:
    """The weight of a linear LoRA layer with its adapter: W + scaling * B A (arXiv:2106.09685, section 4.1), [out, in], float32.

    Args:
        name: of the weight, for the error.
        layer: PEFT's layer: `base_layer`, `lora_A` and `lora_B` by adapter.

    Raises:
        WeightSyncFailed: if the layer is none of these, or uses a variant of LoRA that is no sum.
    """
    if adapter not in getattr(layer, "lora_A", {}) or adapter in getattr(layer, "lora_variant", {}):
        raise WeightSyncFailed(
            f"the adapter of {name} ({type(layer).__name__}) cannot be merged: only plain LoRA of linear layers can; use no DoRA, "
            "and leave embeddings out of target_modules",
            phase="write",
        )
    base, down, up = (available(part.weight) for part in (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]))

    def make() -> torch.Tensor:
        weight, a, b = whole(base).float(), whole(down).float(), whole(up).float()
        delta = b @ a
        return weight.add(delta.T if layer.fan_in_fan_out else delta, alpha=layer.scaling[adapter])

    return Composed(shape=tuple(base.shape), collective=any(map(is_collective, (base, down, up))), make=make)


def is_collective(tensor: PolicyTensor) -> bool:
    """Whether `whole` takes all ranks."""
    return tensor.collective if isinstance(tensor, Composed) else isinstance(tensor, DTensor)
