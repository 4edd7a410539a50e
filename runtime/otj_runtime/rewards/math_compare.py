"""What the workers of `mathematics` run: compares two answers by value. For a main thread, because math-verify sets its deadlines by signals."""

from __future__ import annotations

from math_verify import parse, verify


def compare(pair: list[str]) -> str:
    """equal, different, or unreadable if the first of the two, the truth, is no expression."""
    truth = parse(pair[0]) or parse(f"${pair[0]}$")
    if not truth:
        return "unreadable"
    return "equal" if verify(truth, parse(pair[1])) else "different"
