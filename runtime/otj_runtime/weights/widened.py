"""Computing in float32 with weights kept in 16 bits, to see what their own rounding of every step changes.

A copy of the model in float32 would say it too, for twice the memory of the model. Here each product widens the weights that it needs and
forgets them, so the largest matrix is all that is added. Results of embeddings are widened, and from there on 16 bits never meet
anything but float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

NARROW = {torch.bfloat16, torch.float16}


def keeps_narrow_weights(model: torch.nn.Module) -> bool:
    """Whether some of the model's weights are kept in 16 bits, as a LoRA's base often is."""
    return any(parameter.dtype in NARROW for parameter in model.parameters())


class Widened(TorchFunctionMode):
    """In the block, functions of float32 and 16-bit tensors see the latter as float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of tensors in the block."""
        kwargs = kwargs or {}
        # What changes its argument must be given that argument, not a copy.
        if not _changes_its_argument(func) and _mixed((args, kwargs)):
            args, kwargs = tree_map(_widen, (args, kwargs))
        result = func(*args, **kwargs)
        return _widen(result) if func is torch.nn.functional.embedding else result


def _changes_its_argument(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _mixed(arguments: Any) -> bool:
    dtypes = {leaf.dtype for leaf in tree_iter(arguments) if isinstance(leaf, torch.Tensor)}
    return torch.float32 in dtypes and not dtypes.isdisjoint(NARROW)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in NARROW else value
