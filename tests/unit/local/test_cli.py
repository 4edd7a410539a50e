"""The command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from otj_runtime.cli import main
from otj_runtime.pod.manifest import build_job
from tests.unit.local.jobs import document, job


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document()))
    return path


def test_render_prints_the_operators_job(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(file), "--image", "runtime:1"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == build_job(job(), default_image="runtime:1")


@pytest.mark.parametrize("command", ["run", "render"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("training.max_stepz=3", "spec.training.max_stepz: unknown argument of GRPOConfig; did you mean max_steps?"),
        ("gpus=1", "spec.gpus: 1 is too few, it needs at least 2: one generates, the others train"),
        ("algorithm=PPO", "spec.algorithm: Input should be 'GRPO' or 'OnlineDPO' (found 'PPO')"),
    ],
)
def test_a_fault_of_the_job_is_one_line_that_names_file_and_field(
    file: Path, capsys: pytest.CaptureFixture[str], command: str, change: str, fault: str
) -> None:
    assert main([command, str(file), "--set", change]) == 2
    assert capsys.readouterr().err == f"{file}: {fault}\n"


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"otj: {tmp_path}/none.yaml: No such file or directory\n"


def test_help_and_render_import_no_torch(file: Path) -> None:
    program = f"import sys; from otj_runtime.cli import main; main(['render', {str(file)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_model_tiny_makes_a_folder_that_the_launcher_takes(tmp_path: Path) -> None:
    assert main(["model", "tiny", str(tmp_path / "tiny")]) == 0
    assert (tmp_path / "tiny" / "config.json").is_file()
