"""Which split of the accelerators would be faster: a pure estimate from measured idle shares.

A side that was busy for a share of a step did (share x seconds x accelerators) of work. The same work on other numbers of accelerators
takes as long as it divides by them. With staleness 0 both sides take turns, so their times add up; with more they overlap, and the
longer one counts. What neither explains (weight sync, waiting for other ranks) stays as it is. It assumes that work divides evenly and
the batch stays the same: with another number of training ranks, per_device_train_batch_size has to be changed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WORTHWHILE = 0.1
"""Share of the step that has to be saved before anything is advised: measured shares waver by a few hundredths."""


@dataclass(frozen=True)
class Split:
    """Accelerators that train and that generate."""

    training: int
    generation: int


@dataclass(frozen=True)
class Advice:
    """A split that would be faster, and the seconds that a step would take with it."""

    split: Split
    step_s: float


def advise(split: Split, *, per_engine: int, staleness: int, step_s: float, idle_trainer: float, idle_generator: float) -> Advice | None:
    """The fastest split of the same accelerators, if it is worth the change.

    Args:
        split: what was measured.
        per_engine: accelerators of one generator engine; generation gets whole engines.
        staleness: generations sampled ahead.
        step_s: seconds of a step.
        idle_trainer, idle_generator: shares of it in which that side had nothing to do, 0 to 1.
    """
    training_work = (1 - idle_trainer) * step_s * split.training
    generation_work = (1 - idle_generator) * step_s * split.generation

    def estimate(candidate: Split) -> float:
        sides = training_work / candidate.training, generation_work / candidate.generation
        return max(sides) if staleness > 0 else sum(sides)

    rest = max(0.0, step_s - estimate(split))
    total = split.training + split.generation
    candidates = [Split(total - generation, generation) for generation in range(per_engine, total, per_engine)]
    if not candidates:
        return None
    best = min(candidates, key=lambda candidate: (estimate(candidate), abs(candidate.generation - split.generation)))
    faster = estimate(best) + rest
    return Advice(best, faster) if best != split and faster <= (1 - WORTHWHILE) * step_s else None


def split_metrics(split: Split, metrics: Mapping[str, float], *, per_engine: int, staleness: int) -> dict[str, float]:
    """The advice that follows from a step's metrics, as metrics: the split that is in use where none would be clearly faster."""
    try:
        step_s, idle_trainer, idle_generator = (metrics[name] for name in ("step_time", "idle/trainer", "idle/generator"))
    except KeyError:
        return {}
    found = advise(
        split, per_engine=per_engine, staleness=staleness, step_s=step_s, idle_trainer=idle_trainer, idle_generator=idle_generator
    )
    best = found or Advice(split, step_s)
    return {"split/generation_gpus": float(best.split.generation), "split/step_time": best.step_s}


def advice_text(metrics: Mapping[str, float]) -> str | None:
    """The advice in words, from the metrics of `split_metrics` and the step's own; None where no other split would be clearly faster."""
    try:
        gpus, now, then = (metrics[name] for name in ("split/generation_gpus", "step_time", "split/step_time"))
    except KeyError:
        return None
    if then >= now:
        return None
    return f"generation.gpus: {gpus:.0f} would take about {then:.3g} s a step instead of {now:.3g} s, for the same batch"
