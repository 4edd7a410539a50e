"""The operator as a process of its own, under its own service account and nothing more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from otj_runtime.pod.ports import free_port
from tests.cluster.host import REPOSITORY
from tests.contract.apiserver import ApiServer

T = TypeVar("T")

IMAGE = "localhost/runtime:test"
WAIT_SECONDS = 30.0


@contextmanager
def running_operator(
    server: ApiServer, *, name: str, progress_seconds: float = 0.2, namespaces: str = "", port: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the operator with the rights of install.yaml; at the end it must still be there, and stop when told to."""
    token = server.kubectl("create", "token", "online-training-operator", "-n", "online-training-system").strip()
    environment = {**os.environ, "KUBECONFIG": str(server.kubeconfig(name, token)), "NO_PROXY": "127.0.0.1"}
    free = free_port()
    command = [
        *(sys.executable, "-m", "otj_operator", "--runtime-image", IMAGE, "--identity", name, "--port", str(port or free)),
        *("--namespace", "online-training-system", "--progress-seconds", str(progress_seconds), "--log-format", "text"),
        *("--namespaces", namespaces),
    ]
    log = server.folder / f"{name}.log"
    with log.open("ab") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY) as process:
        try:
            yield process
            if process.returncode is not None:
                return  # the test has seen it end
            assert process.poll() is None, f"the operator ended by itself:\n{log.read_text()[-3000:]}"
            process.terminate()
            assert process.wait(timeout=15) == 0, log.read_text()[-3000:]
        finally:
            process.kill()


def eventually(what: str, look: Callable[[], T | None], *, seconds: float = WAIT_SECONDS) -> T:
    """The first true answer of `look`, which is asked a few times a second.

    Raises:
        AssertionError: that names `what` if the deadline passes.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.1)
