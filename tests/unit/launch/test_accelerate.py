"""The call of `accelerate launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api import parse_job
from otj_runtime.launch import accelerate
from otj_runtime.pod.config import PodConfig, resolve


def config_of(*, gpus: int = 4, device: str = "cpu", **accelerate_spec: Any) -> PodConfig:
    """The configuration of a job with these settings."""
    return resolve(
        parse_job(
            {
                "apiVersion": "onlinetraining.dev/v1alpha1",
                "kind": "OnlineTrainingJob",
                "metadata": {"name": "job"},
                "spec": {
                    "algorithm": "GRPO",
                    "model": {"path": "/model"},
                    "dataset": {"task": "copy"},
                    "gpus": gpus,
                    "accelerator": {"device": device},
                    "accelerate": accelerate_spec,
                },
            }
        )
    )


@pytest.mark.parametrize(
    ("gpus", "device", "strategy", "kind"),
    [
        (2, "cpu", "ddp", "NO"),
        (4, "cpu", "ddp", "MULTI_GPU"),
        (2, "cuda", "ddp", "NO"),
        (8, "cuda", "ddp", "MULTI_GPU"),
        (8, "cuda", "fsdp2", "FSDP"),
        (8, "cuda", "deepspeed-zero3", "DEEPSPEED"),
    ],
)
def test_the_distributed_type_follows_from_ranks_and_strategy(gpus: int, device: str, strategy: str, kind: str) -> None:
    keys = accelerate.settings(config_of(gpus=gpus, device=device, strategy=strategy))
    assert keys["distributed_type"] == kind
    assert keys["num_processes"] == gpus - 1
    assert keys["use_cpu"] is (device == "cpu")


def test_keys_of_the_job_win_in_the_file_and_on_the_command_line(tmp_path: Path) -> None:
    keys = accelerate.settings(config_of(gpus=4, config={"num_processes": 2, "main_training_function": "other"}))
    command = accelerate.command(keys, config_file=tmp_path / "a.yaml", threads=1, module="m")
    assert keys["main_training_function"] == "other"
    assert command[command.index("--num_processes") + 1] == "2"


def test_fsdp2_asks_for_the_second_version() -> None:
    assert accelerate.settings(config_of(device="cuda", strategy="fsdp2"))["fsdp_config"]["fsdp_version"] == 2


def test_one_key_of_a_section_can_be_changed() -> None:
    section = accelerate.settings(config_of(device="cuda", strategy="fsdp2", config={"fsdp_config": {"fsdp_offload_params": True}}))[
        "fsdp_config"
    ]
    assert (section["fsdp_version"], section["fsdp_offload_params"]) == (2, True)


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "threads"),
    [(2, 3, None, 1), (64, 7, None, 9), (64, 7, "4", 4), (8, 1, "", 8), (8, 2, "many", 4)],
)
def test_ranks_share_the_cores_unless_the_user_says_otherwise(cores: int, ranks: int, asked: str | None, threads: int) -> None:
    assert accelerate.threads_per_rank(cores=cores, ranks=ranks, asked=asked) == threads


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("50000 100000", 1), ("100000000 100000", None), ("garbage", None)])
def test_the_cgroup_limits_the_cores(tmp_path: Path, text: str, cores: int | None) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text(text)
    assert accelerate.usable_cores(limit) == (cores or accelerate.usable_cores(tmp_path / "missing"))
