"""The generator of a bare machine comes, comes back, and goes; a server that only answers /health stands in for vLLM."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api import DType
from otj_runtime.api.spec import GenerationSpec
from otj_runtime.pod.errors import GeneratorNotReady
from otj_runtime.train import child
from otj_runtime.train.child import ChildGenerator, ServerPlan, plan_server
from otj_runtime.train.config import GRPOConfig
from otj_runtime.train.devices import Placement
from otj_runtime.weights.control import GeneratorControl

SERVER = """
import http.server, os, subprocess, sys
from pathlib import Path
home, port = Path(sys.argv[1]), int(sys.argv[2].rsplit(":", 1)[1])
if (home / "broken").exists():
    sys.exit("no such device")
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(home / "pids").write_text(f"{os.getpid()} {engine.pid}")
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""

PLAN = ServerPlan(generation=GenerationSpec(), dtype=DType.FLOAT32, placement=Placement(()))


@pytest.fixture
def start(tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], ChildGenerator]]:
    """Starts a child whose server is `SERVER`."""
    monkeypatch.setattr(child, "server_command", lambda *_, url, **__: ["python", "-c", SERVER, str(tmp_path), url])
    monkeypatch.setattr(child, "SHARED_MEMORY", tmp_path)
    started: list[ChildGenerator] = []

    def make() -> ChildGenerator:
        started.append(ChildGenerator(PLAN, model=tiny[0], tokenizer=tiny[1], output=tmp_path / "output"))
        return started[-1]

    yield make
    for one in started:
        one.close()


def wait_for(what: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, f"waited in vain for {name}"
        time.sleep(0.05)


def control(generator: ChildGenerator) -> GeneratorControl:
    return GeneratorControl(generator.generator.url, failure=generator.failure)


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def alive(found: list[int]) -> list[int]:
    """Those of `found` that have not ended, whether or not anybody has taken notice."""
    living = []
    for pid in found:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                living.append(pid)
    return living


def folders(home: Path) -> list[Path]:
    return list(home.glob("otj-*"))


def test_closing_ends_the_server_with_what_it_started_and_removes_its_folder(start: Callable[[], ChildGenerator], tmp_path: Path) -> None:
    generator = start()
    control(generator).wait_healthy(deadline_s=60)
    found = pids(tmp_path)
    assert (folders(tmp_path)[0] / "model" / "config.json").exists()
    generator.close()
    assert alive(found) == []
    assert folders(tmp_path) == []


def test_a_server_that_dies_comes_back(start: Callable[[], ChildGenerator], tmp_path: Path) -> None:
    generator = start()
    control(generator).wait_healthy(deadline_s=60)
    time.sleep(2 * child.POLL_SECONDS)  # the keeper has seen it answer too
    first = pids(tmp_path)
    os.kill(first[0], signal.SIGKILL)
    wait_for(lambda: pids(tmp_path) != first, "another server")
    control(generator).wait_healthy(deadline_s=60)
    assert alive(first) == []


def test_a_server_that_cannot_start_is_an_error_with_its_last_words(start: Callable[[], ChildGenerator], tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(GeneratorNotReady, match=r"status 1 before it answered(.|\n)*generator.log(.|\n)*no such device"):
        control(start()).wait_healthy(deadline_s=60)


def test_a_killed_trainer_leaves_nothing(start: Callable[[], ChildGenerator], tmp_path: Path) -> None:
    def train() -> None:
        start()
        time.sleep(600)

    trainer = multiprocessing.get_context("fork").Process(target=train)
    trainer.start()
    wait_for((tmp_path / "pids").exists, "the server")
    wait_for(lambda: len((tmp_path / "pids").read_text().split()) == 2, "its engine")
    found = pids(tmp_path)
    os.kill(int(trainer.pid or 0), signal.SIGKILL)
    trainer.join()
    wait_for(lambda: alive(found) == [], "the end of the server")
    wait_for(lambda: folders(tmp_path) == [], "the removal of its folder")


def test_a_machine_without_vllm_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, use_vllm=True)
    with pytest.raises(ImportError, match=r'pip install "online-training-runtime\[cpu\]"'):
        plan_server(args)


@pytest.mark.parametrize(("wish", "dtype"), [("auto", DType.FLOAT32), ("bfloat16", DType.BFLOAT16)])
def test_a_cpu_computes_in_float32_unless_told_otherwise(tmp_path: Path, wish: str, dtype: DType) -> None:
    assert plan_server(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, use_vllm=True, vllm_dtype=wish)).dtype is dtype


def test_the_servers_environment_is_the_users_without_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN": "t", "VLLM_CPU_KVCACHE_SPACE": "7"}.items():
        monkeypatch.setenv(name, value)
    environment = child._environment(PLAN)
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    assert not {"RANK", "MASTER_PORT", "OMP_NUM_THREADS"} & environment.keys()
    assert (environment["HF_TOKEN"], environment["VLLM_CPU_KVCACHE_SPACE"], environment["VLLM_SERVER_DEV_MODE"]) == ("t", "7", "1")
