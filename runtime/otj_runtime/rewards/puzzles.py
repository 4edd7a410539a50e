"""Answers to reasoning-gym's tasks, judged by the package's own verifiers."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from otj_runtime.rewards.builtin import Completion, completion_text

log = logging.getLogger(__name__)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(
    *, completions: Sequence[Completion], question: Sequence[str], answer: Sequence[Any], metadata: Sequence[dict[str, Any]], **_: Any
) -> list[float]:
    """The verifier's score, from 0 to 1, of what stands in the completion's last <answer> tags, or of all of it without any.

    A verifier that stumbles over an answer gives it 0: models write what its author did not think of.
    """
    rows = zip(completions, question, answer, metadata, strict=True)
    return [
        _score({"question": asked, "answer": expected, "metadata": more}, completion_text(said)) for said, asked, expected, more in rows
    ]


def _score(entry: dict[str, Any], said: str) -> float:
    found = _ANSWER.findall(said)
    try:
        return float(_verifier(entry["metadata"]["source_dataset"])(answer=found[-1].strip() if found else said.strip(), entry=entry))
    except Exception as error:
        log.warning("reasoning_gym/%s stumbled over %.200r: %s", entry["metadata"]["source_dataset"], said, error)
        return 0.0


@cache
def _verifier(name: str) -> Any:
    import reasoning_gym as package

    return package.get_score_answer_fn(name)
