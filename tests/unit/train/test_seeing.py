"""What a run shows of itself: completions as a table, evaluation, trackers, the report. Real model, no generator."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet
import pytest
from transformers import TrainerCallback

from otj_runtime.data.tasks import make_samples
from otj_runtime.launch.board import Board
from otj_runtime.pod.errors import DatasetInvalid, InvalidSpec
from otj_runtime.pod.metrics import MetricsLine, StatusUpdate, TrainerStatus, read_metrics
from otj_runtime.rewards import position_match
from otj_runtime.train.checkpoints import complete_checkpoints
from otj_runtime.train.config import GRPOConfig, OnlineDPOConfig
from otj_runtime.train.grpo import GRPOTrainer
from otj_runtime.train.online_dpo import OnlineDPOTrainer
from otj_runtime.train.trainer import OnlineTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

BASE: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 4,
    "save_strategy": "no",
    "max_steps": 2,
}

SAMPLES = make_samples("copy", {"length": 4, "size": 64}, seed=0)


def grpo(model: Path, output: Path, *, rewards: Any = position_match, dataset: Any = SAMPLES.train, **changes: Any) -> OnlineTrainer:
    arguments = {name: changes.pop(name) for name in ("eval_dataset", "callbacks") if name in changes}
    return GRPOTrainer(model, rewards, args=GRPOConfig(output_dir=str(output), **BASE | changes), train_dataset=dataset, **arguments)


def lines_of(output: Path) -> list[MetricsLine]:
    return read_metrics(output / "metrics.jsonl")[0]


def test_every_completion_is_in_the_table_with_what_it_earned(tiny_folder: Path, tmp_path: Path) -> None:
    def length(completions: list[str], log_extra: Any, **_: Any) -> list[float | None]:
        log_extra("upper", [text.upper() for text in completions])
        return [None if not text else float(len(text)) for text in completions]

    grpo(tiny_folder, tmp_path, rewards=[position_match, length], log_completions=True).train()
    assert [path.name for path in sorted((tmp_path / "completions").iterdir())] == [
        "completions_00001.parquet",
        "completions_00002.parquet",
    ]
    table = pyarrow.parquet.read_table(tmp_path / "completions").to_pylist()
    assert list(table[0]) == ["step", "prompt", "completion", "position_match", "length", "upper", "advantage"]
    assert len(table) == 2 * 16
    assert all(row["upper"] == row["completion"].upper() for row in table)
    for line in lines_of(tmp_path):
        scores = [row["position_match"] for row in table if row["step"] == line.step]
        assert line.metrics["rewards/position_match/mean"] == pytest.approx(sum(scores) / len(scores))
    advantages = [row["advantage"] for row in table if row["advantage"] is not None]
    assert max(advantages) > 0 > min(advantages)


def test_held_out_prompts_are_answered_while_training_and_trackers_get_everything(tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            seen.append(dict(logs or {}))

    trainer = grpo(tiny_folder, tmp_path, eval_dataset=SAMPLES.held_out, eval_strategy="steps", eval_steps=1, callbacks=[Tracker()])
    trainer.train()
    evaluated = [logs for logs in seen if "eval_reward" in logs]
    assert len(evaluated) == 2
    assert {"eval_rewards/position_match/mean", "eval_completions/mean_length", "eval_runtime"} <= evaluated[0].keys()
    assert [line.step for line in lines_of(tmp_path) if "eval_reward" in line.metrics] == [1, 2]
    assert [logs["rewards/position_match/mean"] for logs in seen if "loss" in logs]
    assert "Evaluation" in (tmp_path / "report.html").read_text()
    some = SAMPLES.held_out[:8]
    assert trainer.evaluate({"some": some})["eval_some_reward"] == trainer.evaluate(some)["eval_reward"], "greedy answers differ"


class Launcher(BaseHTTPRequestHandler):
    """Notes what the trainer reports."""

    heard: ClassVar[list[TrainerStatus]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append(StatusUpdate.model_validate_json(body).trainerStatus)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Launcher]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Launcher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    Launcher.heard.clear()
    yield Launcher
    server.shutdown()
    server.server_close()


def test_the_split_in_use_is_not_advised_whoever_reports_the_seconds_of_a_step(
    tiny_folder: Path, tmp_path: Path, launcher: type[Launcher]
) -> None:
    trainer = grpo(tiny_folder, tmp_path, report_to="kubeflow")  # transformers reports beside our reporter, as in a pod
    trainer.reporter.advise = lambda metrics: {"split/generation_gpus": 1.0, "split/step_time": metrics["step_time"]}
    trainer.train()
    board = Board()
    for status in launcher.heard:
        board.absorb(status, now=0.0)
        assert board.report().progress.advice is None
    assert board.number("step_time") == board.number("split/step_time") == lines_of(tmp_path)[-1].metrics["step_time"]


def test_a_signal_ends_an_evaluation_and_the_training_with_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    unseen = {sample["prompt"] for sample in SAMPLES.held_out}
    evaluated: list[int] = []

    def ends(prompts: list[str], **_: Any) -> list[float]:
        if prompts[0] in unseen:
            evaluated.append(len(prompts))
            os.kill(os.getpid(), signal.SIGTERM)
        return [0.0] * len(prompts)

    changes = {"eval_dataset": SAMPLES.held_out, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}
    trainer = grpo(tiny_folder, tmp_path, rewards=ends, metric_for_best_model="eval_reward", **changes)
    trainer.train()
    assert evaluated == [16]
    assert trainer.stop.stopped
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_what_a_reward_logs_and_reads_of_the_state_reaches_it(tiny_folder: Path, tmp_path: Path) -> None:
    def curriculum(completions: list[str], trainer_state: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("curriculum/step", trainer_state.global_step)
        return [float(len(text)) for text in completions]

    grpo(tiny_folder, tmp_path, rewards=curriculum).train()
    assert [line.metrics["curriculum/step"] for line in lines_of(tmp_path)] == [0.0, 1.0]


def test_a_judge_takes_the_place_of_rewards_in_online_dpo(tiny_folder: Path, tmp_path: Path) -> None:
    def judge(prompts: list[str], pairs: list[list[str]]) -> list[int]:
        return [int(len(b) > len(a)) for a, b in pairs]

    args = OnlineDPOConfig(output_dir=str(tmp_path), **BASE | {"num_generations": 4})
    OnlineDPOTrainer(tiny_folder, judge=judge, args=args, train_dataset=SAMPLES.train).train()
    [first, _] = lines_of(tmp_path)
    assert first.metrics["rewards/judge/mean"] == pytest.approx(0.5), "wins and losses of a group cancel"


def test_a_stream_is_trained_on_and_needs_a_number_of_steps(tiny_folder: Path, tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(SAMPLES.train)

    grpo(tiny_folder, tmp_path, dataset=Endless()).train()
    assert [line.step for line in lines_of(tmp_path)] == [1, 2]
    with pytest.raises(InvalidSpec, match=r"training\.max_steps: a streaming dataset has no length"):
        grpo(tiny_folder, tmp_path, dataset=Endless(), max_steps=-1)
    with pytest.raises(DatasetInvalid, match="eval_dataset: a streaming dataset has no end"):
        grpo(tiny_folder, tmp_path, eval_dataset=Endless())
