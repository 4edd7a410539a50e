"""An HTTP server in place of the generator, for what a real vLLM does not do when it is asked to."""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from otj_runtime.weights.control import GeneratorControl

SILENCE_SECONDS = 5


class FakeGenerator(ThreadingHTTPServer, ABC):
    """Answers as a subclass says.

    Attributes:
        silent: routes that are not answered at all.
        control: the client of it.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.silent: set[str] = set()
        self.control = GeneratorControl(f"http://127.0.0.1:{self.server_port}")

    @abstractmethod
    def note(self, method: str, path: str, body: Any) -> None:
        """A request came."""

    @abstractmethod
    def answer(self, path: str, body: Any) -> tuple[int, object]:
        """Status and document."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeGenerator

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else None
        self.server.note(self.command, self.path, body)
        if self.path.split("?")[0] in self.server.silent:
            time.sleep(SILENCE_SECONDS)
            return
        status, answer = self.server.answer(self.path, body)
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST  # noqa: N815 (the name is http.server's)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests ask what was noted."""


S = TypeVar("S", bound=FakeGenerator)


@contextmanager
def serving(server: S) -> Iterator[S]:
    """Let `server` answer while the context is open."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
