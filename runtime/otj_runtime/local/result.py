"""What a run came to: the result file's content, and the summary at the end. Pure."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

from otj_runtime.local.follow import Story
from otj_runtime.local.pod import Outcome
from otj_runtime.pod.metrics import Answer, HeldOut, values
from otj_runtime.pod.split import advice_text

ENDS = 5
"""Steps at each end whose rewards are averaged."""

SHOWN_ANSWERS = 6


def first_and_last(rewards: list[float]) -> list[float] | None:
    """Mean rewards of the first and the last steps; None without any."""
    if not rewards:
        return None
    first, last = rewards[:ENDS], rewards[-ENDS:]
    return [sum(first) / len(first), sum(last) / len(last)]


def build_result(story: Story, outcome: Outcome, *, wall_s: float, generator_version: str | None) -> dict[str, Any]:
    """The content of the result file."""
    lines = story.lines
    heldout = story.heldout
    result: dict[str, Any] = {
        "succeeded": outcome.note is None,
        "steps": story.steps[-1].step if story.steps else 0,
        "world_size": _last_count(story, "world_size"),
        "reward": first_and_last(story.rewards),
        "wall_s": round(wall_s, 1),
        "first_reward_s": None if story.first_reward_after is None else round(story.first_reward_after, 1),
        "sync": {
            "count": _last_count(story, "sync/count") or len(list(values(lines, "sync/total_s"))),
            "max_abs_logprob_diff": max(values(lines, "sync/max_abs_logprob_diff"), default=None),
            "p50_s": median(times) if (times := list(values(lines, "sync/total_s"))) else None,
        },
        "tokens_generated": _last_count(story, "tokens_generated"),
        "advice": advice_text(story.steps[-1].metrics) if story.steps else None,
        "heldout": [heldout[0].accuracy, heldout[-1].accuracy] if len(heldout) > 1 else None,
        "generator": None if generator_version is None else f"vllm {generator_version}",
    }
    if outcome.note is not None:
        result |= {"reason": outcome.note.reason.value, "message": outcome.note.message}
    return result


def _last_count(story: Story, name: str) -> int | None:
    found = list(values(story.lines, name))
    return int(found[-1]) if found else None


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    parts = [f"{result['steps']} steps in {duration(result['wall_s'])}"]
    if result["world_size"]:
        parts[0] += (
            f" on {result['world_size']} training rank{'s' if result['world_size'] > 1 else ''}, {result['generator'] or 'no generator'}"
        )
    if result["reward"]:
        first, last = result["reward"]
        parts.append(f"reward    {first:.3f} -> {last:.3f} (means of the first and the last {ENDS} steps)")
    if result["heldout"]:
        before, after = result["heldout"]
        parts.append(f"held out  {before:.3f} -> {after:.3f}")
    sync = result["sync"]
    if sync["count"] and sync["p50_s"] is not None and sync["max_abs_logprob_diff"] is not None:
        parts.append(
            f"sync      {sync['count']} syncs, median {sync['p50_s']:.3f} s, largest log-probability difference {sync['max_abs_logprob_diff']:.2g}"
        )
    if result["advice"]:
        parts.append(f"advice    {result['advice']}")
    return "\n".join(parts)


def answers_table(before: HeldOut, after: HeldOut) -> Table:
    """A few held-out answers before and after training, side by side."""
    table = Table(title="held-out answers", title_justify="left")
    table.add_column("prompt", overflow="fold")
    table.add_column("before", overflow="fold")
    table.add_column("after", overflow="fold")
    later = {answer.prompt: answer for answer in after.answers}
    for answer in before.answers[:SHOWN_ANSWERS]:
        if answer.prompt in later:
            table.add_row(escape(answer.prompt), _judged(answer), _judged(later[answer.prompt]))
    return table


def _judged(answer: Answer) -> str:
    colour = "green" if answer.reward >= 1 else "yellow" if answer.reward > 0 else "red"
    return f"[{colour}]{escape(answer.completion.strip())}[/{colour}]"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
