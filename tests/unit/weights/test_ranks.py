"""Ranks act as one: results and failures reach all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.ranks import Ranks

_RANK = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.ranks import Ranks
rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
ranks, seen = Ranks(timeout_s=120), []

def lose(): raise GeneratorLost("gone")
def sync(): raise WeightSyncFailed("update: refused", phase="update")
def break_on(r):
    if ranks.rank == r: raise KeyError("a bug")

def note(call):
    try: seen.append(call())
    except Exception as error: seen.append([type(error).__name__, str(error), getattr(error, "phase", None)])

note(lambda: ranks.lead(lambda: f"from {ranks.rank}", phase="x"))
note(lambda: ranks.together(lambda: ranks.rank * 10, phase="x"))
note(lambda: ranks.lead(lose, phase="x"))
note(lambda: ranks.lead(sync, phase="x"))
note(lambda: ranks.together(lambda: break_on(2), phase="write"))
note(lambda: ranks.lead(lambda: "still in step", phase="x"))
with open(out, "w") as file: json.dump(seen, file)
dist.destroy_process_group()  # gloo's threads, if the interpreter ends under them, now and then abort it
"""


def test_every_rank_gets_the_results_and_the_failures_of_all(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    outputs = [tmp_path / f"{rank}.json" for rank in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), "3", store, str(output)], env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=180) for process in processes] == [0, 0, 0]
    expected = [
        "from 0",
        [0, 10, 20],
        ["GeneratorLost", "gone", None],
        ["WeightSyncFailed", "update: refused", "update"],
        ["WeightSyncFailed", "write: KeyError: 'a bug'", "write"],
        "still in step",
    ]
    assert [json.loads(output.read_text()) for output in outputs] == [expected] * 3


def test_a_single_process_needs_no_process_group() -> None:
    def lose() -> None:
        raise GeneratorLost("gone")

    ranks = Ranks(timeout_s=1)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.lead(lambda: 5, phase="x") == 5
    assert ranks.together(lambda: 6, phase="x") == [6]
    with pytest.raises(GeneratorLost, match="gone"):
        ranks.lead(lose, phase="x")
    with pytest.raises(WeightSyncFailed, match=r"x: ZeroDivisionError"):
        ranks.together(lambda: 1 // 0, phase="x")
