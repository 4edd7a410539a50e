"""A launcher's progress port, answering what a test sets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from otj_runtime.api import Progress
from otj_runtime.pod.metrics import LauncherReport
from otj_runtime.pod.names import PROGRESS_ROUTE


class Launcher:
    """Holds the report that the port answers with, and counts the answers."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.report = LauncherReport(phase="starting", generator_ready=False)
        self.answers = 0

    def tell(self, step: int, total: int, reward: str) -> None:
        """From now on the trainer is at `step`."""
        progress = Progress(step=step, total_steps=total, reward=reward, seconds_per_step="1.5", world_size=3)
        self.report = LauncherReport(phase="training", generator_ready=True, progress=progress)


@contextmanager
def launcher() -> Iterator[Launcher]:
    """A launcher on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == PROGRESS_ROUTE
            body = json.dumps(told.report.to_wire()).encode() if known else b""
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            told.answers += 1

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = Launcher(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
