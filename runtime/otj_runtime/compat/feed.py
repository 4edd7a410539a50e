"""Weights from a stream of named tensors into the pod's generator: what is left of a weight sync when the trainer is not ours.

    push(step, shapes, tensors)   mailbox: begin, write as they come, publish; generator: stages it, installs it
    prove(model, prompts)         both sides score the first prompts of the run, as after every sync of the built-in trainer
    faithfully(ask)               an answer that the pushed weights gave from beginning to end

One process has one, rank 0; the other ranks only take part in gathering the tensors, which is the script's trainer's business.
A generator that restarts in the middle serves dummy weights and answers 200. So its version is read before and after every
request, and if it is another than was pushed, the version in the mailbox is installed again and the request repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from otj_runtime.api import DType
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import GeneratorLost
from otj_runtime.pod.names import SERVED_MODEL
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.install import Installer, Phases
from otj_runtime.weights.layout import Layout, Ticket
from otj_runtime.weights.mailbox import MailboxWriter
from otj_runtime.weights.probe import TrainerScores, compare_all, prompt_sequences, trainer_scores

logger = logging.getLogger(__name__)

T = TypeVar("T")
Shapes = list[tuple[str, tuple[int, ...]]]

MAX_RECOVERIES = 5
"""Times that one request is repeated before the generator counts as lost."""


class Feed:
    """Rank 0's way to the generator.

    Args:
        config: the pod's configuration.
    """

    def __init__(self, config: PodConfig) -> None:
        self.url = config.generator_url
        self.ready_timeout_s = float(config.generator_ready_timeout_seconds)
        self.dtype = DType(config.generator_dtype)
        self.metrics: dict[str, float] = {}
        """Of the last push, by the built-in trainer's names."""
        self._path = Path(config.mailbox) / f"{SERVED_MODEL}.mailbox"
        self._control = GeneratorControl(config.generator_url, engines=config.generator_engines)
        self._installer = Installer(self._control, self._path)
        self._ticket: Ticket | None = None
        self._writer: MailboxWriter | None = None
        self._version: int | None = None
        self._syncs = 0

    def push(self, version: int, shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Bring `tensors` into the generator as `version`.

        Args:
            shapes: name and shape of every tensor; the same at every push.
            tensors: the tensors themselves, each used before the next is asked for.

        Raises:
            WeightSyncFailed, MailboxError: if a phase failed twice; the text names it.
        """
        began, phases = time.monotonic(), Phases()
        with phases("write"):
            if self._writer is None:
                self._writer = MailboxWriter.create(self._path, Layout.of(shapes, getattr(torch, self.dtype)))
            ticket = self._writer.begin(version)
            written = self._writer.write(ticket, tensors)
        with phases("publish"):
            self._writer.publish(ticket)
        self._version, self._ticket = version, ticket
        try:
            self._installer.begin(ticket, phases)
            self._installer.end(ticket, self._writer.receipts, phases)
        except WeightSyncFailed as error:
            logger.warning("sync of policy version %d failed and is made again: %s", version, error)
            self._install_again()
        self._syncs += 1
        self.metrics = {
            "policy_version": float(version),
            "sync/count": float(self._syncs),
            "sync/bytes": float(written),
            "sync/total_s": time.monotonic() - began,
            **{f"sync/{name}_s": seconds for name, seconds in phases.seconds.items()},
        }

    def score(self, model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], TrainerScores]:
        """The probe made of `prompts`, and the trainer's scores of it. Collective if the model is sharded.

        Args:
            prompts: token ids.
        """
        sequences = prompt_sequences(prompts)
        return sequences, trainer_scores(model, sequences, self.dtype)

    def prove(self, sequences: list[list[int]], scores: TrainerScores, *, trained_in: DType) -> None:
        """Compare with the generator's scores.

        Raises:
            WeightsDiverged: if they are further apart than rounding explains.
        """
        assert self._version is not None
        found = self.faithfully(lambda: self._ask(sequences))
        agreement = compare_all(scores, found, sequences=sequences, version=self._version, dtypes={trained_in, self.dtype})
        self.metrics |= {"sync/max_abs_logprob_diff": agreement.max_abs, "sync/mean_logprob_diff": agreement.mean}
        self.metrics |= {"sync/logprob_diff_bound": agreement.bound}

    def _ask(self, sequences: list[list[int]]) -> list[list[list[float]]]:
        assert self._ticket is not None
        assert self._writer is not None
        return self._installer.scores(self._ticket, self._writer.receipts, sequences)

    def faithfully(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, given by the pushed weights from beginning to end.

        Raises:
            GeneratorLost: if the generator does not come back in time, or is lost again and again.
            Exception: what `ask` raised, if the generator serves the pushed weights nevertheless.
        """
        failure: Exception | None = None
        for _ in range(MAX_RECOVERIES + 1):
            if not self._current():
                self._install_again()
            try:
                answer = ask()
            except Exception as error:
                if self._current():
                    raise
                failure = error
                continue
            if self._current():
                return answer
        raise GeneratorLost(f"the generator was lost {MAX_RECOVERIES + 1} times in a row with policy version {self._version}: {failure}")

    def _current(self) -> bool:
        return self._version is None or self._control.weight_version() == str(self._version)

    def _install_again(self) -> None:
        assert self._version is not None
        self._control.wait_returned()
        if not self._current():
            assert self._ticket is not None
            assert self._writer is not None
            self._installer.again(self._ticket, self._writer.receipts)


def floating(metadata: Iterable[tuple[str, str, list[int]]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of TRL's announcement (name, dtype without `torch.`, shape).

    Raises:
        WeightSyncFailed: if a tensor is not floating point, which the mailbox does not carry (a quantized base model).
    """
    for name, dtype, shape in metadata:
        if not getattr(torch, dtype).is_floating_point:
            raise WeightSyncFailed(f"parameter {name} is {dtype}: a quantized model cannot be sent to the generator", phase="write")
        yield name, tuple(shape)
