"""One container's process: started below a shim, its output in a log file, ended as a whole."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from otj_runtime.local.containers import Container
from otj_runtime.pod.processes import signal_all

SHIM = "otj_runtime.pod.shim"


class Process:
    """A running container."""

    def __init__(self, name: str, shim: asyncio.subprocess.Process) -> None:
        self.name = name
        self._shim = shim

    @classmethod
    async def start(cls, container: Container, log: Path) -> Process:
        """Start `container` in a session of its own, where a terminal's Ctrl-C does not reach it. Output is appended to `log`."""
        with log.open("ab") as out:
            shim = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", SHIM, *container.command),
                env=os.environ | container.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(container.name, shim)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._shim.returncode is None

    async def wait(self) -> int:
        """Its exit status; 128 plus the signal if one ended it."""
        status = await self._shim.wait()
        return 128 - status if status < 0 else status

    def terminate(self) -> None:
        """Ask its first process to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all its processes at once."""
        self._signal(signal.SIGQUIT)

    async def end(self, *, grace: float) -> None:
        """Ask it to end, and kill it if it has not after `grace` seconds."""
        if not self.running:
            return
        self.terminate()
        try:
            await asyncio.wait_for(self._shim.wait(), grace)
        except TimeoutError:
            self.kill()
            await self._shim.wait()

    def _signal(self, number: int) -> None:
        if self.running:
            signal_all([self._shim.pid], number)
