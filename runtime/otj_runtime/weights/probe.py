"""The probe: fixed tokens, scored by trainer and generator. Equal scores prove that both hold the same weights; a status code does not.

The tokens are spread over the vocabulary by a fixed rule. Every layer takes part in every score, and every row of the output
matrix through the softmax, so a parameter that was not updated shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from otj_runtime.api import DType
from otj_runtime.weights.errors import WeightsDiverged

SEQUENCES = 3
SEQUENCE_TOKENS = 16

EXACT_BOUND = 1e-4
"""Largest difference of any log-probability where both sides compute in float32. Measured: up to 5e-5."""

ROUNDED_BOUND = 0.06
"""Mean difference where a side computes in 16 bits. Measured: 0.02 to 0.04, unbiased."""


@dataclass(frozen=True)
class Agreement:
    """How close both sides are: largest and mean absolute difference of the log-probabilities."""

    max_abs: float
    mean: float


def probe_sequences(vocabulary: int) -> list[list[int]]:
    """Token ids for a vocabulary of that size: the same for the same size, every id below it."""
    state = 12345
    result: list[list[int]] = []
    for _ in range(SEQUENCES):
        row = []
        for _ in range(SEQUENCE_TOKENS):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            row.append((state >> 33) % vocabulary)
        result.append(row)
    return result


def trainer_scores(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probability of each token but the first under the unwrapped transformers model: raw, without dropout, gradient or autocast."""
    device = next(model.parameters()).device
    tokens = torch.tensor(sequences, device=device)
    with _as_it_is(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    scores = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    rows: list[list[float]] = scores.tolist()
    return rows


@contextmanager
def _as_it_is(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and the model's own `forward`: accelerate shadows it by one that switches autocast on."""
    modes = [(module, module.training) for module in model.modules()]
    shadow = model.__dict__.pop("forward", None)
    model.eval()
    try:
        yield
    finally:
        if shadow is not None:
            model.__dict__["forward"] = shadow
        for module, training in modes:
            module.training = training


def compare(
    trainer: list[list[float]], generator: list[list[float]], *, sequences: list[list[int]], version: int, dtypes: set[DType]
) -> Agreement:
    """How close two scorings of the same sequences are.

    Args:
        dtypes: what the two sides compute in; the coarsest decides the bound.

    Raises:
        WeightsDiverged: if they are further apart than the bound, or one of them is not a number.
    """
    differences = [
        (abs(ours - theirs), row, position)
        for row, (left, right) in enumerate(zip(trainer, generator, strict=True))
        for position, (ours, theirs) in enumerate(zip(left, right, strict=True))
    ]
    worst, row, position = max(differences, key=lambda item: math.inf if math.isnan(item[0]) else item[0])
    mean = sum(item[0] for item in differences) / len(differences)
    exact = dtypes == {DType.FLOAT32}
    found, bound, kind = (worst, EXACT_BOUND, "largest") if exact else (mean, ROUNDED_BOUND, "mean")
    if not found <= bound:  # written so that NaN fails
        names = " and ".join(sorted(dtypes))
        raise WeightsDiverged(
            f"policy version {version} ({names}): trainer and generator disagree on the probe; {kind} difference {found:.3g}, bound {bound:g}. "
            f"Worst: token {sequences[row][position + 1]} at position {position + 1} of sequence {row}, trainer "
            f"{trainer[row][position]:.6f}, generator {generator[row][position]:.6f}"
        )
    return Agreement(max_abs=worst, mean=mean)
