"""The pod's life: the model container to its end, then generator and trainer beside each other until the trainer ends.

As in a pod, a generator that dies is started again after a pause that grows, and the trainer goes on when it is back. One
difference: a generator that dies several times before it ever answered ends the run at once, since a person is waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from otj_runtime.api import Reason
from otj_runtime.local.containers import Container
from otj_runtime.local.folder import RunFolder
from otj_runtime.local.process import Process
from otj_runtime.pod.errors import ExitCode, FailureNote
from otj_runtime.pod.manifest import GRACE_SECONDS
from otj_runtime.pod.names import GENERATOR_CONTAINER, MODEL_CONTAINER, TRAINER_CONTAINER

GENERATOR_GRACE_SECONDS = 10.0
STARTS_WITHOUT_AN_ANSWER = 3
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How the run ended: the exit code, and on failure why and whose log tells more."""

    code: int
    note: FailureNote | None
    container: str


class LocalPod:
    """The three containers of a job as processes.

    Args:
        containers: by name.
        folder: the run's folder.
        generator_url: where the generator answers.
    """

    def __init__(self, containers: dict[str, Container], folder: RunFolder, generator_url: str) -> None:
        self._containers = containers
        self._folder = folder
        self._url = generator_url
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopped_for: tuple[FailureNote, str] | None = None
        self._generator: Process | None = None
        self.phase = MODEL_CONTAINER
        """The container that the run is about at the moment."""
        self.generator_started: float | None = None
        """Monotonic time of the generator's last start."""
        self.generator_ready_after: float | None = None
        """Seconds that the generator's first start took; None until it answered."""
        self.generator_version: str | None = None
        self.generator_restarts = 0

    def stop(self) -> None:
        """Ask the run to end, saving what can be saved; the second time, end it at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def stop_for(self, note: FailureNote, container: str) -> None:
        """End the run for the reason in `note`."""
        self._stopped_for = self._stopped_for or (note, container)
        self._stop.set()

    async def run(self) -> Outcome:
        """Run to the end. Nothing of the pod runs afterwards."""
        model = await self._start(MODEL_CONTAINER)
        if status := await self._end_of(model):
            return self._outcome(status, MODEL_CONTAINER)
        self.phase = TRAINER_CONTAINER
        trainer = await self._start(TRAINER_CONTAINER)
        keeper = asyncio.create_task(self._keep_generator())
        try:
            return self._outcome(await self._end_of(trainer), TRAINER_CONTAINER)
        finally:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
            if self._generator is not None:
                await self._generator.end(grace=0 if self._hurry.is_set() else GENERATOR_GRACE_SECONDS)

    async def _start(self, name: str) -> Process:
        return await Process.start(self._containers[name], self._folder.log(name))

    async def _end_of(self, process: Process) -> int:
        """The exit status of `process`, which is asked to end as soon as the run is."""
        end = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({end, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                process.terminate()
                await asyncio.wait({end, hurry}, timeout=GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                process.kill()
            return await end
        finally:
            stop.cancel()
            hurry.cancel()
            process.kill()

    def _outcome(self, status: int, container: str) -> Outcome:
        if self._stopped_for is not None:
            note, guilty = self._stopped_for
            code = ExitCode[note.reason.name] if note.reason.name in ExitCode.__members__ else ExitCode.TERMINATED
            return Outcome(int(code), note, guilty)
        if status == 0:
            return Outcome(0, None, container)
        note = read_note(self._folder.termination) or note_of(status, container)
        guilty = GENERATOR_CONTAINER if note.reason in (Reason.GENERATOR_NOT_READY, Reason.GENERATOR_LOST) else container
        return Outcome(status, note, guilty)

    async def _keep_generator(self) -> None:
        """Start the generator, and again whenever it ends, until cancelled."""
        starts, pause = 0, FIRST_PAUSE_SECONDS
        while True:
            starts += 1
            self.generator_started = time.monotonic()
            self._generator = await self._start(GENERATOR_CONTAINER)
            asking = asyncio.create_task(self._ask_version())
            try:
                status = await self._generator.wait()
            finally:
                asking.cancel()
            if self.generator_version is None and starts >= STARTS_WITHOUT_AN_ANSWER:
                message = f"vLLM ended {starts} times before it answered, the last time with exit status {status}"
                self.stop_for(FailureNote(reason=Reason.GENERATOR_NOT_READY, message=message), GENERATOR_CONTAINER)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self.generator_restarts += 1

    async def _ask_version(self) -> None:
        """Learn vLLM's version as soon as it answers."""
        assert self.generator_started is not None
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while self.generator_version is None:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
                    async with session.get(f"{self._url}/version") as answer:
                        self.generator_version = str((await answer.json())["version"])
                        self.generator_ready_after = time.monotonic() - self.generator_started
                await asyncio.sleep(POLL_SECONDS)


def read_note(path: Path) -> FailureNote | None:
    """The failure note in a termination log; None if nobody wrote one."""
    try:
        return FailureNote.model_validate_json(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def note_of(status: int, container: str) -> FailureNote:
    """The note of a container that left none: its exit code says the reason, if it is one of ours."""
    reason = ExitCode(status).reason if status in set(ExitCode) else Reason.POD_FAILED
    return FailureNote(reason=reason, message=f"the {container} container ended with exit status {status}")
