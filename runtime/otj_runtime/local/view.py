"""What is seen while a run goes: a live panel on a terminal, one short line a step elsewhere."""

from __future__ import annotations

import time
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from otj_runtime.local.follow import Story
from otj_runtime.local.pod import LocalPod
from otj_runtime.local.result import duration
from otj_runtime.pod.metrics import MetricsLine
from otj_runtime.pod.names import MODEL_CONTAINER

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48

_NUMBERS = (("reward", "reward"), ("kl", "kl"), ("completions/mean_length", "length"), ("step_time", "s/step"), ("sync/total_s", "s/sync"))


class View(Protocol):
    """Shows a run while it goes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def update(self, new: list[MetricsLine]) -> None:
        """Show what is new."""

    def say(self, text: str) -> None:
        """Print a line that stays."""


def make_view(console: Console, pod: LocalPod, story: Story, *, title: str) -> View:
    """The view that fits the console."""
    return LiveView(console, pod, story, title=title) if console.is_terminal else PlainView(console, pod, story)


def sparkline(values: list[float], *, width: int = SPARK_WIDTH) -> str:
    """The values as bars between their smallest and largest; of more than `width`, means of neighbours."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] for mean in means)


def step_text(line: MetricsLine, *, tokens_per_second: float | None, seconds_left: float | None) -> str:
    """A step in one line."""
    parts = [f"step {line.step}/{line.total_steps}"]
    parts += [f"{short} {line.metrics[name]:.3g}" for name, short in _NUMBERS if name in line.metrics]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:.0f} tokens/s")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} to go")
    return "  ".join(parts)


def phase_text(pod: LocalPod, story: Story) -> str:
    """What the run is doing."""
    if pod.phase == MODEL_CONTAINER:
        return "preparing the model"
    if pod.generator_ready_after is None:
        waited = 0.0 if pod.generator_started is None else time.monotonic() - pod.generator_started
        return f"starting vLLM and loading the model, {waited:.0f} s"
    if not story.steps:
        return f"vLLM {pod.generator_version} answers after {pod.generator_ready_after:.0f} s; making the first step"
    last = story.steps[-1]
    return "finishing" if last.step >= last.total_steps else "training"


class PlainView:
    """Lines, for logs and pipes."""

    def __init__(self, console: Console, pod: LocalPod, story: Story) -> None:
        self._console = console
        self._pod = pod
        self._story = story
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def update(self, new: list[MetricsLine]) -> None:
        """One line for each step, each evaluation, and each event of the generator."""
        if self._pod.generator_ready_after is not None:
            self._once(f"vLLM {self._pod.generator_version} answers after {self._pod.generator_ready_after:.0f} s")
        if self._pod.generator_restarts:
            self._once(f"vLLM ended and was started again (restart {self._pod.generator_restarts})")
        for line in new:
            if line.heldout is not None:
                self.say(f"held-out accuracy {line.heldout.accuracy:.3f} at step {line.step}")
            if line.metrics:
                latest = line is self._story.lines[-1]
                pace = self._story.tokens_per_second() if latest else None
                left = self._story.seconds_left() if latest else None
                self.say(step_text(line, tokens_per_second=pace, seconds_left=left))

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.say(text)


class LiveView:
    """A panel that is drawn again a few times a second."""

    def __init__(self, console: Console, pod: LocalPod, story: Story, *, title: str) -> None:
        self._pod = pod
        self._story = story
        self._title = title
        self._began = time.monotonic()
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def update(self, new: list[MetricsLine]) -> None:
        """Nothing: the panel reads the story whenever it is drawn."""

    def say(self, text: str) -> None:
        """Print a line above the panel."""
        self._live.console.print(text, markup=False, highlight=False)

    def _panel(self) -> RenderableType:
        elapsed = duration(time.monotonic() - self._began)
        return Panel(
            Group(*panel_rows(self._pod, self._story)),
            title=f"[bold]{escape(self._title)}[/bold]",
            subtitle=f"{elapsed}, Ctrl-C saves and stops",
            title_align="left",
            subtitle_align="right",
        )


def panel_rows(pod: LocalPod, story: Story) -> list[RenderableType]:
    """The panel's content, top to bottom."""
    restarts = f"  (vLLM restarted {pod.generator_restarts} x)" if pod.generator_restarts else ""
    rows: list[RenderableType] = [Text(phase_text(pod, story) + restarts, style="bold cyan")]
    if not story.steps:
        return rows
    last = story.steps[-1]
    rows += [_course(last, story), _numbers(last, story)]
    rows += [
        Text(f"{answer.prompt.strip()[-60:]!r} -> {answer.completion.strip()[:80]!r}  ({answer.reward:g})", style="dim", no_wrap=True)
        for answer in last.completions[:2]
    ]
    return rows


def _course(last: MetricsLine, story: Story) -> Table:
    """How far the run is, and how the reward went."""
    table = Table.grid(padding=(0, 2))
    table.add_row(ProgressBar(total=last.total_steps, completed=last.step, width=SPARK_WIDTH), f"step {last.step}/{last.total_steps}")
    if story.rewards:
        table.add_row(Text(sparkline(story.rewards), style="green"), f"reward {story.rewards[-1]:.3f}")
    return table


def _numbers(last: MetricsLine, story: Story) -> Table:
    pace, left = story.tokens_per_second(), story.seconds_left()
    cells = {
        "s/step": _shown(last.metrics.get("step_time"), ".2f"),
        "s/sync": _shown(last.metrics.get("sync/total_s"), ".3f"),
        "probe difference": _shown(last.metrics.get("sync/max_abs_logprob_diff"), ".1e"),
        "tokens/s": _shown(pace, ".0f"),
        "to go": "" if left is None else duration(left),
    }
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in cells:
        table.add_column(name, min_width=8)
    table.add_row(*cells.values())
    return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
