"""A module that computes by another `forward` for a while. An instance's own attribute shadows its class's, which accelerate uses as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def computing_by(module: torch.nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """In the block the module computes by `forward`; by its class's own if that is None. What shadowed it before does so again afterwards."""
    attributes = vars(module)
    before = attributes.pop("forward", None)
    if forward is not None:
        attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward", None)
        if before is not None:
            attributes["forward"] = before
