"""Averages of what was measured between two log lines, over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object

SUMMED = frozenset({"num_tokens", "tokens_generated"})
"""Counters: summed over ranks and never reset, as TRL does with num_tokens."""

LARGEST = ("/max", "_max", "/max_abs_logprob_diff", "/max_length", "/max_terminated_length", "mem/peak_gib")
"""Endings of names whose largest value counts."""

SMALLEST = ("/min", "/low_min", "/min_length", "/min_terminated_length", "idle/generator")
"""Endings of names whose smallest value counts."""

Number = float | torch.Tensor
"""Tensors, of shape [], stay on their device until the log line, so that measuring does not wait for the device."""


class Meters:
    """Collects numbers by name. A rank need not add every name: what only some rewards log, or only some ranks see, counts there alone."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Number, Number]]] = defaultdict(list)
        self._totals: dict[str, float] = defaultdict(float)

    def add(self, numbers: Mapping[str, Number], *, weight: Number = 1.0) -> None:
        """Note one value of each name, which counts `weight` (tokens, pairs) in the average; none at weight 0."""
        for name, value in numbers.items():
            if name in SUMMED:
                self._totals[name] += float(value)
            else:
                self._values[name].append((value, weight))

    def state(self) -> dict[str, Any]:
        """What a resumed run must know: running totals, and what was noted since the last `take`."""
        noted = {name: [(float(value), float(weight)) for value, weight in pairs] for name, pairs in self._values.items()}
        return {"totals": dict(self._totals), "noted": noted}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._totals = defaultdict(float, state["totals"])
        self._values = defaultdict(list, state["noted"])

    def take(self, accelerator: Any) -> dict[str, float]:
        """The averages (largest and smallest values, running totals) over all ranks since the last call. Collective.

        A name that weighed nothing on every rank is left out.
        """
        names = set().union(
            *gather_object([sorted(self._values)])
        )  # one collective of a few bytes, so that no rank waits for others' names
        noted = {name: [(float(value), float(weight)) for value, weight in self._values.get(name, ())] for name in sorted(names)}
        self._values.clear()
        extreme = {name for name in noted if name.endswith((*LARGEST, *SMALLEST))}
        averages = _averages({name: pairs for name, pairs in noted.items() if name not in extreme}, accelerator)
        largest = {name: pairs for name, pairs in noted.items() if name.endswith(LARGEST)}
        smallest = {name: pairs for name, pairs in noted.items() if name.endswith(SMALLEST)}
        return (
            averages
            | _extremes(largest, accelerator, pick=max)
            | _extremes(smallest, accelerator, pick=min)
            | _sums(dict(self._totals), accelerator)
        )


def _averages(noted: dict[str, list[tuple[float, float]]], accelerator: Any) -> dict[str, float]:
    names = sorted(noted)
    sums = [[sum(value * weight for value, weight in noted[name] if weight) for name in names]]
    weights = [[sum(weight for _, weight in noted[name]) for name in names]]
    total, weight = accelerator.reduce(torch.tensor(sums + weights, dtype=torch.float64).to(accelerator.device), reduction="sum").tolist()
    return {name: t / w for name, t, w in zip(names, total, weight, strict=True) if w}


def _extremes(noted: dict[str, list[tuple[float, float]]], accelerator: Any, *, pick: Callable[..., float]) -> dict[str, float]:
    names = sorted(noted)
    if not names:
        return {}
    nothing = -torch.inf if pick is max else torch.inf
    own = [[pick((value for value, weight in noted[name] if weight), default=nothing) for name in names]]
    everyone = accelerator.gather(torch.tensor(own, dtype=torch.float32, device=accelerator.device)).T.tolist()
    return {name: pick(values) for name, values in zip(names, everyone, strict=True) if pick(values) != nothing}


def _sums(numbers: dict[str, float], accelerator: Any) -> dict[str, float]:
    names = sorted(numbers)
    packed = torch.tensor([numbers[name] for name in names], dtype=torch.float32, device=accelerator.device)
    return dict(zip(names, accelerator.reduce(packed, reduction="sum").tolist(), strict=True))


def device_memory(device: torch.device) -> dict[str, float]:
    """The most memory that was allocated on `device` since the last call, in GiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return {"mem/peak_gib": peak}
