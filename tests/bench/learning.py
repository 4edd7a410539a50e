"""Does it learn? Every method on the tiny tasks, with a real vLLM on CPU, over seeds, on-policy and one generation ahead.

    python tests/bench/learning.py --json learning.json
    python tests/bench/learning.py --only 'reverse/*/0' --staleness 1 --json learning.json

One vLLM serves all runs, one after the other; each begins with the base model. Runs are noted in the JSON file as they end, in place of
earlier ones of the same name, so that a long measurement can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from otj_runtime import GRPOConfig, GRPOTrainer, OnlineDPOConfig, OnlineDPOTrainer
from otj_runtime.api.inputs import DatasetSpec
from otj_runtime.data.load import load_prompts
from otj_runtime.data.model import build_tiny
from otj_runtime.pod.metrics import read_metrics
from otj_runtime.pod.names import METRICS_FILE
from otj_runtime.rewards import load_rewards
from otj_runtime.train.child import ChildGenerator, plan_server
from otj_runtime.train.generator import Generator

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs as a file, too
from tests.bench.report import machine, table

SEEDS = (0, 1, 2)
STALENESS = (0, 1)
STALE_LOSS = 0.05
"""How much less reward may come of sampling one generation ahead."""

AVERAGED = 5
"""Steps at either end whose mean reward is `first` and `last`."""

SHARED: dict[str, Any] = {
    "use_cpu": True,
    "use_vllm": True,
    "vllm_max_model_len": 32,
    "per_device_train_batch_size": 256,  # 16 prompts x 16
    "num_generations": 16,
    "max_completion_length": 4,
    "max_grad_norm": 1.0,
    "num_completions_to_print": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Lesson:
    """A task, how it is trained, and the mean reward that it must end with."""

    task: str
    algorithm: str
    bar: float
    training: dict[str, Any]


GRADUAL: dict[str, Any] = {"lr_scheduler_type": "linear", "beta": 0.01}
"""Without a KL term some runs settle on a wrong symbol for one place and stay there, at 0.82 to 0.88: all completions of a group have it then, and
groups of equal rewards teach nothing. At a constant rate that happens in one run of three."""

LESSONS = (
    Lesson("copy", "GRPO", 0.95, {"max_steps": 250, "learning_rate": 1e-3, "warmup_steps": 10, **GRADUAL}),
    Lesson("copy", "OnlineDPO", 0.95, {"max_steps": 200, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}),
    Lesson("reverse", "GRPO", 0.85, {"max_steps": 400, "learning_rate": 5e-4, "warmup_steps": 20, **GRADUAL}),
)


@dataclass(frozen=True)
class Run:
    """What came of one run; rewards are means over the steps at its ends."""

    task: str
    algorithm: str
    seed: int
    staleness: int
    first: float
    last: float
    steps: int
    seconds: float

    @property
    def name(self) -> tuple[str, str, int, int]:
        """What tells it from others."""
        return self.task, self.algorithm, self.seed, self.staleness


@contextmanager
def shared_generator(model: Path, folder: Path) -> Iterator[Generator]:
    """One vLLM for all runs."""
    args = GRPOConfig(output_dir=str(folder), **SHARED)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    child = ChildGenerator(plan_server(args), model=policy, tokenizer=tokenizer, output=folder)
    try:
        yield child.generator
    finally:
        child.close()


def learn(lesson: Lesson, *, seed: int, staleness: int, model: Path, generator: Generator, folder: Path) -> Run:
    """Train the base model in `folder`."""
    config, kind = (GRPOConfig, GRPOTrainer) if lesson.algorithm == "GRPO" else (OnlineDPOConfig, OnlineDPOTrainer)
    args = config(output_dir=str(folder), seed=seed, staleness=staleness, **SHARED | lesson.training)
    trainer = kind(
        str(model),
        load_rewards([], task=lesson.task),
        args,
        load_prompts(DatasetSpec(task=lesson.task, args={"length": 4}), seed=seed),
        generator=generator,
    )
    began = time.monotonic()
    trainer.train()
    if trainer.stop.stopped:
        raise InterruptedError(f"stopped at step {trainer.state.global_step}: such a run says nothing, and is not noted")
    rewards = [line.metrics["reward"] for line in read_metrics(folder / METRICS_FILE)[0] if line.metrics]
    first, last = (sum(part) / AVERAGED for part in (rewards[:AVERAGED], rewards[-AVERAGED:]))
    return Run(lesson.task, lesson.algorithm, seed, staleness, first, last, trainer.state.global_step, time.monotonic() - began)


def note(run: Run, file: Path | None) -> None:
    """Put `run` into the file."""
    if file is None:
        return
    others = [other for other in noted(file) if other.name != run.name]
    file.write_text(json.dumps([asdict(each) for each in sorted([*others, run], key=lambda each: each.name)], indent=1) + "\n")


def noted(file: Path | None) -> list[Run]:
    """The runs in the file."""
    return [Run(**found) for found in json.loads(file.read_text())] if file is not None and file.exists() else []


def missed(runs: list[Run]) -> list[str]:
    """The bars that `runs` missed, in words."""
    bars = {(lesson.task, lesson.algorithm): lesson.bar for lesson in LESSONS}
    words = [
        f"{run.task} {run.algorithm}, seed {run.seed}, staleness {run.staleness}: {run.last:.3f}, at least {bars[run.task, run.algorithm]}"
        for run in runs
        if run.last < bars[run.task, run.algorithm]
    ]
    for task, algorithm in bars:
        means = {
            staleness: sum(found) / len(found)
            for staleness in STALENESS
            if (found := [run.last for run in runs if run.name[:2] == (task, algorithm) and run.staleness == staleness])
        }
        if len(means) == len(STALENESS) and means[1] < means[0] - STALE_LOSS:
            words.append(f"{task} {algorithm}, one generation ahead: {means[1]:.3f}, on-policy {means[0]:.3f}, at most {STALE_LOSS} less")
    return words


def main() -> int:
    """0 if every bar was reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="*/*/*", help="pattern of TASK/ALGORITHM/SEED; default: all")
    parser.add_argument("--staleness", type=int, choices=STALENESS, action="append", help="default: both")
    parser.add_argument("--json", type=Path, help="file of the runs, which is added to")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a model this small loses more by handing work to threads than it wins
    wanted = [
        (lesson, seed, staleness)
        for staleness in options.staleness or STALENESS
        for lesson in LESSONS
        for seed in SEEDS
        if fnmatch(f"{lesson.task}/{lesson.algorithm}/{seed}", options.only)
    ]
    runs = noted(options.json)
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        build_tiny(model)
        with shared_generator(model, Path(work)) as generator:
            for number, (lesson, seed, staleness) in enumerate(wanted):
                folder = Path(work) / str(number)
                run = learn(lesson, seed=seed, staleness=staleness, model=model, generator=generator, folder=folder)
                note(run, options.json)
                runs = [*(other for other in runs if other.name != run.name), run]
    rows = [list(asdict(run).values()) for run in sorted(runs, key=lambda run: run.name)]
    print(machine(), table(["task", "algorithm", "seed", "staleness", "first", "last", "steps", "seconds"], rows), sep="\n")
    failures = missed(runs)
    print(*[f"MISSED {words}" for words in failures] or ["every bar was reached"], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
