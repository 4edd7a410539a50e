"""A model computed in another precision than its weights are kept in, to see what rounding changes.

A copy of the model would say it too, for the memory of a model. Here each product converts the weights that it needs and forgets them, so
the largest matrix is all that is added. Results of embeddings are converted, and from there on whatever meets a float of another
size is computed as by a model of the precision asked for. Autocast is not that: it keeps what the layers hand on, the
residual stream, in float32, and so hides most of what 16 bits lose over many layers.

What a layer itself computes in float32 alone, such as the variance in a norm, stays in float32, as it does in a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from otj_runtime.api import DType

NARROW = {torch.bfloat16, torch.float16}


def keeps_narrow_weights(model: torch.nn.Module) -> bool:
    """Whether some of the model's weights are kept in 16 bits, as a LoRA's base often is."""
    return any(parameter.dtype in NARROW for parameter in model.parameters())


def kept_in(model: torch.nn.Module) -> DType:
    """What the model's weights are kept in."""
    return DType(str(next(model.parameters()).dtype).removeprefix("torch."))


class ComputedIn(TorchFunctionMode):
    """In the block, functions of both float32 and 16-bit tensors see all of them in `dtype`, float32 or one of 16 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Convert to this dtype."""
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of tensors in the block."""
        kwargs = kwargs or {}
        if not changes_its_argument(func) and _mixed((args, kwargs)):
            args, kwargs = tree_map(self._convert, (args, kwargs))
        result = func(*args, **kwargs)
        return self._convert(result) if func is torch.nn.functional.embedding else result

    def _convert(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.dtype in NARROW | {torch.float32}
        return value.to(self._dtype) if floating else value


def changes_its_argument(func: Callable[..., Any]) -> bool:
    """Whether a function of tensors works in place, so that it must be given its argument and not a copy."""
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _mixed(arguments: Any) -> bool:
    dtypes = {leaf.dtype for leaf in tree_iter(arguments) if isinstance(leaf, torch.Tensor)}
    return torch.float32 in dtypes and not dtypes.isdisjoint(NARROW)
