"""The launcher with the real `accelerate launch`, real ranks, and a real port. Only what the ranks do is made up (rank.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api import Reason, parse_job
from otj_runtime.pod.commands import trainer_environment
from otj_runtime.pod.config import CONFIG_ENV, Layout, PodConfig, resolve
from otj_runtime.pod.errors import ExitCode, FailureNote
from otj_runtime.pod.metrics import LauncherReport
from otj_runtime.pod.ports import free_port
from tests.integration.deadlines import HANG_SECONDS

pytestmark = pytest.mark.integration

MAIN = """
import asyncio, json, os, sys
from otj_runtime.launch.launcher import Launcher
from otj_runtime.launch.watchdog import Patience
from otj_runtime.pod.config import PodConfig
launcher = Launcher(PodConfig.from_environment(), module="tests.integration.rank", patience=Patience(**json.loads(sys.argv[1])))
sys.exit(asyncio.run(launcher.run()))
"""


@contextmanager
def healthy_generator() -> Iterator[ThreadingHTTPServer]:
    """A server whose every path answers 200, as vLLM's /health does."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    end(server)


def end(server: ThreadingHTTPServer) -> None:
    """End the server; nothing answers on its port any more."""
    server.shutdown()
    server.server_close()


@dataclass
class Pod:
    """A pod's folders and its launcher."""

    root: Path
    generator_port: int
    gpus: int = 2
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.root / "output"

    def config(self) -> PodConfig:
        for folder in (self.output, self.root / "model"):
            folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (self.root / "model" / name).touch()
        spec = {
            "algorithm": "GRPO",
            "model": {"path": str(self.root / "model")},
            "dataset": {"task": "copy"},
            "gpus": self.gpus,
            "accelerator": {"device": "cpu"},
            **self.spec,
        }
        job = {
            "apiVersion": "onlinetraining.dev/v1alpha1",
            "kind": "OnlineTrainingJob",
            "metadata": {"name": "job"},
            "spec": spec,
        }
        layout = Layout(
            shared_memory=str(self.root),
            scratch=str(self.root),
            generator_port=self.generator_port,
            progress_port=free_port(),
            rendezvous_port=free_port(),
            progress_host="127.0.0.1",
            termination_log=str(self.root / "termination"),
        )
        return resolve(parse_job(job), layout, output=str(self.output))

    @contextmanager
    def launch(self, does: str, **patience: float) -> Iterator[Run]:
        """A running launcher whose ranks do `does`."""
        config = self.config()
        environment = os.environ | {CONFIG_ENV: config.model_dump_json(by_alias=True), "RANK_DOES": does} | trainer_environment(config)
        with (self.root / "out").open("wb") as out:
            process = subprocess.Popen([sys.executable, "-c", MAIN, json.dumps(patience)], env=environment, stdout=out, stderr=out)
        try:
            yield Run(self, config, process)
        finally:
            process.kill()
            process.wait()


@dataclass
class Run:
    """A launcher at work."""

    pod: Pod
    config: PodConfig
    process: subprocess.Popen[bytes]

    def end(self) -> ExitCode:
        """Its exit code, once it ends."""
        try:
            return ExitCode(self.process.wait(timeout=HANG_SECONDS))
        except (subprocess.TimeoutExpired, ValueError) as error:
            raise AssertionError(f"{error}\n{self.printed}") from error

    @property
    def printed(self) -> str:
        return (self.pod.root / "out").read_text()

    def note(self) -> FailureNote:
        """The termination message."""
        return FailureNote.model_validate_json((self.pod.root / "termination").read_text())

    def report(self) -> LauncherReport:
        """The progress document."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.config.progress_port}/progress", timeout=5) as answer:
            return LauncherReport.model_validate_json(answer.read())

    def wait_for_ranks(self) -> None:
        """Return once a rank that hangs has begun to."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (self.pod.output / "pid").exists():
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.1)

    def wait_for_step(self) -> LauncherReport:
        """The progress document once a step was reported."""
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            try:
                if (report := self.report()).progress.step:
                    return report
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"no step was reported\n{self.printed}")


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    with healthy_generator() as generator:
        yield Pod(tmp_path, generator.server_port)


def test_three_ranks_on_a_cpu_are_three_and_talk_to_each_other(pod: Pod) -> None:
    pod.gpus = 4
    with pod.launch("gloo") as run:
        assert run.end() is ExitCode.SUCCESS, run.printed
    assert [(pod.output / f"rank-{rank}").read_text() for rank in range(3)] == ["cpu 3"] * 3


def test_one_rank_succeeds(pod: Pod) -> None:
    with pod.launch("gloo") as run:
        assert run.end() is ExitCode.SUCCESS, run.printed
    assert (pod.output / "rank-0").read_text() == "cpu 1"
    assert LauncherReport.model_validate_json((pod.root / "termination").read_text()).phase == "ended"


def test_a_crash_is_told_with_its_last_words(pod: Pod) -> None:
    with pod.launch("crash") as run:
        assert run.end() is ExitCode.TRAINER_CRASHED
        assert "about to divide" in run.printed
        assert run.note().message.endswith("ZeroDivisionError: integer division or modulo by zero")


def test_a_ranks_note_decides_over_its_crash(pod: Pod) -> None:
    with pod.launch("note") as run:
        assert run.end() is ExitCode.REWARD_FAILED
        assert run.note().message == "sample 7 scored twice"


def test_a_note_of_an_earlier_run_does_not_mislead(pod: Pod) -> None:
    FailureNote(reason=Reason.REWARD_FAILED, message="long ago", rank=0).write(pod.root / "otj")
    with pod.launch("gloo") as run:
        assert run.end() is ExitCode.SUCCESS, run.printed


def test_sigterm_lets_the_ranks_save_and_is_told_as_such(pod: Pod) -> None:
    with pod.launch("save_when_told") as run:
        report = run.wait_for_step()
        assert report.phase == "training"
        assert report.generator_ready
        run.process.send_signal(signal.SIGTERM)
        assert run.end() is ExitCode.TERMINATED
        assert run.note().message == "stopped at step 4 of 100; a checkpoint was saved"
    assert (pod.output / "checkpoint-4").exists()


def test_what_was_saved_on_the_way_out_is_in_the_last_words(pod: Pod) -> None:
    with pod.launch("save_when_told") as run:
        run.wait_for_step()
        run.process.send_signal(signal.SIGTERM)
        run.end()
        progress = run.note().progress
    assert progress is not None
    assert (progress.step, progress.checkpoint_step) == (4, 4)


def test_ranks_that_ignore_sigterm_are_killed_with_all_they_started(pod: Pod) -> None:
    with pod.launch("hang", leave=1.0) as run:
        run.wait_for_ranks()
        run.process.send_signal(signal.SIGTERM)
        assert run.end() is ExitCode.TERMINATED
    assert not Path("/proc", (pod.output / "pid").read_text()).exists()


def test_a_generator_that_never_answers_ends_the_run(tmp_path: Path) -> None:
    pod = Pod(tmp_path, free_port(), spec={"generation": {"readyTimeoutSeconds": 1}})
    with pod.launch("hang", leave=1.0) as run:
        assert run.end() is ExitCode.GENERATOR_NOT_READY
        assert "within 1 s" in run.note().message


def test_a_generator_that_goes_and_stays_away_ends_the_run(tmp_path: Path) -> None:
    with healthy_generator() as generator:
        pod = Pod(tmp_path, generator.server_port)
        with pod.launch("hang", leave=1.0, generator_lost=1.0) as run:
            run.wait_for_ranks()
            assert run.report().generator_ready
            end(generator)
            assert run.end() is ExitCode.GENERATOR_LOST


def test_silence_ends_the_run(pod: Pod) -> None:
    with pod.launch("hang", leave=1.0, first_step=1.0) as run:
        assert run.end() is ExitCode.STALLED
        assert "the first report of the trainer" in run.note().message


def test_another_world_size_ends_the_run(pod: Pod) -> None:
    with pod.launch("wrong_world", leave=1.0) as run:
        assert run.end() is ExitCode.WORLD_SIZE_MISMATCH
        assert "7 ranks" in run.note().message


def test_a_reward_that_cannot_be_imported_ends_the_run(pod: Pod) -> None:
    pod.spec = {"rewards": [{"function": "nowhere.reward"}]}
    with pod.launch("hang", leave=1.0) as run:
        assert run.end() is ExitCode.REWARD_IMPORT_FAILED
        assert "nowhere.reward" in run.note().message


def test_a_model_that_is_not_there_ends_the_run(pod: Pod) -> None:
    pod.spec = {"model": {"path": str(pod.root / "nothing")}}
    with pod.launch("gloo") as run:
        assert run.end() is ExitCode.MODEL_NOT_FOUND


def test_a_launcher_without_configuration_says_so(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != CONFIG_ENV}
    done = subprocess.run([sys.executable, "-m", "otj_runtime.launch"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INVALID_SPEC
    assert "OTJ_CONFIG is not set" in done.stderr
