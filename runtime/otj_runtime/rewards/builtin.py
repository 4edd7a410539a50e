"""Built-in reward functions, in the calling convention that any reward has: everything by name, one list entry per completion.

A completion is a string, or for conversational prompts a list of messages of which the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

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
