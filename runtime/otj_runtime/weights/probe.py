"""The probe: fixed tokens, scored by trainer and generator. Equal scores prove that both hold the same weights; a status code does not.

Every layer takes part in every score, and every row of the output matrix through the softmax, so a parameter that was not
updated shows. The tokens are prompts of the run where there are some. Tokens drawn at random serve small models; a pretrained
one meets contexts in them that it never saw, where rounding errors grow without limit.

In float32 the bound is one number, as in `allclose`. In 16 bits the trainer takes its weights as they were sent (`as_sent`), and both sides round
differently what they compute with them, by how much depends on the model: on 23 prompts SmolLM2-135M in bfloat16 differs from itself in
float32 by 0.027 to 0.080, from vLLM's bfloat16 by 0.039 to 0.086, and vLLM from a trainer that is one perturbation of 2 % ahead by 0.21
to 0.29. So the trainer also computes in the generator's dtype, or in float32 where its own weights are kept in 16 bits, and three times
what that changes is allowed where it is more than `ROUNDED_BOUND`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from otj_runtime.api import DType
from otj_runtime.weights.as_sent import as_sent
from otj_runtime.weights.errors import WeightsDiverged
from otj_runtime.weights.forwards import computing_by
from otj_runtime.weights.precision import ComputedIn, keeps_narrow_weights, kept_in

SEQUENCES = 3
SEQUENCE_TOKENS = 16

EXACT_BOUND = 1e-4
"""Difference of a log-probability that is allowed where both sides compute in float32: absolute, or relative for those beyond -1,
since float32 rounds relative to size. Measured on SmolLM2-135M: up to 1e-4 absolute, at tokens with log-probabilities near -10."""

ROUNDED_BOUND = 0.06
"""Mean difference that is always allowed where a side computes in 16 bits. Measured on sampled tokens: 0.02 to 0.04, unbiased."""

ROUNDING_FACTOR = 3
"""Mean difference that is allowed, in units of the trainer's own rounding. Measured: 0.7 to 1.7."""

PROMPT_TOKENS = 32
"""Prompts are taken into the probe until they have this many tokens together."""

LONGEST_PROMPT = 64
"""Tokens of a prompt that are used."""

MEASURED_FIRST, MEASURED_EVERY = 3, 50
"""The trainer's rounding is measured with the first scores and then with one of so many. Of one model it scatters by half of its size from
version to version, so the mean counts."""


@dataclass(frozen=True)
class Agreement:
    """How close both sides are: largest and mean absolute difference of the log-probabilities.

    Attributes:
        bound: what was allowed, of the largest scaled difference if `exact`, else of `mean`.
        exact: whether both sides compute in float32.
    """

    max_abs: float
    mean: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class TrainerScores:
    """The probe as the trainer scores it.

    Attributes:
        logprobs: log-probability of each token but the first of each sequence, in float32, of the weights as they were sent.
        rounding: mean absolute change of these by computing in the generator's dtype, or in float32 where the trainer's weights are kept
            in 16 bits; 0 where both sides are of float32.
    """

    logprobs: list[list[float]]
    rounding: float


def random_sequences(vocabulary: int) -> list[list[int]]:
    """Token ids for a vocabulary of that size, spread over it by a fixed rule: the same for the same size, every id below it."""
    state = 12345
    result: list[list[int]] = []
    for _ in range(SEQUENCES):
        row = []
        for _ in range(SEQUENCE_TOKENS):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            row.append((state >> 33) % vocabulary)
        result.append(row)
    return result


def prompt_sequences(prompts: Iterable[list[int]]) -> list[list[int]]:
    """The first prompts, as many as the probe needs; none if they are all too short to have a token to score."""
    result: list[list[int]] = []
    for prompt in prompts:
        if len(prompt) > 1:
            result.append(prompt[:LONGEST_PROMPT])
        if sum(map(len, result)) >= PROMPT_TOKENS:
            break
    return result


def trainer_scores(
    model: Any, sequences: list[list[int]], dtype: DType, *, rounding: float | None = None, adapter_apart: bool = False
) -> TrainerScores:
    """Score the sequences with the unwrapped transformers model: raw, without dropout or gradient, with the weights that a generator has.

    Args:
        dtype: what the generator computes in.
        rounding: what 16 bits change, if that was measured before: it spares half of the work.
        adapter_apart: whether the generator was sent a LoRA adapter, instead of weights with the adapter merged into them.
    """
    device = next(model.parameters()).device
    narrow = keeps_narrow_weights(model)
    target: torch.dtype = getattr(torch, dtype)
    with _as_it_is(model), torch.no_grad(), torch.autocast(device.type, enabled=False), as_sent(model, target, adapter_apart=adapter_apart):
        logprobs = _logprobs(model, sequences)
        if dtype is DType.FLOAT32 and not narrow:
            return TrainerScores(logprobs=logprobs, rounding=0.0)
        if rounding is not None:
            return TrainerScores(logprobs=logprobs, rounding=rounding)
        with ComputedIn(torch.float32 if narrow else target):
            otherwise = _logprobs(model, sequences)
    return TrainerScores(logprobs=logprobs, rounding=_differences(logprobs, otherwise).mean)


def _logprobs(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    longest = max(map(len, sequences))
    # What follows a token cannot change its score, so any filling does.
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=next(model.parameters()).device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    scores = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return [row[: len(sequence) - 1] for row, sequence in zip(scores.tolist(), sequences, strict=True)]


@contextmanager
def _as_it_is(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and the model's own `forward`: accelerate shadows it by one that switches autocast on."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with computing_by(model, None):
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class _Differences:
    """Mean and largest absolute difference, and the largest one scaled by the size of its log-probability, with its place."""

    mean: float
    max_abs: float
    worst: float
    row: int
    position: int


def _differences(left: list[list[float]], right: list[list[float]]) -> _Differences:
    found = [
        (abs(a - b), abs(a - b) / max(1.0, abs(a)), row, position)
        for row, (ours, theirs) in enumerate(zip(left, right, strict=True))
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    _, worst, row, position = max(found, key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    absolute = [item[0] for item in found]
    return _Differences(mean=sum(absolute) / len(found), max_abs=max(absolute), worst=worst, row=row, position=position)


class Probe:
    """The probe of one trainer: its tokens, the trainer's scores of them, and the comparison with the generator's.

    Args:
        model: the unwrapped policy.
        prompts: token ids of prompts of the run, the same on every rank; without any, the tokens are random.
        dtype: what the generator computes in.
        adapter_apart: as for `trainer_scores`.

    Attributes:
        sequences: the tokens.
    """

    def __init__(self, model: Any, prompts: Iterable[list[int]], dtype: DType, *, adapter_apart: bool = False) -> None:
        self.sequences = prompt_sequences(prompts) or random_sequences(model.config.get_text_config().vocab_size)
        self._model, self._dtype, self._adapter_apart = model, dtype, adapter_apart
        self._scored = 0
        self._measured: list[float] = []

    def score(self) -> TrainerScores:
        """The trainer's half, of the weights as they are now. Collective if the model is sharded."""
        measure = self._scored < MEASURED_FIRST or self._scored % MEASURED_EVERY == 0
        self._scored += 1
        known = None if measure else fmean(self._measured)
        scores = trainer_scores(self._model, self.sequences, self._dtype, rounding=known, adapter_apart=self._adapter_apart)
        if measure:
            self._measured.append(scores.rounding)
        return replace(scores, rounding=fmean(self._measured))

    def compare(self, trainer: TrainerScores, engines: list[list[list[float]]], *, version: int) -> Agreement:
        """As `compare_all`."""
        return compare_all(trainer, engines, sequences=self.sequences, version=version, dtypes={kept_in(self._model), self._dtype})


def compare_all(
    trainer: TrainerScores, engines: list[list[list[float]]], *, sequences: list[list[int]], version: int, dtypes: set[DType]
) -> Agreement:
    """How close the trainer's scoring of the sequences and that of each engine are; of several, the one that is furthest off.

    Raises:
        WeightsDiverged: as `compare`, naming the engine where there are several.
    """
    names = [f"engine {number} of the generator" if len(engines) > 1 else "generator" for number in range(len(engines))]
    found = [
        compare(trainer, scores, sequences=sequences, version=version, dtypes=dtypes, name=name)
        for name, scores in zip(names, engines, strict=True)
    ]
    return max(found, key=lambda agreement: agreement.max_abs)


def compare(
    trainer: TrainerScores,
    generator: list[list[float]],
    *,
    sequences: list[list[int]],
    version: int,
    dtypes: set[DType],
    name: str = "generator",
) -> Agreement:
    """How close two scorings of the same sequences are.

    Args:
        name: what to call the generator.
        dtypes: what the two sides compute in; the coarsest decides the bound.

    Raises:
        WeightsDiverged: if they are further apart than the bound, or one of them is not a number.
    """
    difference = _differences(trainer.logprobs, generator)
    exact = dtypes == {DType.FLOAT32}
    bound = EXACT_BOUND if exact else max(ROUNDED_BOUND, ROUNDING_FACTOR * trainer.rounding)
    found, kind = (difference.worst, "largest scaled") if exact else (difference.mean, "mean")
    if not found <= bound:  # written so that NaN fails
        row, position = difference.row, difference.position
        names = " and ".join(sorted(dtypes))
        raise WeightsDiverged(
            f"policy version {version} ({names}): trainer and {name} disagree on the probe; {kind} difference {found:.3g}, bound {bound:.3g}. "
            f"Worst: token {sequences[row][position + 1]} at position {position + 1} of sequence {row}, trainer "
            f"{trainer.logprobs[row][position]:.6f}, generator {generator[row][position]:.6f}"
        )
    return Agreement(max_abs=difference.max_abs, mean=difference.mean, bound=bound, exact=exact)
