"""The pod's life with real processes; only what the containers run is made up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from otj_runtime.api import Reason
from otj_runtime.local import pod as pod_module
from otj_runtime.local.containers import Container
from otj_runtime.local.folder import RunFolder
from otj_runtime.local.pod import LocalPod, Outcome
from otj_runtime.pod.errors import ExitCode, FailureNote
from tests.unit.local.jobs import job

FOREVER = "import time; time.sleep(600)"
DEADLINE = 60.0


def pod_of(folder: RunFolder, *, model: str = "", generator: str = FOREVER, trainer: str = "", port: int = 1) -> LocalPod:
    """A pod whose containers run these Python programs. They find the run's folder in ROOT."""
    programs = {"model": model, "generator": generator, "trainer": trainer}
    env = {"ROOT": str(folder.root)}
    containers = {name: Container(name, [sys.executable, "-c", program], env) for name, program in programs.items()}
    return LocalPod(containers, folder, f"http://127.0.0.1:{port}")


async def run(pod: LocalPod, folder: RunFolder) -> Outcome:
    """The end of the pod's run."""
    with folder.held(job(), clean=False):
        return await asyncio.wait_for(pod.run(), DEADLINE)


async def appears(path: Path) -> None:
    """Wait for a file."""
    deadline = time.monotonic() + DEADLINE
    while not await asyncio.to_thread(path.exists):
        assert time.monotonic() < deadline, f"{path} did not appear"
        await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether no such process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


NOTE_PID = "import os, pathlib; pathlib.Path(os.environ['ROOT'], 'pid').write_text(str(os.getpid()));"


async def test_the_trainers_end_is_the_pods_end(folder: RunFolder) -> None:
    wait = "import os, time\nwhile not os.path.exists(os.environ['ROOT'] + '/pid'): time.sleep(0.02)\nprint('trained')"
    outcome = await run(pod_of(folder, generator=NOTE_PID + FOREVER, trainer=wait), folder)
    assert outcome.code == 0
    assert outcome.note is None
    assert folder.log("trainer").read_text() == "trained\n"
    assert gone(int((folder.root / "pid").read_text()))


async def test_a_model_that_cannot_be_had_ends_it_before_anything_else_starts(folder: RunFolder) -> None:
    outcome = await run(pod_of(folder, model="import sys; sys.exit(65)"), folder)
    assert (outcome.code, outcome.container) == (ExitCode.MODEL_NOT_FOUND, "model")
    assert outcome.note is not None
    assert outcome.note.reason is Reason.MODEL_NOT_FOUND
    assert not folder.log("trainer").exists()


async def test_the_termination_message_says_why(folder: RunFolder) -> None:
    note = FailureNote(reason=Reason.GENERATOR_LOST, message="gone")
    program = f"import os, sys; open(os.environ['ROOT'] + '/termination.json', 'w').write({note.to_json()!r}); sys.exit(81)"
    outcome = await run(pod_of(folder, trainer=program), folder)
    assert outcome == Outcome(81, note, "generator")


async def test_a_generator_that_dies_is_started_again(folder: RunFolder) -> None:
    count = "import os; open(os.environ['ROOT'] + '/starts', 'a').write('x')"
    wait = (
        "import os, time\n"
        "path = os.environ['ROOT'] + '/starts'\n"
        "while not os.path.exists(path) or len(open(path).read()) < 2: time.sleep(0.02)"
    )
    pod = pod_of(folder, generator=count, trainer=wait)
    assert (await run(pod, folder)).code == 0
    assert pod.generator_restarts >= 1


async def test_a_generator_that_never_comes_up_ends_the_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_module, "FIRST_PAUSE_SECONDS", 0.01)
    outcome = await run(pod_of(folder, generator="import sys; print('no such flag'); sys.exit(2)", trainer=FOREVER), folder)
    assert (outcome.code, outcome.container) == (ExitCode.GENERATOR_NOT_READY, "generator")
    assert outcome.note is not None
    assert "ended 3 times" in outcome.note.message


async def test_stop_lets_the_trainer_finish_in_its_own_way(folder: RunFolder) -> None:
    program = "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(85)); " + NOTE_PID + FOREVER
    pod = pod_of(folder, trainer=program)
    task = asyncio.create_task(run(pod, folder))
    await appears(folder.root / "pid")
    pod.stop()
    outcome = await task
    assert outcome.code == ExitCode.TERMINATED
    assert outcome.note is not None
    assert outcome.note.reason is Reason.TERMINATED


async def test_the_second_stop_waits_for_nobody(folder: RunFolder) -> None:
    program = "import signal; signal.signal(15, signal.SIG_IGN); " + NOTE_PID + FOREVER
    pod = pod_of(folder, trainer=program)
    task = asyncio.create_task(run(pod, folder))
    await appears(folder.root / "pid")
    pod.stop()
    pod.stop()
    assert (await task).code == 137
    assert gone(int((folder.root / "pid").read_text()))


async def test_a_stop_before_the_model_is_there_starts_nothing_else(folder: RunFolder) -> None:
    pod = pod_of(folder, model=NOTE_PID + FOREVER)
    task = asyncio.create_task(run(pod, folder))
    await appears(folder.root / "pid")
    pod.stop()
    assert (await task).container == "model"
    assert not folder.log("trainer").exists()


SCATTER = """
import os, subprocess, sys, time
sleep = "import time; time.sleep(600)"
orphan = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', %r], start_new_session=True, stdout=-3).pid)" % sleep
pids = [os.getpid(), subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True).pid]
pids.append(int(subprocess.check_output([sys.executable, "-c", orphan])))
print(*pids, flush=True)
time.sleep(600)
"""

OWNER = """
import subprocess, sys
shim = subprocess.Popen([sys.executable, "-m", "otj_runtime.pod.shim", sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(shim.stdout.readline().strip(), shim.pid, flush=True)
shim.wait()
"""


@pytest.mark.parametrize("victim", ["the owner, by SIGKILL", "the shim, by SIGQUIT", "the container's process"])
def test_nothing_of_a_container_outlives_its_end(victim: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, SCATTER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    first, *others, shim = map(int, owner.stdout.readline().split())
    pid, number = {
        "the owner, by SIGKILL": (owner.pid, signal.SIGKILL),
        "the shim, by SIGQUIT": (shim, signal.SIGQUIT),
        "the container's process": (first, signal.SIGKILL),
    }[victim]
    os.kill(pid, number)
    deadline = time.monotonic() + DEADLINE
    while not all(map(gone, [first, *others, shim])):
        assert time.monotonic() < deadline, [pid for pid in [first, *others, shim] if not gone(pid)]
        time.sleep(0.05)
    owner.wait(timeout=DEADLINE)
    owner.stdout.close()
