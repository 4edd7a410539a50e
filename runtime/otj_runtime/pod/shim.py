"""The parent of a process that must not outlive its starter, as a container runtime's shim is: when the process ends, everything it started ends.

    python -m otj_runtime.pod.shim [--remove FOLDER] COMMAND [ARGUMENT...]

SIGTERM and SIGINT go on to the process alone, as the kubelet signals a container's first process; SIGQUIT kills all of it. If the
starter dies, by SIGKILL even, the kernel tells the shim, which kills all of it too, and removes FOLDER, since nobody else is left to do so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from types import FrameType

from otj_runtime.pod.processes import become_subreaper, die_with_parent, kill_descendants, signal_all

KILLED = 128 + signal.SIGKILL

ORPHANED = signal.SIGUSR1
"""The kernel's word that the thread which started the shim has ended. No signal that anybody else sends: while the threads of a killed process
end one after the other, the shim still has its parent, and could not tell SIGTERM of the one kind from the other."""


class Shim:
    """Runs one command to its end."""

    def __init__(self, command: list[str], *, remove: str | None = None) -> None:
        self._command = command
        self._remove = remove
        self._parent = os.getppid()
        self._child: int | None = None
        self._pending: int | None = None

    def run(self) -> int:
        """Exit status of the command, as a shell counts it."""
        become_subreaper()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, ORPHANED):
            signal.signal(number, self._on_signal)
        die_with_parent(ORPHANED, parent=self._parent)
        shim = os.getpid()
        self._child = subprocess.Popen(self._command, preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=shim)).pid
        if self._pending is not None:
            self._on_signal(self._pending, None)
        status = self._wait()
        kill_descendants()
        return status

    def _wait(self) -> int:
        """Reap until the child itself ends: orphans of the container are handed to this process."""
        while True:
            pid, status = os.wait()
            if pid == self._child:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGQUIT, ORPHANED):
            kill_descendants()
            if number == ORPHANED and self._remove is not None:
                shutil.rmtree(self._remove, ignore_errors=True)
            os._exit(KILLED)
        if self._child is None:
            self._pending = number
        else:
            signal_all([self._child], number)


def main(arguments: list[str]) -> int:
    """Exit status of the command in `arguments`."""
    remove = arguments[1] if arguments[0] == "--remove" else None
    return Shim(arguments if remove is None else arguments[2:], remove=remove).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
