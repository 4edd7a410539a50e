"""Runs one call of a user's function beside the caller, so that a deadline can pass while it hangs.

Each call gets a thread of its own; one that never returns is left behind and does not keep the process from ending. Coroutines share
one event loop for the whole run, so that a client session kept between calls stays usable. What a thread cannot cut short is code
that holds the interpreter's lock for ever (a regular expression that explodes): then nothing of this process runs, and the
launcher's watchdog ends the run.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any


def start(function: Callable[..., Any], keywords: dict[str, Any]) -> Future[Any]:
    """Call `function` with `keywords` in a thread that nobody has to wait for; a coroutine runs to its end in the shared loop."""
    future: Future[Any] = Future()
    loop = _loop()  # here, not in the thread: two threads would make two

    def work() -> None:
        try:
            result = function(**keywords)
            if inspect.isawaitable(result):
                result = asyncio.run_coroutine_threadsafe(_wait_for(result), loop).result()
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all coroutines, running in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable
