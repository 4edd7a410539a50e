"""The operator as a process that the benchmark starts, measures and kills.

`Zygote` makes starting cheap: a process that has imported the operator forks one for each start. What a thousand kills test begins after
the imports, which would take most of their time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from otj_runtime.pod.ports import free_port
from tests.cluster.host import REPOSITORY
from tests.contract.apiserver import ApiServer

SYSTEM = "online-training-system"
TICKS = os.sysconf("SC_CLK_TCK")

_ZYGOTE = """
import os, signal, sys
import otj_operator.main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin = open(os.devnull)
        otj_operator.main.main(line.split())
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Running:
    """An operator that runs."""

    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """Seconds of one core that it has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mib(self) -> float:
        """Resident memory in MiB."""
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def peak_mib(self) -> float:
        """The most resident memory that it ever had, in MiB."""
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    async def metrics(self) -> dict[str, float]:
        """Its metrics, by name with labels."""
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}/metrics") as response:
                lines = (await response.text()).splitlines()
        except aiohttp.ClientError:
            return {}
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}


def arguments(*, identity: str, port: int, progress_seconds: float) -> list[str]:
    """The operator's command line."""
    return [
        *("--runtime-image", "localhost/runtime:bench", "--identity", identity, "--port", str(port), "--namespace", SYSTEM),
        *("--progress-seconds", str(progress_seconds), "--log-format", "text"),
    ]


def environment(server: ApiServer, *, name: str, url: str | None = None) -> dict[str, str]:
    """An environment with the rights of install.yaml; `url` stands in for the API server's own."""
    token = server.kubectl("create", "token", "online-training-operator", "-n", SYSTEM, "--duration=10h").strip()
    kubeconfig = server.kubeconfig(name, token)
    if url is not None:
        kubeconfig.write_text(kubeconfig.read_text().replace(server.url, url))
    return {**os.environ, "KUBECONFIG": str(kubeconfig), "NO_PROXY": "127.0.0.1"}


@contextmanager
def operator(server: ApiServer, *, name: str = "bench", progress_seconds: float = 5.0, url: str | None = None) -> Iterator[Running]:
    """An operator with the rights of install.yaml."""
    port = free_port()
    command = [sys.executable, "-m", "otj_operator", *arguments(identity=name, port=port, progress_seconds=progress_seconds)]
    with (server.folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment(server, name=name, url=url), stdout=log, stderr=log, cwd=REPOSITORY)
        try:
            yield Running(pid=process.pid, port=port)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Zygote:
    """Starts operators one after the other, each ended by SIGKILL."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self._port = process, port
        self._child: int | None = None

    def start(self) -> Running:
        """Start an operator."""
        self._child = int(self._ask(" ".join(arguments(identity="bench", port=self._port, progress_seconds=5.0))))
        return Running(pid=self._child, port=self._port)

    def kill(self) -> None:
        """End it without warning."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            assert self._ask("") == "gone"
            self._child = None

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextmanager
def zygote(server: ApiServer) -> Iterator[Zygote]:
    """A process that has imported the operator and waits."""
    port = free_port()
    with (server.folder / "bench.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _ZYGOTE],
            env=environment(server, name="bench"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=REPOSITORY,
        )
        made = Zygote(process, port)
        try:
            yield made
        finally:
            made.kill()
            process.kill()
            process.wait()
