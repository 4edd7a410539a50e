"""Real vLLM servers for the tests, each started once per run with the very command line of the generator container."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.commands import generator_command, generator_environment
from otj_runtime.pod.config import Layout, PodConfig, resolve
from otj_runtime.pod.ports import free_port
from otj_runtime.weights.control import GeneratorControl
from tests.cluster.host import REPOSITORY
from tests.integration.deadlines import HANG_SECONDS
from tests.integration.models import make_tiny_mixture, make_tiny_model

VLLM_CACHE = REPOSITORY / "build" / "cache" / "vllm"
"""Shared by all test servers and kept: vLLM notes there what it found out about a model's class, in a process of its own that imports
everything once more."""


class Generator:
    """One vLLM server in its own process group.

    Attributes:
        model: folder of the model it serves, with dummy weights.
        config: the configuration of the pod that it stands for.
        control: its control routes.
    """

    def __init__(self, model: Path, *, dtype: str, engines: int, scratch: Path, shared_memory: Path) -> None:
        self.model = model
        self._job = OnlineTrainingJob.model_validate(_job(model, dtype, engines))
        layout = Layout(shared_memory=str(shared_memory), scratch=str(scratch), generator_port=free_port())
        self.config: PodConfig = resolve(self._job, layout, output=str(scratch / "output"))
        self.control = GeneratorControl(self.config.generator_url, engines=engines)
        self.log = scratch / "generator.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.config.generator_url

    @property
    def group(self) -> int | None:
        """The process group that the server's processes are in; None while it does not run."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the server's process; it answers some time later."""
        command = generator_command(self._job, self.config)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "otj_runtime.pod.shim", sys.executable, *command[1:]],  # ends with a test run that is killed
                env=os.environ | generator_environment(self.config) | {"VLLM_CACHE_ROOT": str(VLLM_CACHE)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when it answers.

        Raises:
            AssertionError: with the end of its log, if it does not.
        """
        end = time.monotonic() + HANG_SECONDS
        while not self.control.healthy():
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > end:
                raise AssertionError(f"the generator {'ended' if ended else 'did not answer'}:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def engines(self) -> list[int]:
        """Process ids of its engines, by their number."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    name, group = (folder / "cmdline").read_bytes().split(b"\0")[0], os.getpgid(int(folder.name))
                except OSError:
                    continue
                if re.fullmatch(rb"VLLM::EngineCore(_DP\d+)?", name.strip()) and group == self.group:
                    found.append((name, int(folder.name)))
        return [number for _, number in sorted(found)]

    def wait_ended(self) -> None:
        """Return when it has ended by itself.

        Raises:
            subprocess.TimeoutExpired: if it does not.
        """
        assert self._process is not None
        self._process.wait(HANG_SECONDS)

    def kill(self) -> None:
        """End the server and everything it started, as a lost container would."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Generator]]:
    """`generator(model_dir, dtype="float32", engines=1)`: a server of that model that answers; the same one for the same arguments."""
    started: dict[tuple[Path, str, int], Generator] = {}
    shared_memory = Path(tempfile.mkdtemp(prefix="otj-test-", dir="/dev/shm"))

    def get(model: Path, dtype: str = "float32", engines: int = 1) -> Generator:
        key = (model, dtype, engines)
        if key not in started:
            scratch = tmp_path_factory.mktemp("generator")
            shared = shared_memory / str(len(started))
            started[key] = Generator(model, dtype=dtype, engines=engines, scratch=scratch, shared_memory=shared)
        started[key].wait()
        return started[key]

    yield get
    for server in started.values():
        server.kill()
    shutil.rmtree(shared_memory)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose output layer is its embedding."""
    return make_tiny_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def mixture_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts."""
    return make_tiny_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an output layer of its own."""
    return make_tiny_model(tmp_path_factory.mktemp("untied"), tied=False)


def _job(model: Path, dtype: str, engines: int) -> dict[str, object]:
    return {
        "apiVersion": "onlinetraining.dev/v1alpha1",
        "kind": "OnlineTrainingJob",
        "metadata": {"name": "test"},
        "spec": {
            "algorithm": "GRPO",
            "model": {"path": str(model)},
            "dataset": {"task": "copy"},
            "gpus": engines + 1,
            "accelerator": {"device": "cpu"},
            "generation": {"dtype": dtype, "maxModelLen": 128, "gpus": engines, "tensorParallelSize": 1},
        },
    }
