"""What a training rank does in the launcher's tests, by the environment variable RANK_DOES."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import FailureNote, RewardFailed, Terminated

CONFIG = PodConfig.from_environment()
RUN = Path(CONFIG.run_directory)


def report(**metrics: Any) -> None:
    """Report progress as a trainer does."""
    token = Path(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]).read_text()
    body = {"trainerStatus": {"metrics": [{"name": name, "value": str(value)} for name, value in metrics.items()]}}
    request = urllib.request.Request(
        os.environ["KUBEFLOW_TRAINER_SERVER_URL"], data=json.dumps(body).encode(), headers={"Authorization": f"Bearer {token}"}
    )
    urllib.request.urlopen(request, timeout=5).close()


def gloo() -> None:
    """Add a one over all ranks and say what came out."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    total = accelerator.reduce(torch.ones(1), reduction="sum")
    Path(CONFIG.output, f"rank-{accelerator.process_index}").write_text(f"{accelerator.device.type} {int(total)}")
    if accelerator.is_main_process:
        report(current_step=1, total_steps=1, world_size=accelerator.num_processes)
    accelerator.end_training()


def crash() -> None:
    """Raise."""
    print("about to divide", flush=True)
    print(1 // 0)


def note() -> None:
    """Leave a note, then a crash with a different story."""
    FailureNote.of(RewardFailed("sample 7 scored twice"), rank=0).write(RUN)
    raise RuntimeError("collective was aborted")


def save_when_told() -> None:
    """Train until SIGTERM, then save."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    report(current_step=4, total_steps=100, world_size=1)
    while not asked:
        time.sleep(0.05)
    Path(CONFIG.output, "checkpoint-4").mkdir()
    FailureNote.of(Terminated("stopped at step 4 of 100; a checkpoint was saved"), rank=0).write(RUN)
    sys.exit(1)


def hang() -> None:
    """Ignore everything."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(CONFIG.output, "pid").write_text(str(os.getpid()))
    threading.Event().wait()  # for ever: a test that waits long enough must not see it end by itself


def wrong_world() -> None:
    """Report another number of ranks than the job has, and go on."""
    report(current_step=1, total_steps=100, world_size=7)
    threading.Event().wait()


if __name__ == "__main__":
    {f.__name__: f for f in (gloo, crash, note, save_when_told, hang, wrong_world)}[os.environ["RANK_DOES"]]()
