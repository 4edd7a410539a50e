"""Calls reward functions and checks what they return.

    prompts, completions, columns -> every function at once, each with the whole batch -> one number per function and completion
                                  -> weighted sums

A function is a user's code: it may raise, hang, or return anything. Each call gets a thread of its own, so that a deadline can pass
while it hangs; the thread is left behind, and does not keep the process from ending. Two consequences for authors: timeouts made of
signals (`signal.alarm`) do not work inside a reward, and functions of one job run at the same time. Coroutines share one event
loop for the whole run, so that a client session kept between calls stays usable.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

from otj_runtime.pod.errors import RewardFailed

log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""Called with `CALL_KEYWORDS` and the dataset's columns, by name; a number or None per completion, or a coroutine of that."""

CALL_KEYWORDS = ("prompts", "completions", "completion_ids")

REWARD_SECONDS = 60.0
"""How long one call, on a rank's whole batch, may take."""

DIAGNOSIS_SECONDS = 5.0
"""How long the search for the guilty sample may take after a call failed."""

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward function under the name that messages use."""

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True)
class RewardTable:
    """What a batch earned.

    Attributes:
        scores: by function name and in the order of the completions; None where the function does not apply.
        totals: weighted sums over the functions that apply; 0 where none does.
    """

    scores: dict[str, list[float | None]]
    totals: list[float]


@dataclass(frozen=True)
class _Batch:
    """Arguments of a call, all of one length."""

    keywords: dict[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.keywords["completions"])

    def only(self, index: int) -> _Batch:
        return _Batch({name: values[index : index + 1] for name, values in self.keywords.items()})

    def describe(self, index: int) -> str:
        """Sample `index` and the beginning of its completion."""
        completion = self.keywords["completions"][index]
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        return f"sample {index}, completion {text[:EXCERPT_CHARACTERS]!r}{'...' if len(text) > EXCERPT_CHARACTERS else ''}"


class Rewards:
    """The reward functions of a run.

    Args:
        rewards: at least one; two of the same function are told apart by number.
        timeout_s: seconds that one call may take.
    """

    def __init__(self, rewards: Sequence[Reward], *, timeout_s: float = REWARD_SECONDS) -> None:
        self._rewards = dict(zip(_distinct([reward.name for reward in rewards]), rewards, strict=True))
        self._timeout = timeout_s

    @property
    def names(self) -> list[str]:
        """Names of the functions, each once."""
        return list(self._rewards)

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardTable:
        """Judge completions; all arguments have one entry per completion.

        Args:
            prompts: text or messages. The completion of messages reaches the functions as a message of the assistant.
            completions: decoded text.
            completion_ids: the tokens.
            columns: the dataset's other columns.

        Raises:
            RewardFailed: if a function raises, takes too long, or returns anything but one finite number or None per completion.
        """
        said = [_as_prompted(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        own = dict(zip(CALL_KEYWORDS, (prompts, said, completion_ids), strict=True))
        batch = _Batch({**{name: list(values) for name, values in columns.items() if name not in own}, **own})
        if not len(batch):
            return RewardTable({name: [] for name in self._rewards}, [])
        scores = self._call_all(batch)
        return RewardTable(scores, [self._total(batch, scores, index) for index in range(len(batch))])

    def _call_all(self, batch: _Batch) -> dict[str, list[float | None]]:
        deadline = time.monotonic() + self._timeout
        calls = {name: _start(reward.function, batch) for name, reward in self._rewards.items()}
        return {name: self._finish(name, call, batch, deadline) for name, call in calls.items()}

    def _finish(self, name: str, call: Future[Any], batch: _Batch, deadline: float) -> list[float | None]:
        function = self._rewards[name].function
        wait([call], timeout=max(0.0, deadline - time.monotonic()))
        if not call.done():
            raise RewardFailed(
                f"reward {name} took longer than {self._timeout:g} s for {len(batch)} completions ({_guilty(function, batch)})"
            )
        if (error := call.exception()) is not None:
            what = f"{type(error).__name__}: {str(error)[:1000]}"
            raise RewardFailed(f"reward {name} raised {what} ({_guilty(function, batch)})") from error
        return _checked(name, call.result(), batch)

    def _total(self, batch: _Batch, scores: dict[str, list[float | None]], index: int) -> float:
        found = [(reward.weight, scores[name][index]) for name, reward in self._rewards.items()]
        if all(score is None for _, score in found):
            log.warning("no reward applies to %s: it counts as 0", batch.describe(index))
        return math.fsum(weight * score for weight, score in found if score is not None)


def _distinct(names: list[str]) -> list[str]:
    """The names, a repeated one with the number of its repetition."""
    return [name if names.index(name) == i else f"{name}#{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _as_prompted(prompt: Any, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all asynchronous rewards, running in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def _start(function: RewardFunction, batch: _Batch) -> Future[Any]:
    """Call `function` in a thread that nobody has to wait for."""
    future: Future[Any] = Future()
    loop = _loop()  # here, not in the thread: two threads would make two

    def work() -> None:
        try:
            result = function(**batch.keywords)
            if inspect.isawaitable(result):
                result = asyncio.run_coroutine_threadsafe(_wait_for(result), loop).result()
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _guilty(function: RewardFunction, batch: _Batch) -> str:
    """Which sample a failed call failed on, found by calling again with one sample at a time."""
    deadline = time.monotonic() + DIAGNOSIS_SECONDS
    for index in range(len(batch)):
        left = deadline - time.monotonic()
        if left < DIAGNOSIS_SECONDS / 5:
            return f"no single sample was found guilty among the first {index}; the next is {batch.describe(index)}"
        call = _start(function, batch.only(index))
        wait([call], timeout=left)
        if not call.done():
            return f"alone, it does not return within {left:.0f} s on {batch.describe(index)}"
        if call.exception() is not None:
            return f"alone, it raises on {batch.describe(index)}"
    return f"it returns for each of the {len(batch)} samples alone; the first is {batch.describe(0)}"


def _checked(name: str, result: Any, batch: _Batch) -> list[float | None]:
    """`result` as one number or None per completion."""
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise RewardFailed(f"reward {name} returned a {type(result).__name__}, not a list of numbers ({batch.describe(0)})")
    values = list(result)
    if len(values) != len(batch):
        where = batch.describe(min(len(values), len(batch) - 1))
        raise RewardFailed(f"reward {name} returned {len(values)} values for {len(batch)} completions ({where})")
    return [_number(name, value, batch, index) for index, value in enumerate(values)]


def _number(name: str, value: Any, batch: _Batch, index: int) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise RewardFailed(f"reward {name} returned {value!r:.100}, no number, for {batch.describe(index)}") from None
    if not math.isfinite(number):
        raise RewardFailed(f"reward {name} returned {number} for {batch.describe(index)}: return None where the reward does not apply")
    return number
