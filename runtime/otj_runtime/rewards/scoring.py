"""Calls reward functions and checks what they return.

    prompts, completions, columns -> every function at once, each with the whole batch -> one number per function and completion
                                  -> weighted sums

A function is a user's code: it may raise, hang, or return anything; `calls` runs it with a deadline. Two consequences for authors:
timeouts made of signals (`signal.alarm`) do not work inside a reward, and functions of one job run at the same time.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from otj_runtime.pod.errors import RewardFailed
from otj_runtime.rewards.calls import start

log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""Called with `CALL_KEYWORDS`, the dataset's columns and `CONTEXT_KEYWORDS`, all by name; returns a number or None per completion, or a
coroutine of that. TRL's convention."""

CALL_KEYWORDS = ("prompts", "completions", "completion_ids")

CONTEXT_KEYWORDS = ("trainer_state", "log_extra", "log_metric", "group_ids")
"""What a call brings besides, for functions that name it or take any keyword: the trainer's state (None before training), two functions
that add a column to the table of completions or a number to the metrics, and which prompt of the batch each completion answers."""

REWARD_SECONDS = 60.0
"""How long one call, on a rank's whole batch, may take unless the reward says otherwise."""

DIAGNOSIS_SECONDS = 5.0
"""How long the search for the guilty sample may take after a call failed."""

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward function under the name that messages and metrics use, and the seconds that one call may take."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    timeout_s: float = REWARD_SECONDS


@dataclass(frozen=True)
class RewardTable:
    """What a batch earned.

    Attributes:
        scores: by function name and in the order of the completions; None where the function does not apply.
        totals: weighted sums over the functions that apply; NaN where none does, as in TRL: such a completion has no reward.
        extra: columns that functions added with `log_extra`, by name.
        metrics: means of the numbers that functions added with `log_metric`, by name.
    """

    scores: dict[str, list[float | None]]
    totals: list[float]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """Arguments of a call: `rows` all of one length, and what is not a list of rows. `extra` and `numbers` collect what is logged."""

    rows: dict[str, Sequence[Any]]
    trainer_state: Any = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows["completions"])

    def only(self, index: int) -> _Batch:
        return _Batch({name: values[index : index + 1] for name, values in self.rows.items()}, self.trainer_state)

    def keywords(self, function: RewardFunction) -> dict[str, Any]:
        """What `function` is called with."""
        offered = {**self.rows, "trainer_state": self.trainer_state, "log_extra": self._log_extra, "log_metric": self._log_metric}
        return {name: value for name, value in offered.items() if name not in CONTEXT_KEYWORDS or _takes(function, name)}

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra[column] = list(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.numbers.setdefault(name, []).append(float(value))

    def describe(self, index: int) -> str:
        """Sample `index` and the beginning of its completion."""
        completion = self.rows["completions"][index]
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        return f"sample {index}, completion {text[:EXCERPT_CHARACTERS]!r}{'...' if len(text) > EXCERPT_CHARACTERS else ''}"


class Rewards:
    """The reward functions of a run.

    Args:
        rewards: at least one; two of the same name are told apart by number.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self._rewards = dict(zip(_distinct([reward.name for reward in rewards]), rewards, strict=True))

    @property
    def names(self) -> list[str]:
        """Names of the functions, each once."""
        return list(self._rewards)

    def load(self) -> None:
        """Load what functions need before they can judge: the weights of reward models. It may take minutes, so it is no part of a step.

        Raises:
            RewardImportFailed: if a model cannot be loaded.
        """
        for reward in self._rewards.values():
            if (load := getattr(reward.function, "load", None)) is not None:
                load()

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        group_ids: Sequence[int] | None = None,
        trainer_state: Any = None,
    ) -> RewardTable:
        """Judge completions; all sequences have one entry per completion.

        Args:
            prompts: text or messages. The completion of messages reaches the functions as a message of the assistant.
            completions: decoded text.
            completion_ids: the tokens.
            columns: the dataset's other columns.
            group_ids: which prompt of the batch each completion answers. Default: each its own.
            trainer_state: for functions whose reward depends on the progress of training.

        Raises:
            RewardFailed: if a function raises, takes too long, or returns anything but one finite number or None per completion.
        """
        said = [_as_prompted(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        own = dict(zip(CALL_KEYWORDS, (prompts, said, completion_ids), strict=True))
        own["group_ids"] = range(len(said)) if group_ids is None else group_ids
        rows = {name: list(values) for name, values in columns.items() if name not in own and name not in CONTEXT_KEYWORDS}
        batch = _Batch(rows | {name: list(values) for name, values in own.items()}, trainer_state)
        if not len(batch):
            return RewardTable({name: [] for name in self._rewards}, [])
        scores = self._call_all(batch)
        totals = [self._total(batch, scores, index) for index in range(len(batch))]
        metrics = {name: math.fsum(values) / len(values) for name, values in batch.numbers.items()}
        return RewardTable(scores, totals, _complete(batch), metrics)

    def _call_all(self, batch: _Batch) -> dict[str, list[float | None]]:
        began = time.monotonic()
        calls = {name: start(reward.function, batch.keywords(reward.function)) for name, reward in self._rewards.items()}
        return {name: self._finish(name, call, batch, began) for name, call in calls.items()}

    def _finish(self, name: str, call: Future[Any], batch: _Batch, began: float) -> list[float | None]:
        reward = self._rewards[name]
        wait([call], timeout=max(0.0, began + reward.timeout_s - time.monotonic()))
        if not call.done():
            raise RewardFailed(
                f"reward {name} took longer than {reward.timeout_s:g} s for {len(batch)} completions ({_guilty(reward.function, batch)})"
            )
        if isinstance(error := call.exception(), RewardFailed):
            raise RewardFailed(f"reward {name}: {error}") from error
        if error is not None:
            what = f"{type(error).__name__}: {str(error)[:1000]}"
            raise RewardFailed(f"reward {name} raised {what} ({_guilty(reward.function, batch)})") from error
        return _checked(name, call.result(), batch)

    def _total(self, batch: _Batch, scores: dict[str, list[float | None]], index: int) -> float:
        found = [(reward.weight, scores[name][index]) for name, reward in self._rewards.items()]
        if all(score is None for _, score in found):
            log.warning("no reward applies to %s: nothing is learned from it", batch.describe(index))
            return math.nan
        return math.fsum(weight * score for weight, score in found if score is not None)


def _takes(function: RewardFunction, name: str) -> bool:
    """Whether `function` can be called with the keyword `name`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False  # some callables written in C have no signature
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _complete(batch: _Batch) -> dict[str, list[Any]]:
    """The columns that were logged, each checked to have one value per completion."""
    for name, values in batch.extra.items():
        if len(values) != len(batch):
            raise RewardFailed(f"log_extra got {len(values)} values of column {name} for {len(batch)} completions")
    return batch.extra


def _distinct(names: list[str]) -> list[str]:
    """The names, a repeated one with the number of its repetition."""
    return [name if names.index(name) == i else f"{name}#{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _as_prompted(prompt: Any, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _guilty(function: RewardFunction, batch: _Batch) -> str:
    """Which sample a failed call failed on, found by calling again with one sample at a time."""
    deadline = time.monotonic() + DIAGNOSIS_SECONDS
    for index in range(len(batch)):
        left = deadline - time.monotonic()
        if left < DIAGNOSIS_SECONDS / 5:
            return f"no single sample was found guilty among the first {index}; the next is {batch.describe(index)}"
        call = start(function, batch.only(index).keywords(function))
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
