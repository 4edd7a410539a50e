"""Averages of what was measured between two log lines, over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

SUMMED = frozenset({"num_tokens", "tokens_generated"})
"""Counters: summed over ranks and never reset, as TRL does with num_tokens."""

LARGEST = ("/max", "/max_abs_logprob_diff", "/max_length")
"""Endings of names whose largest value counts."""


class Meters:
    """Collects numbers by name. Every rank must add the same names between two `take`s, because `take` reduces over ranks."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._totals: dict[str, float] = defaultdict(float)

    def add(self, numbers: dict[str, float]) -> None:
        """Note one value of each name."""
        for name, value in numbers.items():
            if name in SUMMED:
                self._totals[name] += value
            else:
                self._values[name].append(value)

    def take(self, accelerator: Any) -> dict[str, float]:
        """The averages (largest values, running totals) over all ranks since the last call. Collective."""
        averages = {name: sum(values) / len(values) for name, values in self._values.items() if not name.endswith(LARGEST)}
        largest = {name: max(values) for name, values in self._values.items() if name.endswith(LARGEST)}
        self._values.clear()
        return _reduce(averages, accelerator, "mean") | _largest(largest, accelerator) | _reduce(dict(self._totals), accelerator, "sum")


def _reduce(numbers: dict[str, float], accelerator: Any, how: str) -> dict[str, float]:
    names = sorted(numbers)
    packed = torch.tensor([numbers[name] for name in names], dtype=torch.float32, device=accelerator.device)
    return dict(zip(names, accelerator.reduce(packed, reduction=how).tolist(), strict=True))


def _largest(numbers: dict[str, float], accelerator: Any) -> dict[str, float]:
    names = sorted(numbers)
    packed = torch.tensor([[numbers[name] for name in names]], dtype=torch.float32, device=accelerator.device)
    return dict(zip(names, accelerator.gather(packed).max(dim=0).values.tolist(), strict=True))
