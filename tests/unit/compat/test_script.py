"""A user's script under our runner: what it sees, and how its failure is told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from otj_runtime.api import Reason, parse_job
from otj_runtime.compat.__main__ import note_of, run_script
from otj_runtime.launch.preflight import check_script
from otj_runtime.pod.commands import script_arguments
from otj_runtime.pod.config import Layout, PodConfig, resolve
from otj_runtime.pod.errors import InvalidSpec
from otj_runtime.weights.errors import WeightsDiverged
from tests.unit.api.specs import changed

SCRIPT = """
import json, os, sys
import beside
json.dump([__name__, sys.argv[1:], os.getcwd(), beside.__file__], open("seen.json", "w"))
"""

FAILING = """
def reward(completions):
    return 1 / 0

def train():
    reward([])

train()
"""


@pytest.fixture(autouse=True)
def own_interpreter_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script changes the working directory, the path and the arguments of its process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delitem(sys.modules, "beside", raising=False)


@pytest.mark.parametrize("command", [["scripts/train.py"], ["-m", "train"]], ids=["script", "module"])
def test_a_script_runs_as_python_would_run_it_in_the_output_folder(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts, output = tmp_path / "scripts", tmp_path / "output"
    scripts.mkdir()
    output.mkdir()
    (scripts / "train.py").write_text(SCRIPT)
    (scripts / "beside.py").touch()
    monkeypatch.syspath_prepend(str(scripts)) if command[0] == "-m" else None
    command = [str(tmp_path / command[0])] if command[0] != "-m" else command
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    run_script([*command, "--beta", "0.1"], output)
    assert json.loads((output / "seen.json").read_text()) == ["__main__", ["--beta", "0.1"], str(output), str(scripts / "beside.py")]


def test_the_note_of_a_failed_script_names_the_line_in_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FAILING)
    with pytest.raises(ZeroDivisionError) as failure:
        run_script([str(script)], tmp_path)
    note = note_of(failure.value, rank=1, script=str(script))
    assert (note.reason, note.rank) == (Reason.TRAINER_CRASHED, 1)
    assert note.message == f"ZeroDivisionError: division by zero ({script}, line 3, in reward)"


def test_an_error_of_ours_keeps_its_reason_however_it_was_wrapped() -> None:
    try:
        try:
            raise WeightsDiverged("the probe disagrees")
        except WeightsDiverged as error:
            raise RuntimeError("cannot import") from error
    except RuntimeError as wrapped:
        note = note_of(wrapped, rank=0, script="/train.py")
    assert (note.reason, note.message) == (Reason.WEIGHTS_DIVERGED, "the probe disagrees")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("$(MODEL)", "/models/a"),
        ("--out=$(MODEL)/x", "--out=/models/a/x"),
        ("$(MISSING)", "$(MISSING)"),
        ("$$(MODEL)", "$(MODEL)"),
        ("$MODEL", "$MODEL"),
        ("; rm -rf $(echo x)", "; rm -rf $(echo x)"),
    ],
)
def test_variables_of_a_command_are_replaced_as_kubernetes_does(part: str, expected: str) -> None:
    assert script_arguments([part], {"MODEL": "/models/a"}) == [expected]


def config_of(script: str, output: Path) -> PodConfig:
    job = parse_job(changed({"dataset": None, "trainer.command": ["python", script]}))
    return resolve(job, Layout(), output=str(output))


def test_a_missing_script_is_told_with_what_lies_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "train_gpro.py").touch()
    with pytest.raises(InvalidSpec, match=r"the script .*train_grpo\.py does not exist, its folder holds train_gpro\.py"):
        check_script(config_of(str(tmp_path / "train_grpo.py"), tmp_path))


def test_a_relative_script_is_looked_for_in_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    check_script(config_of("train.py", tmp_path))
    assert not os.path.exists("/train.py")
