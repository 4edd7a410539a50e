"""The generator of a bare machine: vLLM as a child of rank 0, where no pod brings one.

    rank 0:  a folder in /dev/shm                the mailbox, and what vLLM must know of the model: configuration and tokenizer
             a keeper thread -> shim -> vLLM     the very server of the pod, on a free port of loopback
    others:  learn the address                   nothing to own

The keeper starts vLLM again when it ends, as the kubelet does; then the ranks bring the weights back (`WeightSync.reinstall`). A server
that ends before it ever answered will not do better the next time: it is given up, and the end of its log becomes the error.

Nothing survives the run. On an orderly exit, `close` ends the server and removes the folder. When rank 0 is killed, the kernel tells the
shim (PR_SET_PDEATHSIG), which kills vLLM with every engine process it forked and removes the folder. That signal belongs to the thread that
started the shim, not to the process: hence a thread of its own, which lives as long as the server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from otj_runtime.api import Device, DType
from otj_runtime.api.spec import GenerationSpec
from otj_runtime.pod.commands import MAX_SEQUENCES, server_command, server_environment
from otj_runtime.pod.ports import free_port
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.devices import Placement, place_generator, shared_warning, visible_devices
from otj_runtime.train.generator import Generator
from otj_runtime.weights.control import GeneratorControl

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
LOG_FILE = "generator.log"

PAUSE_SECONDS = 1.0
"""Between the end of a server and its next start."""

POLL_SECONDS = 1.0
"""Between two looks at a server that has not answered yet."""

END_SECONDS = 30.0
"""How long a killed server may take to be gone."""

LAST_BYTES = 2000

_OF_THE_LAUNCHER = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
    "OMP_NUM_THREADS",
)
"""Beginnings of the variables with which launchers tell a rank who it is: vLLM would believe them too."""


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What the server is to be.

    Attributes:
        generation: vLLM's settings.
        dtype: what it computes in.
        placement: where it runs.
        sequences: completions under way at most; None leaves it to vLLM.
        transfer: how weights shall reach it.
    """

    generation: GenerationSpec
    dtype: DType
    placement: Placement
    sequences: int | None = None
    transfer: str = "auto"

    @property
    def device(self) -> Device:
        """What it computes on."""
        return Device.CUDA if self.placement.gpus else Device.CPU


def plan_server(args: OnlineConfig) -> ServerPlan:
    """The server that `args` ask for, on this machine. Every rank finds the same.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if the device does not exist, or `vllm_dtype` is none of its types.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    if ranks != args.world_size:
        raise ValueError(
            f"use_vllm=True starts one generator for the ranks of one machine, but {ranks} of {args.world_size} ranks run here; set "
            "use_vllm=False, or run an OnlineTrainingJob, whose pods bring their own"
        )
    on_cpu = args.device.type == "cpu"
    placement = place_generator(args.vllm_device, training_ranks=ranks, gpus=torch.cuda.device_count(), on_cpu=on_cpu)
    if (warning := shared_warning(placement)) is not None and args.process_index == 0:
        logger.warning(warning)
    if importlib.util.find_spec("vllm") is None:
        extra = "vllm" if placement.gpus else "cpu"
        raise ImportError(
            "vLLM is not available and `use_vllm` is set to True. Please install it with "
            f'`pip install "online-training-runtime[{extra}]"` to use it'
        )
    generation = GenerationSpec(
        gpus=max(1, len(placement.gpus)),
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=args.vllm_max_model_len,
        enable_prefix_caching=args.vllm_enable_prefix_caching,
    )
    sequences = min(MAX_SEQUENCES, args.world_size * args.completions_per_rank * (1 + args.staleness))
    return ServerPlan(
        generation=generation,
        dtype=_dtype(args, placement),
        placement=placement,
        sequences=sequences,
        transfer=args.vllm_weight_transfer,
    )


def _dtype(args: OnlineConfig, placement: Placement) -> DType:
    if args.vllm_dtype != "auto":
        try:
            return DType(args.vllm_dtype)
        except ValueError:
            raise ValueError(f"vllm_dtype: {args.vllm_dtype!r} is unknown; use auto, {', '.join(DType)}") from None
    if not placement.gpus:
        return DType.FLOAT32
    return DType.FLOAT16 if args.fp16 else DType.BFLOAT16


class ChildGenerator:
    """A vLLM server that ends with this process, or earlier by `close`.

    Args:
        plan: what it is to be.
        model: the policy, of which the configuration is read.
        tokenizer: the policy's.
        output: folder of the server's log.
    """

    def __init__(self, plan: ServerPlan, *, model: Any, tokenizer: Any, output: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="otj-generator-", dir=SHARED_MEMORY))
        described = self._folder / "model"
        _describe_model(model, tokenizer, described)
        self.generator = Generator(
            url=f"http://127.0.0.1:{free_port()}",
            mailbox=self._folder / "mailbox",
            dtype=plan.dtype,
            ready_timeout_s=float(plan.generation.ready_timeout_seconds),
            wish=plan.transfer,
        )
        server = server_command(
            plan.generation,
            model=str(described),
            url=self.generator.url,
            dtype=plan.dtype,
            device=plan.device,
            sequences=plan.sequences,
        )
        self._command = [sys.executable, "-m", "otj_runtime.pod.shim", "--remove", str(self._folder), sys.executable, *server[1:]]
        self._environment = _environment(plan)
        output.mkdir(parents=True, exist_ok=True)
        self.log = output / LOG_FILE
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        self._control = GeneratorControl(self.generator.url)
        self._lock = threading.Lock()
        self._shim: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._failure: str | None = None
        self._keeper = threading.Thread(target=self._keep, name="generator", daemon=True)
        self._keeper.start()

    def failure(self) -> str | None:
        """Why the server will never answer; None while there is hope."""
        return self._failure

    def close(self) -> None:
        """End the server and remove its folder."""
        with self._lock:
            self._closed = True
            if self._shim is not None and self._shim.poll() is None:
                self._shim.send_signal(signal.SIGQUIT)
        self._keeper.join(END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self) -> None:
        answered = False
        while (shim := self._start()) is not None:
            while shim.poll() is None:
                if not answered:
                    answered = self._control.healthy()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    shim.wait(None if answered else POLL_SECONDS)
            if not answered and not self._closed:
                self._failure = f"vLLM ended with status {shim.returncode} before it answered. The end of {self.log}:\n{self._last_words()}"
                return
            time.sleep(PAUSE_SECONDS)

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._closed:  # and the log's folder may be gone
                return None
            with self.log.open("ab") as log:
                self._shim = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is the trainer's to answer
                )
            return self._shim

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(self._log_began, self.log.stat().st_size - LAST_BYTES))
            return log.read().decode(errors="replace")


def _describe_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what vLLM reads of a model whose weights come later."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _environment(plan: ServerPlan) -> dict[str, str]:
    """This process's environment without what its launcher said to it; a user's own settings of vLLM win over ours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_LAUNCHER)}
    placed = {"CUDA_VISIBLE_DEVICES": visible_devices(plan.placement, inherited=os.environ.get("CUDA_VISIBLE_DEVICES"))}
    return (
        server_environment(plan.device, gpus=plan.generation.gpus)
        | inherited
        | placed
        | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONUNBUFFERED": "1"}
    )
