"""The trainer's policy with the weights that the generator has of it: each rounded to the generator's dtype.

Steps of 1e-6 are below what bfloat16 holds of most weights. So a trainer whose weights are kept in float32 walks away from what it has
sent until the sum of its steps is large enough to round to the next number: SmolLM2-135M, after one step at that rate, gives tokens
log-probabilities that differ by 0.18 in the mean from those of a generator that has exactly what it was sent. To prove that, the
trainer must compute with the same numbers. Each weight is rounded where it is used, so the largest one is all that this adds
to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from otj_runtime.weights.composed import merged
from otj_runtime.weights.precision import NARROW, changes_its_argument


@contextmanager
def as_sent(model: Any, dtype: torch.dtype, *, adapter_apart: bool) -> Iterator[None]:
    """In the block the model computes with its weights as a generator in `dtype` has them; nothing changes if that is float32.

    Args:
        adapter_apart: whether the generator has a LoRA adapter beside its weights, instead of merged into them.
    """
    if dtype not in NARROW:
        yield
        return
    rounded = _Rounded(dtype)
    layers = [] if adapter_apart or not hasattr(model, "peft_config") else [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.forward = _MergedForward(layer, str(model.active_adapters[0]), dtype, rounded)
    try:
        with rounded:
            yield
    finally:
        for layer in layers:
            del layer.forward


class _Rounded(TorchFunctionMode):
    """Functions see float32 parameters as what 16 bits hold of them, in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.exact = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.exact or changes_its_argument(func):
            return func(*args, **kwargs)
        if func.__name__ in ("__get__", "__getitem__"):  # a part of it, such as one expert of many: the whole need not be rounded
            result = func(*args, **kwargs)
            return self._round(result) if isinstance(args[0], torch.nn.Parameter) else result
        args, kwargs = tree_map(self._round_parameter, (args, kwargs))
        return func(*args, **kwargs)

    def _round_parameter(self, value: Any) -> Any:
        return self._round(value) if isinstance(value, torch.nn.Parameter) else value

    def _round(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.dtype is torch.float32
        return value.to(self._dtype).float() if floating else value


class _MergedForward:
    """What a linear LoRA layer computes once its adapter is merged."""

    def __init__(self, layer: Any, adapter: str, dtype: torch.dtype, rounded: _Rounded) -> None:
        self._layer, self._dtype, self._rounded = layer, dtype, rounded
        self._weight = merged("a layer", layer, adapter)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self._rounded.exact = True  # the sum is rounded, not what is added
        try:
            weight = self._weight.make().to(self._dtype).to(hidden.dtype)
        finally:
            self._rounded.exact = False
        if self._layer.fan_in_fan_out:
            weight = weight.T
        return torch.nn.functional.linear(hidden, weight, self._layer.base_layer.bias)
