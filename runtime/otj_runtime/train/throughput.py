"""What the learning half of a step takes, and which share of the device's arithmetic that is.

Measured from the moment that the micro-batches are there to the log line, for whose loss the device was waited for anyhow. So nothing
is waited for on its account, and with `logging_steps` above 1 the last step before the line stands for the others.
"""

from __future__ import annotations

import time
from typing import Any

import torch

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second by a part of the device's name, as NVIDIA's data sheets give them; the first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 operations per second of `device` at most; None if that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class StepClock:
    """Times the learning half of optimizer steps on one rank.

    Args:
        parameters: of the policy.
        trained: those of them that are trained.
        peak: operations per second of the device at most; None where that is not known, and `mfu` is left out.
    """

    def __init__(self, *, parameters: int, trained: int, peak: float | None) -> None:
        # Two operations for a parameter and token forward, two for the gradient of the activations, two for that of the parameter
        # (arXiv:2204.02311, appendix B, without attention). Further forward passes, as of a reference, are no work of the model.
        self._flops_per_token = 4 * parameters + 2 * trained
        self._peak = peak
        self._ready: float | None = None
        self._tokens: list[torch.Tensor] = []

    def batches_ready(self) -> None:
        """A step begins to learn."""
        self._ready, self._tokens = time.monotonic(), []

    def count(self, tokens: torch.Tensor) -> None:
        """A micro-batch is learnt from. `tokens`: [] int64, that the model read; it stays on its device."""
        if self._peak is not None:
            self._tokens.append(tokens)

    def read(self) -> dict[str, float]:
        """Seconds since the batches were there, and the share of the device's arithmetic that the model's own operations are: `time/train`
        and `mfu`."""
        if self._ready is None:
            return {}
        seconds = time.monotonic() - self._ready
        if self._peak is None:
            return {"time/train": seconds}
        flops = self._flops_per_token * sum(int(tokens) for tokens in self._tokens)
        return {"time/train": seconds, "mfu": flops / seconds / self._peak}


def step_clock(model: Any, device: torch.device) -> StepClock:
    """The clock of a policy; parameters that ZeRO-3 has cut count whole."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return StepClock(
        parameters=sum(size for size, _ in sizes), trained=sum(size for size, trained in sizes if trained), peak=peak_flops(device)
    )
