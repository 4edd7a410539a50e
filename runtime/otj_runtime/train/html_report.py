"""The report of a run: one HTML file that opens without a server, made from metrics.jsonl alone.

    metrics.jsonl --line by line--> Story: the series that are shown, and a few completions of the first and the last steps
                  --render--------> report.html: key numbers, charts, completions side by side

Its size is bounded whatever the run's length: lines are thinned, completions cut. Everything that a model or a user wrote is escaped;
there is no script and nothing is fetched.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from otj_runtime.train.svg import POINTS, Line, Point, chart, number, smooth, thin

REPORT_FILE = "report.html"

ENDS = 5
"""Steps at each end of a run that are averaged."""

SHOWN, EXCERPT = 4, 900
"""Completions shown of each end, and the characters of each."""


@dataclass(frozen=True)
class Panel:
    """A chart: its title, what it tells, the metrics drawn and their names, and values that the vertical range includes."""

    title: str
    note: str
    metrics: dict[str, str]
    low: float | None = None
    high: float | None = None


PANELS = (
    Panel("Reward", "Mean over all completions of a step.", {"reward": "reward"}),
    Panel(
        "Held-out and evaluation", "Mean reward on prompts that are not trained on.", {"heldout": "held out", "eval_reward": "evaluation"}
    ),
    Panel(
        "Spread of rewards",
        "Groups with equal rewards teach nothing.",
        {
            "reward_std": "standard deviation",
            "frac_reward_zero_std": "share of equal groups",
        },
        low=0,
    ),
    Panel("KL to the base model", "Per token.", {"kl": "KL", "objective/kl": "KL"}, low=0),
    Panel("Completion length", "Tokens.", {"completions/mean_length": "mean", "completions/max_length": "longest"}, low=0),
    Panel("Truncated completions", "Share that hit the length limit.", {"completions/clipped_ratio": "truncated"}, low=0, high=1),
    Panel("Entropy", "Nats per token. A steep fall comes before a collapse.", {"entropy": "entropy"}, low=0),
    Panel("Loss", "", {"loss": "loss"}),
    Panel(
        "Trainer and sampler disagree",
        "Mean absolute difference of log-probabilities on the same tokens.",
        {
            "sampling/sampling_logp_difference/mean": "difference",
        },
        low=0,
    ),
    Panel(
        "Idle share",
        "Of a step's time. Move accelerators to the side that idles less.",
        {
            "idle/trainer": "trainer",
            "idle/generator": "generator",
        },
        low=0,
        high=1,
    ),
    Panel("Weight sync", "Seconds from the first byte to the proof.", {"sync/total_s": "seconds"}, low=0),
    Panel("Time of a step", "Seconds.", {"step_time": "step", "time/generate": "generation", "time/train": "learning"}, low=0),
    Panel("Gradient norm", "", {"grad_norm": "norm"}, low=0),
)

KEPT = frozenset(name for panel in PANELS for name in panel.metrics) | {"tokens_generated", "world_size", "eval_reward"}


@dataclass
class Story:
    """What a run said of itself.

    Attributes:
        series: by metric, (step, value) in order.
        first, last: a few completions of the first and of the last step that has any.
        began, ended: seconds since the epoch, of the first and the last line.
    """

    series: dict[str, list[Point]] = field(default_factory=lambda: defaultdict(list))
    first: tuple[int, list[dict[str, Any]]] | None = None
    last: tuple[int, list[dict[str, Any]]] | None = None
    steps: int = 0
    total_steps: int = 0
    began: float = math.inf
    ended: float = 0.0


def read_story(path: Path) -> Story:
    """The story in a metrics file, read line by line; only what is shown stays in memory."""
    story = Story()
    for line in _lines(path):
        step = int(line["step"])
        story.steps, story.total_steps = step, int(line.get("totalSteps", step))
        story.began, story.ended = min(story.began, line["time"]), line["time"]
        rewards = (name for name in line.get("metrics", {}) if name.startswith("rewards/") and name.endswith("/mean"))
        for name in (*KEPT, *rewards):
            if (value := line.get("metrics", {}).get(name)) is not None:
                story.series[name].append((step, value))
        if line.get("heldout"):
            story.series["heldout"].append((step, line["heldout"]["accuracy"]))
        if line.get("completions"):
            story.last = (step, line["completions"][:SHOWN])
            story.first = story.first or story.last
    return story


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def write_report(metrics: Path, target: Path, *, title: str, facts: dict[str, str]) -> None:
    """Make `target` from the file `metrics`, whole or not at all. `facts` stand below the title."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.write_text(render(read_story(metrics), title=title, facts=facts), encoding="utf-8")
    draft.replace(target)


def render(story: Story, *, title: str, facts: dict[str, str]) -> str:
    """The page."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    known = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    tiles = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(more)}</p></div>'
        for name, value, more in _tiles(story)
    )
    cards = "".join(_card(panel, story) for panel in _panels(story))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style></head>\n'
        f'<body><main><header><h1>{escape(title)}</h1><dl class="facts">{known}</dl></header>\n'
        f'<dl class="tiles">{tiles}</dl>\n<section class="cards" aria-label="Charts">{cards}</section>\n{_completions(story)}'
        f"</main></body></html>\n"
    )


def _panels(story: Story) -> list[Panel]:
    """The panels, and one with the reward functions where there are several."""
    functions = {name: name.removeprefix("rewards/").removesuffix("/mean") for name in story.series if name.startswith("rewards/")}
    extra = [Panel("Reward functions", "Mean of each, before its weight.", dict(list(functions.items())[:4]))] if len(functions) > 1 else []
    return [PANELS[0], *extra, *PANELS[1:]]


def _card(panel: Panel, story: Story) -> str:
    lines = [Line(name, story.series[metric]) for metric, name in panel.metrics.items() if story.series.get(metric)]
    if not lines:
        return ""
    ends = [number(smooth(thin(line.points, POINTS))[-1][1]) for line in lines]
    legend = "".join(
        f'<li><span class="key c{i % 4 + 1}" aria-hidden="true"></span>{escape(line.name)} <b>{end}</b></li>'
        for i, (line, end) in enumerate(zip(lines, ends, strict=True))
    )
    picture = chart(panel.title, lines, low=panel.low, high=panel.high)
    return f'<article class="card"><h2>{escape(panel.title)}</h2><p>{escape(panel.note)}</p><ul class="legend">{legend}</ul>{picture}</article>'


def _tiles(story: Story) -> Iterator[tuple[str, str, str]]:
    """Key numbers: name, value, and a remark."""
    done = story.total_steps <= 0 or story.steps >= story.total_steps
    yield "Steps", number(story.steps), "complete" if done else f"of {number(story.total_steps)}"
    for name, label in (("reward", "Reward"), ("heldout", "Held out"), ("eval_reward", "Evaluation")):
        if values := [value for _, value in story.series.get(name, ())]:
            ends = ENDS if name == "reward" else 1
            first, last = _mean(values[:ends]), _mean(values[-ends:])
            yield label, number(last), f"{last - first:+.3g} from {number(first)}" if len(values) > 1 else ""
    if tokens := story.series.get("tokens_generated"):
        seconds = max(1e-9, story.ended - story.began)
        yield "Tokens generated", number(tokens[-1][1]), f"{number(tokens[-1][1] / seconds)} per second" if len(tokens) > 1 else ""
    if syncs := [value for _, value in story.series.get("sync/total_s", ())]:
        yield "Weight sync", f"{number(median(syncs))} s", f"median, at most {number(max(syncs))} s"
    if story.ended > story.began:
        yield "Duration", _duration(story.ended - story.began), f"{number(story.steps / (story.ended - story.began) * 3600)} steps per hour"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _completions(story: Story) -> str:
    """Samples of the first and the last step, side by side."""
    if story.first is None or story.last is None:
        return ""
    columns = "".join(
        f'<div class="column"><h3>Step {step}</h3>{"".join(map(_sample, samples))}</div>'
        for step, samples in ((story.first, story.last) if story.first != story.last else (story.last,))
    )
    return f'<section aria-label="Completions"><h2>Completions, first and last</h2><div class="columns">{columns}</div></section>\n'


def _sample(answer: dict[str, Any]) -> str:
    reward = number(float(answer.get("reward") or 0.0))
    return (
        f'<figure class="sample"><figcaption><span>{_cut(answer["prompt"])}</span><b title="reward">{reward}</b></figcaption>'
        f"<pre>{_cut(answer['completion'])}</pre></figure>"
    )


def _cut(text: str) -> str:
    return escape(text if len(text) <= EXCERPT else f"{text[:EXCERPT]} …")
