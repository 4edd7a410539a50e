"""Built-in tasks: prompts with known answers, made by rule, each with the reward that judges them.

Training and held-out samples never meet, whatever the seed: a rule on the sample itself parts them.

    addition       "What is 3 + 4?", for a pretrained chat model. Held out are sums that are multiples of 4, so that an answer to one
                   has not been seen in training.
    copy, reverse  "abcd=" -> "abcd" or "dcba", for the tiny model. Held out is one string in as many as there are symbols.
    reasoning_gym/NAME  any task of that package; see `puzzles`.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from otj_runtime.data.puzzles import PREFIX, make_puzzles
from otj_runtime.data.tiny import SEPARATOR, SYMBOLS
from otj_runtime.pod.errors import DatasetInvalid

Sample = dict[str, Any]
"""A row: `prompt` (text, or messages with `role` and `content`) and the columns that rewards read."""

LARGEST_SUMMAND = 12

HELD_OUT_STRINGS = 64
HELD_OUT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows to train on, and rows kept for measuring."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: `make` takes the task's arguments by name, `reward` is the import path of a reward function."""

    make: Callable[..., Samples]
    reward: str


def addition(*, seed: int = 0) -> Samples:
    """All pairs of summands from 1 to 12; columns prompt (messages) and answer (int)."""
    held_out: list[Sample] = []
    train: list[Sample] = []
    for a, b in itertools.product(range(1, LARGEST_SUMMAND + 1), repeat=2):
        sample = {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": a + b}
        (held_out if (a + b) % 4 == 0 else train).append(sample)
    for samples in (train, held_out):
        random.Random(seed).shuffle(samples)
    return Samples(train=train, held_out=held_out)


def copy(*, length: int = 4, size: int = 2048, seed: int = 0, symbols: str = SYMBOLS) -> Samples:
    """`size` random strings of `length` symbols; columns prompt (the string and a separator) and answer (the string)."""
    return _strings(lambda text: text, length=length, size=size, seed=seed, symbols=symbols)


def reverse(*, length: int = 4, size: int = 2048, seed: int = 0, symbols: str = SYMBOLS) -> Samples:
    """As `copy`, but the answer is the string backwards."""
    return _strings(lambda text: text[::-1], length=length, size=size, seed=seed, symbols=symbols)


def _strings(answer: Callable[[str], str], *, length: int, size: int, seed: int, symbols: str) -> Samples:
    for name, value in (("length", length), ("size", size)):
        if value < 1:
            raise DatasetInvalid(f"dataset.args.{name}: {value} is too small; use at least 1")
    if len(set(symbols)) < 2 or len(set(symbols)) != len(symbols):
        raise DatasetInvalid(f"dataset.args.symbols: {symbols!r} must be at least two characters, each once")

    def samples(held_out: bool, seed: int, count: int) -> list[Sample]:
        texts = _random_strings(random.Random(seed), length=length, symbols=symbols)
        kept = (text for text in texts if _is_held_out(text, symbols) is held_out)
        return [{"prompt": text + SEPARATOR, "answer": answer(text)} for text in itertools.islice(kept, count)]

    return Samples(train=samples(False, seed, size), held_out=samples(True, HELD_OUT_SEED, HELD_OUT_STRINGS))


def _random_strings(source: random.Random, *, length: int, symbols: str) -> Iterator[str]:
    while True:
        yield "".join(source.choices(symbols, k=length))


def _is_held_out(text: str, symbols: str) -> bool:
    return sum(symbols.index(symbol) for symbol in text) % len(symbols) == 0


TASKS = {
    "addition": Task(make=addition, reward="otj_runtime.rewards.last_integer"),
    "copy": Task(make=copy, reward="otj_runtime.rewards.position_match"),
    "reverse": Task(make=reverse, reward="otj_runtime.rewards.position_match"),
}


def _puzzles(name: str, *, seed: int, **args: Any) -> Samples:
    train, held_out = make_puzzles(name, args, seed=seed)
    return Samples(train=train, held_out=held_out)


def find_task(name: str) -> Task:
    """The task `name`.

    Raises:
        DatasetInvalid: if there is none; the text lists those there are.
    """
    if name.startswith(PREFIX):
        return Task(make=partial(_puzzles, name), reward="otj_runtime.rewards.reasoning_gym")
    if name not in TASKS:
        close = get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise DatasetInvalid(f"dataset.task: there is no built-in task {name}; there are {', '.join(TASKS)} and {PREFIX}NAME{hint}")
    return TASKS[name]


def make_samples(name: str, args: dict[str, Any], *, seed: int) -> Samples:
    """The samples of task `name`; `args` are its arguments, and its seed is `seed` unless they have one.

    Raises:
        DatasetInvalid: if the task or an argument is unknown, or an argument has the wrong type or value.
    """
    task = find_task(name)
    if name.startswith(PREFIX):
        return task.make(**{"seed": seed} | args)  # its settings are the package's, which checks them
    known = inspect.signature(task.make).parameters
    for argument, value in args.items():
        if argument not in known:
            raise DatasetInvalid(f"dataset.args.{argument}: task {name} has no such argument; it has {', '.join(known)}")
        kind = type(known[argument].default)
        if type(value) is not kind:
            raise DatasetInvalid(f"dataset.args.{argument}: {value!r} is a {type(value).__name__}; task {name} wants {kind.__name__}")
    return task.make(**{"seed": seed} | args)
