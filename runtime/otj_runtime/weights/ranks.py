"""The training ranks as one party: what one learns all learn, and what fails on one fails on all instead of leaving the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from otj_runtime.pod.errors import RunError, Stalled
from otj_runtime.weights.errors import WeightSyncFailed

T = TypeVar("T")


class Ranks:
    """All ranks of torch.distributed, or this process alone. Collective: every rank makes one, then the same calls in the same order.

    Messages go over a gloo group of its own, so they need no accelerator and have their own deadline.

    Args:
        timeout_s: longest wait for the other ranks, in seconds; longer than the longest action.
    """

    def __init__(self, *, timeout_s: float) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1
        self._timeout_s = timeout_s
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if self.size > 1 else None

    def lead(self, action: Callable[[], T], *, phase: str) -> T:
        """Run `action` on rank 0 and return its result on every rank.

        Raises:
            Stalled: if the other ranks are gone or do not come in time.
            RunError: what it raised, on every rank; other exceptions as WeightSyncFailed of `phase`.
        """
        outcome: list[Any] = [_outcome(action, phase) if self.rank == 0 else None]
        if self.size > 1:
            self._wait(lambda: dist.broadcast_object_list(outcome, src=0, group=self._group), phase)
        return cast(T, _unpack(outcome[0]))

    def together(self, action: Callable[[], T], *, phase: str) -> list[T]:
        """Run `action` on every rank; return all results, by rank, when all are done.

        Raises:
            Stalled: if the other ranks are gone or do not come in time.
            RunError: what the lowest failing rank raised, on every rank; other exceptions as WeightSyncFailed of `phase`.
        """
        outcomes: list[Any] = [_outcome(action, phase)]
        if self.size > 1:
            own, outcomes = outcomes[0], [None] * self.size
            self._wait(lambda: dist.all_gather_object(outcomes, own, group=self._group), phase)
        return [cast(T, _unpack(outcome)) for outcome in outcomes]

    def _wait(self, exchange: Callable[[], None], phase: str) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise Stalled(
                f"{phase}: rank {self.rank} lost the other ranks, or waited for them longer than {self._timeout_s:.0f} s: {error}"
            ) from error


def _outcome(action: Callable[[], T], phase: str) -> T | RunError:
    """Result or error of `action`, fit to be sent."""
    try:
        return action()
    except RunError as error:
        return error
    except Exception as error:
        failure = WeightSyncFailed(f"{phase}: {type(error).__name__}: {error}", phase=phase)
        failure.__cause__ = error
        return failure


def _unpack(outcome: Any) -> Any:
    if isinstance(outcome, RunError):
        raise outcome
    return outcome
