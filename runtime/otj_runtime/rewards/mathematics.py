"""Mathematical answers compared by value: 0.5, 1/2 and \\frac{1}{2} are the same.

The package math-verify parses and compares, with sympy, which may compute for ever on what a model writes and sets its own deadlines
by signals, which need a main thread. So it runs in worker processes, and an answer that takes too long earns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from otj_runtime.rewards.builtin import Completion, completion_text
from otj_runtime.rewards.worker import Workers

ANSWER_SECONDS = 10.0
"""How long one answer may take."""


def math_verify(
    *, completions: Sequence[Completion], answer: Sequence[Any], log_metric: Callable[[str, float], None] = lambda *_: None, **_: Any
) -> list[float | None]:
    """1 where the completion's last answer has the value of the column `answer` (a number, or LaTeX with or without its dollars), else 0.

    None where the column itself cannot be parsed. Answers on which the comparison takes too long count as 0; their share is logged.
    """
    pairs = [[str(expected), completion_text(said)] for said, expected in zip(completions, answer, strict=True)]
    verdicts = _workers().map(pairs, timeout_s=ANSWER_SECONDS)
    if verdicts:
        log_metric("math_verify/too_long", sum(verdict is None for verdict in verdicts) / len(verdicts))
    scores = {"equal": 1.0, "different": 0.0, "unreadable": None}
    return [0.0 if verdict is None else scores[verdict] for verdict in verdicts]


@cache
def _workers() -> Workers:
    return Workers(Path(__file__).with_name("math_compare.py"), "compare")
