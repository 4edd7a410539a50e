"""Pairwise judges as rewards: which of two completions is better, asked about every pair of a group.

    group of n completions -> n(n-1)/2 pairs, each asked in one order or in both -> share of its comparisons that a completion won

A judge compares, a trainer wants numbers: the share of wins in a round-robin, from 0 to 1, orders a group as the judge does, so Online
DPO's best-versus-worst and GRPO's advantages need nothing new. Asking in both orders cancels a judge's preference for a position, at
twice the questions. Equal completions tie without a question. An answer that is neither 0 nor 1 counts half for both.

A judge is TRL's: a callable, or an object with a method `judge`, that takes `prompts` and `pairs` (by position) and returns for each
pair the index of the better one, or -1 if it cannot say; a coroutine of that is fine too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from otj_runtime.pod.errors import RewardFailed, RewardImportFailed
from otj_runtime.rewards.builtin import completion_text

Judge = Callable[[list[Any], list[list[str]]], Any]
"""(prompts, pairs) -> index of the better completion of each pair."""


@dataclass(frozen=True, slots=True)
class Match:
    """A question to the judge: completions `first` and `second` of the batch, in the order shown."""

    first: int
    second: int


def round_robin(groups: Sequence[Sequence[int]], *, both_orders: bool) -> list[Match]:
    """Every pair of every group; with `both_orders`, each a second time the other way round."""
    pairs = [Match(a, b) for group in groups for a, b in combinations(group, 2)]
    return pairs + [Match(match.second, match.first) for match in pairs] if both_orders else pairs


def win_shares(count: int, matches: Sequence[Match], winners: Sequence[int]) -> list[float]:
    """Share of its matches that each of `count` completions won, a draw as half; 0.5 without a match. `winners`: 0, 1, or -1 for a draw."""
    points, played = [0.0] * count, [0] * count
    for match, winner in zip(matches, winners, strict=True):
        for side, completion in enumerate((match.first, match.second)):
            played[completion] += 1
            points[completion] += 0.5 if winner < 0 else float(winner == side)
    return [won / of if of else 0.5 for won, of in zip(points, played, strict=True)]


class JudgeReward:
    """A reward function that lets a judge compare the completions of each prompt.

    Args:
        judge: see the module's text.
        both_orders: ask about each pair twice, with the completions swapped.
    """

    def __init__(self, judge: Any, *, both_orders: bool = True) -> None:
        compare = getattr(judge, "judge", judge)
        if not callable(compare):
            raise RewardImportFailed(f"judge {judge!r:.100} is neither callable nor an object with a method judge(prompts, pairs)")
        self.__name__ = getattr(judge, "__name__", type(judge).__name__)
        self._compare: Judge = compare
        self._both_orders = both_orders

    async def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        group_ids: Sequence[int],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """Share of wins of each completion against the others of its prompt."""
        texts = [completion_text(completion) for completion in completions]
        matches = round_robin(_members(group_ids), both_orders=self._both_orders)
        winners = [-1] * len(matches)
        asked = [index for index, match in enumerate(matches) if texts[match.first] != texts[match.second]]
        answers = await self._ask(
            [prompts[matches[index].first] for index in asked],
            [[texts[matches[index].first], texts[matches[index].second]] for index in asked],
        )
        for index, answer in zip(asked, answers, strict=True):
            winners[index] = answer
        if asked:
            log_metric("judge/undecided", sum(answer < 0 for answer in answers) / len(asked))
        return win_shares(len(texts), matches, winners)

    async def _ask(self, prompts: list[Any], pairs: list[list[str]]) -> list[int]:
        if not pairs:
            return []
        answers = self._compare(prompts, pairs)
        if inspect.isawaitable(answers):
            answers = await answers
        found = list(answers) if hasattr(answers, "__iter__") else None
        if found is None or len(found) != len(pairs):
            raise RewardFailed(f"it returned {'no list' if found is None else f'{len(found)} answers'} for {len(pairs)} pairs")
        for index, answer in enumerate(found):
            if isinstance(answer, bool | str) or answer not in (0, 1, -1):
                raise RewardFailed(
                    f"it answered {answer!r:.100} on pair {index} ({pairs[index]!r:.400}); the answer is 0, 1, or -1 for none"
                )
        return [int(answer) for answer in found]


def _members(group_ids: Sequence[int]) -> list[list[int]]:
    """Indices of the completions of each group."""
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(group_ids):
        groups.setdefault(group, []).append(index)
    return list(groups.values())
