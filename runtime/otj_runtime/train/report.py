"""What the trainer tells the world: one line of metrics.jsonl per log, one POST to the launcher, and a report in the end.

The file is written first and must succeed; the POST must never disturb a run: it has a short deadline and its failure is logged
once, because the launcher's watchdog, not the trainer, judges silence.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from otj_runtime.pod.metrics import Answer, HeldOut, MetricsLine, append_line, read_metrics
from otj_runtime.pod.names import METRICS_FILE
from otj_runtime.train.html_report import REPORT_FILE, write_report

logger = logging.getLogger(__name__)

POST_SECONDS = 5.0


class Reporter(TrainerCallback):
    """Writes metrics and reports progress, on rank 0 only.

    Args:
        output: the output folder.
        world_size: training ranks; reported so that a wrong one is noticed.

    Attributes:
        answers: a few completions for the next line.
        title: the run's name in its report. Default: the output folder's.
        advise: what other split of the accelerators would be faster, as metrics, from the metrics of a step; None where nobody can tell.
    """

    def __init__(self, *, output: Path, world_size: int) -> None:
        self._path = output / METRICS_FILE
        self._world_size = world_size
        self._complained = False
        self._facts: dict[str, str] = {}
        self._ended = False
        self.answers: list[Answer] = []
        self.title = output.resolve().name
        self.advise: Callable[[dict[str, float]], dict[str, float]] | None = None

    def forget_after(self, step: int) -> None:
        """Drop lines of steps beyond `step`, which a resumed run makes again. The file is replaced at once."""
        lines, end = read_metrics(self._path)
        kept = [line for line in lines if line.step <= step]
        # A run that was killed may have left half a line, which the next one would go on writing.
        if len(kept) < len(lines) or (self._path.exists() and end < self._path.stat().st_size):
            draft = self._path.with_suffix(".draft")
            draft.write_text("".join(json.dumps(line.to_wire()) + "\n" for line in kept))
            draft.replace(self._path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say how many steps there are before the first one is made, and drop what an earlier run said of steps still to come."""
        if state.is_world_process_zero:
            self._facts = _facts(args, kwargs.get("model"))
            self.forget_after(state.global_step)
            self._post(state, {})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the report beside the metrics."""
        if state.is_world_process_zero:
            self._ended = True
            self._write_report()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Report a step's numbers, or an evaluation's. Other lines without a loss are summaries of transformers."""
        evaluated = bool(logs) and any(name.startswith("eval_") for name in logs or ())
        if not state.is_world_process_zero or not logs or not (evaluated or "loss" in logs):
            return
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        numbers |= {"world_size": float(self._world_size)}
        if self.advise is not None:
            numbers |= self.advise(numbers)
        answers = [] if evaluated else self.answers
        line = MetricsLine(step=state.global_step, total_steps=state.max_steps, time=time.time(), metrics=numbers, completions=answers)
        append_line(self._path, line)
        print(describe(line), flush=True)
        self._post(state, numbers)

    def held_out(self, state: TrainerState, result: HeldOut) -> None:
        """Report held-out answers."""
        append_line(self._path, MetricsLine(step=state.global_step, total_steps=state.max_steps, time=time.time(), heldout=result))
        print(f"held-out accuracy {result.accuracy:.3f} at step {state.global_step}", *map(_show, result.answers), sep="\n", flush=True)
        if self._ended:
            self._write_report()

    def _write_report(self) -> None:
        """Make the report; that it cannot be made ends no run."""
        try:
            write_report(self._path, self._path.with_name(REPORT_FILE), title=self.title, facts=self._facts)
        except Exception:
            logger.exception("cannot write %s", REPORT_FILE)

    def _post(self, state: TrainerState, numbers: dict[str, float]) -> None:
        url = os.environ.get("KUBEFLOW_TRAINER_SERVER_URL")
        if url is None:
            return
        metrics = numbers | {"current_step": state.global_step, "total_steps": state.max_steps, "world_size": self._world_size}
        # In full, as transformers' own callback reports the same numbers there: rounded, equal ones would differ.
        status: dict[str, Any] = {"metrics": [{"name": name[:64], "value": str(value)} for name, value in metrics.items()]}
        if state.max_steps > 0:
            status["progressPercentage"] = int(100 * state.global_step / state.max_steps)
        try:
            token = Path(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]).read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            request = urllib.request.Request(url, data=json.dumps({"trainerStatus": status}).encode(), headers=headers, method="POST")
            with urllib.request.urlopen(request, timeout=POST_SECONDS):
                pass
        except (OSError, KeyError) as error:
            if not self._complained:
                logger.warning("cannot report progress to the launcher at %s: %s", url, error)
            self._complained = True


def _facts(args: TrainingArguments, model: Any) -> dict[str, str]:
    """What the report says of the run beside its name."""
    found = {
        "Method": type(args).__name__.removesuffix("Config"),
        "Model": str(getattr(getattr(model, "config", None), "_name_or_path", "")).rstrip("/").rpartition("/")[2],
        "Training ranks": str(args.world_size),
        "Learning rate": f"{args.learning_rate:g}",
        "Seed": str(args.seed),
    }
    return {name: value for name, value in found.items() if value}


_SHOWN = {
    "reward": "reward",
    "eval_reward": "eval reward",
    "kl": "kl",
    "completions/mean_length": "length",
    "grad_norm": "grad",
    "sync/total_s": "sync s",
    "step_time": "s/step",
}


def describe(line: MetricsLine) -> str:
    """A step for the log: its main numbers, and a few completions."""
    numbers = "  ".join(f"{short} {line.metrics[name]:.3g}" for name, short in _SHOWN.items() if name in line.metrics)
    return "\n".join([f"step {line.step}/{line.total_steps}  {numbers}", *map(_show, line.completions)])


def _show(answer: Answer) -> str:
    return f"    {answer.prompt!r} -> {answer.completion!r}  ({answer.reward:g})"
