"""The trainer's policy with the weights that the generator has of it: each rounded to the generator's dtype.

Steps of 1e-6 are below what bfloat16 holds of most weights. So a trainer whose weights are kept in float32 walks away from what it has
sent until the sum of its steps is large enough to round to the next number: SmolLM2-135M, after one step at that rate, gives tokens
log-probabilities that differ by 0.18 in the mean from those of a generator that has exactly what it was sent. To prove that, the
trainer must compute with the same numbers. Each weight is rounded where it is used, so the largest one is all that this adds
to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from otj_runtime.weights.composed import merged
from otj_runtime.weights.forwards import computing_by
from otj_runtime.weights.precision import NARROW, changes_its_argument

PARTS = {"__get__", "__getitem__", "embedding"}
"""Functions that take a part of a parameter, such as one expert of many or the rows of some tokens, or a view of it."""


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
    wide = any(parameter.dtype is torch.float32 for parameter in model.parameters())
    layers = [] if adapter_apart or not hasattr(model, "peft_config") else [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(computing_by(layer, _MergedForward(layer, str(model.active_adapters[0]), dtype, rounded)))
        if wide:
            stack.enter_context(rounded)
        yield


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
        if func.__name__ in PARTS:  # the whole need not be rounded
            result = func(*args, **kwargs)
            return self._round(result) if any(isinstance(value, torch.nn.Parameter) for value in args) else result
        args = tuple(map(self._round_parameter, args))
        return func(*args, **{name: self._round_parameter(value) for name, value in kwargs.items()})

    def _round_parameter(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._round_parameter, value))
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
