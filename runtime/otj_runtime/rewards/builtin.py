"""Built-in reward functions, in the calling convention that any reward has: everything by name, one list entry per completion.

A completion is a string, or for conversational prompts a list of messages of which the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import regex

Message = dict[str, Any]
Completion = str | Sequence[Message]

_INTEGER = re.compile(r"-?[0-9]+")


def completion_text(completion: Completion) -> str:
    """What the model said."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact_match(*, completions: Sequence[Completion], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion is the column `answer`, white space around both aside, else 0."""
    return [
        float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


MATCH_SECONDS = 1.0
"""How long matching a pattern against one completion may take: some patterns explode, and explode in all threads at once."""


def format_match(*, completions: Sequence[Completion], pattern: str, whole: bool = True, **_: Any) -> list[float]:
    """1 where the completion matches the regular expression `pattern`, a dot standing for line breaks too, else 0.

    Args:
        pattern: such as `<think>.*</think>\\s*<answer>.*</answer>`.
        whole: match the whole completion, white space around it aside; else any part.

    Raises:
        TimeoutError: if the pattern takes longer than MATCH_SECONDS on a completion.
    """
    compiled = regex.compile(pattern, regex.DOTALL)
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(completion_text(completion).strip(), timeout=MATCH_SECONDS) is not None) for completion in completions]


def length_target(*, completion_ids: Sequence[Sequence[int]], tokens: int, **_: Any) -> list[float]:
    """How near the completion's length is to `tokens`: 1 at it, falling evenly to 0 at none and at twice as many."""
    return [max(0.0, 1.0 - abs(len(ids) - tokens) / tokens) for ids in completion_ids]


def overlong_penalty(*, completion_ids: Sequence[Sequence[int]], max_tokens: int, soft_tokens: int, **_: Any) -> list[float]:
    """0 up to `max_tokens - soft_tokens` tokens, then falling evenly to -1 at `max_tokens` (DAPO, arXiv:2503.14476, eq. 13)."""
    return [-min(1.0, max(0.0, (len(ids) - max_tokens + soft_tokens) / soft_tokens)) for ids in completion_ids]


def last_integer(*, completions: Sequence[Completion], answer: Sequence[int | str], **_: Any) -> list[float]:
    """1 where the last integer in the completion is the column `answer`, an integer or its decimal digits, else 0."""
    return [
        float(_last_integer(completion_text(completion)) == _canonical(str(expected).strip()))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def _last_integer(text: str) -> str | None:
    found = _INTEGER.findall(text)
    return _canonical(found[-1]) if found else None


def _canonical(digits: str) -> str:
    """Without leading zeros. Text, because Python refuses to convert as many digits as a model may write."""
    sign, number = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    number = number.lstrip("0")
    return sign + number if number else "0"


def position_match(*, completions: Sequence[Completion], answer: Sequence[str], **_: Any) -> list[float]:
    """Share of positions at which the completion has the character of the column `answer`, from 0 to 1.

    Positions that only one of the two has count as wrong, so nothing but the answer itself earns 1.
    """
    return [_matching_share(completion_text(completion), expected) for completion, expected in zip(completions, answer, strict=True)]


def _matching_share(text: str, expected: str) -> float:
    positions = max(len(text), len(expected))
    return sum(a == b for a, b in zip(text, expected, strict=False)) / positions if positions else 1.0
