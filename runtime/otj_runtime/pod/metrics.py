"""What the trainer reports: lines of `metrics.jsonl` in the output folder, and the progress document on the launcher's port.

    training rank 0 --append--> <output>/metrics.jsonl      every step, every metric; read by `otj run` and by people
                    --POST----> launcher /status            the Kubeflow progress contract, as transformers' own reporter speaks it
    launcher        --GET-----> /progress                   pulled by the operator: the latest state only

The file is the whole story and survives the pod; the port is what a controller needs to poll, and cannot fall behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from otj_runtime.api import ApiModel, Progress, ToldModel


class Answer(ApiModel):
    """One held-out prompt with its greedy answer."""

    prompt: str
    completion: str
    reward: float


class HeldOut(ApiModel):
    """Greedy answers to held-out prompts under one policy version."""

    accuracy: float = Field(description="Mean reward over all held-out prompts, between 0 and 1 for the built-in tasks.")
    answers: list[Answer] = Field(description="The first few of them.")


class MetricsLine(ApiModel):
    """One line of metrics.jsonl: the metrics of an optimizer step, or a held-out evaluation, or both."""

    step: int = Field(description="Optimizer steps made when the line was written.")
    total_steps: int
    time: float = Field(description="Seconds since the epoch.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Metrics by name, in TRL's names where TRL has them.")
    heldout: HeldOut | None = None
    completions: list[Answer] = Field(default_factory=list, description="A few sampled completions of the step.")


def read_metrics(path: Path, *, offset: int = 0) -> tuple[list[MetricsLine], int]:
    """Whole lines of `path` from byte `offset` on, and the offset after them. A missing file has no lines."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return [MetricsLine.model_validate_json(line) for line in whole.splitlines() if line], offset + len(whole)


class Metric(BaseModel):
    """One metric of the Kubeflow progress contract: both parts are text of at most 64 characters."""

    name: str
    value: str


class TrainerStatus(BaseModel):
    """`trainerStatus` of the Kubeflow progress contract (KEP-2779)."""

    model_config = ConfigDict(extra="ignore")

    progressPercentage: int | None = None  # noqa: N815 - the contract's spelling
    estimatedRemainingSeconds: int | None = None  # noqa: N815
    metrics: list[Metric] = Field(default_factory=list, max_length=256)
    lastUpdatedTime: str | None = None  # noqa: N815


class StatusUpdate(BaseModel):
    """Body of a POST to the launcher."""

    trainerStatus: TrainerStatus  # noqa: N815


class LauncherReport(ToldModel):
    """The progress document: what the operator pulls from the launcher's read-only port."""

    phase: Literal["starting", "training", "ended"] = Field(
        description="starting: no step yet; training: steps are made; ended: exit follows."
    )
    generator_ready: bool = Field(description="Whether vLLM has answered since the pod started.")
    overdue: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="While a step takes much longer than those before: what is waited for, since when, and when the run gives up."
    )
    progress: Progress = Field(default_factory=Progress)
    startup: dict[str, float] = Field(
        default_factory=dict,
        description="Seconds from the pod's start until the launcher ran, the generator answered, the trainer spoke, the first step was made.",
    )
    metrics: dict[str, str] = Field(default_factory=dict, description="The latest value of every metric reported, as text.")


def append_line(path: Path, line: MetricsLine) -> None:
    """Append one line in a single write, so that a reader never sees half of two lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line.to_wire()) + "\n")


def values(lines: list[MetricsLine], name: str) -> Iterator[float]:
    """The values of the metric `name`, in order, where a line has it."""
    return (line.metrics[name] for line in lines if name in line.metrics)
