"""TRL's vLLM server beside a benchmark: `trl vllm-serve` on a GPU of its own, for trainers in vLLM server mode.

Its weights come over NCCL from the trainer, which is rank 0 of a group that it opens at `group_port` when it starts, so the trainer has to run
while the server does, and a second trainer needs a second server. TRL 1.16.0 warns of vLLM 0.32, but what it needs of it is there: the flags
of `vllm serve`, the weight routes of development mode, and `nccl_common.trainer_init` with the packed broadcast. The route
/server_info, which it reads twice, lists packages with pip (or with uv, where the environment is uv's): without either it answers 500.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from otj_runtime.pod.ports import free_ports
from otj_runtime.weights.control import GeneratorControl

HOST = "127.0.0.1"

START_SECONDS = 240.0
"""How long the server may take to be healthy."""

END_SECONDS = 20.0
"""How long a killed server may take to be gone."""


@dataclass(frozen=True, kw_only=True)
class TRLServer:
    """Where a trainer finds its server, and the port of the group over which it sends weights."""

    url: str
    group_port: int

    def arguments(self) -> dict[str, object]:
        """What `trl.GRPOConfig` is told of it."""
        return {"vllm_mode": "server", "vllm_server_base_url": self.url, "vllm_group_port": self.group_port}


def server_arguments(*, model: str, port: int, memory: float, max_model_len: int, dtype: str) -> list[str]:
    """Arguments of `trl vllm-serve`. CUDA graphs stay on, as they do for ours."""
    return [
        *("--model", model),
        *("--host", HOST),
        *("--port", str(port)),
        *("--gpu_memory_utilization", str(memory)),
        *("--max_model_len", str(max_model_len)),
        *("--dtype", dtype),
        *("--log_level", "warning"),
    ]


@contextmanager
def serving(*, model: str, visible: str, memory: float, max_model_len: int, dtype: str, log: Path) -> Iterator[TRLServer]:
    """A healthy server; it ends with the context, or with this process.

    Args:
        visible: CUDA_VISIBLE_DEVICES of the server.
        memory: share of that GPU's memory for vLLM.
        log: file of what it prints.

    Raises:
        GeneratorNotReady: if it ended, or was not healthy in time.
    """
    port, group_port = free_ports(2)
    server = TRLServer(url=f"http://{HOST}:{port}", group_port=group_port)
    arguments = server_arguments(model=model, port=port, memory=memory, max_model_len=max_model_len, dtype=dtype)
    # The shim ends vLLM's engine processes with the server, and all of them if this process is killed: a card that a server of an earlier
    # configuration still holds has no room for the next.
    command = [sys.executable, "-m", "otj_runtime.pod.shim", sys.executable, "-m", "trl.scripts.vllm_serve", *arguments]
    with log.open("w") as out:
        shim = subprocess.Popen(
            command,
            env=server_environment(os.environ, visible=visible),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_healthy(server.url, shim)
        yield server
    finally:
        _end(shim)


def server_environment(inherited: Mapping[str, str], *, visible: str) -> dict[str, str]:
    """The server's environment: `inherited`, but without our vLLM plugin, which is no part of what is measured here."""
    own = {"CUDA_VISIBLE_DEVICES": visible, "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return dict(inherited) | own | rendezvous_environment()


def rendezvous_environment() -> dict[str, str]:
    """For the trainer as well: it names its own address to the server, which without a network would be that of no interface."""
    return {"VLLM_HOST_IP": HOST}


def _wait_healthy(url: str, shim: subprocess.Popen[bytes]) -> None:
    def ended() -> str | None:
        status = shim.poll()
        return None if status is None else f"TRL's server ended with status {status} before it answered"

    GeneratorControl(url, failure=ended).wait_healthy(deadline_s=START_SECONDS)


def _end(shim: subprocess.Popen[bytes]) -> None:
    if shim.poll() is None:
        shim.send_signal(signal.SIGQUIT)
    try:
        shim.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(shim.pid, signal.SIGKILL)
        shim.wait()
