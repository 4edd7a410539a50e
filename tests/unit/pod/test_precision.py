"""What the ranks train in on a machine that may lack instructions for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from otj_runtime.api import parse_job
from otj_runtime.pod import precision
from otj_runtime.pod.config import resolve
from otj_runtime.pod.precision import has_bf16, mixed_precision

OLD = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fma avx avx2\n"
NEW = "processor\t: 0\nflags\t\t: avx2 avx512f avx512bw avx512_bf16\n"


@pytest.mark.parametrize(
    ("cpu_info", "found"),
    [
        (OLD, False),
        (NEW, True),
        ("flags : avx512bw", True),
        ("Features : asimd bf16", True),
        ("Features : asimd", False),
        ("isa : rv64", True),
    ],
)
def test_a_processor_computes_in_bfloat16_if_it_says_so_or_says_nothing(cpu_info: str, found: bool) -> None:
    assert has_bf16(cpu_info) is found


@pytest.mark.parametrize(
    ("device", "asked", "cpu_info", "used"),
    [
        ("cpu", "bf16", NEW, "bf16"),
        ("cpu", "bf16", OLD, "no"),
        ("cpu", "no", OLD, "no"),
        ("cuda", "bf16", OLD, "bf16"),
        ("cuda", "fp16", OLD, "fp16"),
    ],
)
def test_only_a_cpu_that_cannot_is_not_asked_to(
    device: str, asked: str, cpu_info: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpu_info)
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    spec = {"algorithm": "GRPO", "model": {"path": "/model"}, "dataset": {"task": "copy"}, "gpus": 2, "accelerator": {"device": device}}
    job = {"apiVersion": "onlinetraining.dev/v1alpha1", "kind": "OnlineTrainingJob", "metadata": {"name": "job"}}
    assert mixed_precision(resolve(parse_job(job | {"spec": spec | {"accelerate": {"mixedPrecision": asked}}}))) == used
