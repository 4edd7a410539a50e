"""Processes that call one function on one item at a time, for code that may never return: a thread cannot be ended, a process can.

    items -> a few workers, each asked over a pipe -> answers in order; an item that outlives its deadline costs its worker and counts as None

Calls go as JSON lines on the worker's standard input and output; what the function prints goes to standard error. A worker is started
again for the next item after it was killed, and ends when its input does, that is with this process. It runs this file and loads the
function's file alone, not our package, so that it is there in the time that the function's own imports take.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any


class WorkerFailed(Exception):
    """The function raised, or its process ended; the text says with what."""


class Worker:
    """One process that calls the function `name` of the Python file `path`."""

    def __init__(self, path: Path, name: str) -> None:
        self._command = [sys.executable, "-P", __file__, str(path), name]
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, item: Any, *, timeout_s: float) -> Any:
        """What the function returns for `item`; both are JSON values.

        Raises:
            TimeoutError: after `timeout_s` seconds; the process is gone then.
            WorkerFailed: if the function raised or its process ended.
        """
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(item).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(self._read_line(process, time.monotonic() + timeout_s))
        except (TimeoutError, WorkerFailed, OSError):
            self.close()
            raise
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer["result"]

    def _read_line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                raise WorkerFailed(f"the process of {self._command[-1]} ended with {process.wait()}")
            line += part
        return line

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]  # both are pipes
            self._process = None


class Workers:
    """A few workers of one function.

    Args:
        path, name: the function's file and its name there.
        count: processes.
        start_s: seconds that a worker's first call gets in addition, for its imports.
    """

    def __init__(self, path: Path, name: str, *, count: int = 2, start_s: float = 60.0) -> None:
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(count):
            self._free.put(Worker(path, name))
        self._count = count
        self._start_s = start_s
        self._started: set[Worker] = set()
        self._lock = threading.Lock()

    def map(self, items: Sequence[Any], *, timeout_s: float) -> list[Any]:
        """The function's results in order; None for items that took longer than `timeout_s` seconds.

        Raises:
            WorkerFailed: if the function raised.
        """
        with ThreadPoolExecutor(self._count, thread_name_prefix="worker") as pool:
            return list(pool.map(lambda item: self._call(item, timeout_s), items))

    def _call(self, item: Any, timeout_s: float) -> Any:
        worker = self._free.get()
        try:
            with self._lock:
                fresh = worker not in self._started
                self._started.add(worker)
            return worker.call(item, timeout_s=timeout_s + (self._start_s if fresh else 0.0))
        except TimeoutError:
            with self._lock:
                self._started.discard(worker)
            return None
        finally:
            self._free.put(worker)


def main() -> None:
    """Serve calls of the function named on the command line."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location("worked", sys.argv[1])
    assert spec is not None, "a Python file"
    assert spec.loader is not None, "a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, sys.argv[2])
    for line in sys.stdin.buffer:
        try:
            answer: dict[str, Any] = {"result": function(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
