"""WeightSync: brings the policy of the training ranks into the generator and proves that it arrived.

One push, on every rank at once:

    write                 each rank its share of the mailbox, cast to the generator's dtype
    barrier
    publish               rank 0; from here on rank 0 alone:
    init, pause           the generator freezes its requests
    start, update, finish(version), reset_prefix_cache
    resume
    probe                 scored by both sides and compared
    broadcast             every rank gets the report, or raises the error that rank 0 met

A push that fails is made once more from scratch, after the generator answers again: it may have died and started anew in the
meantime. The second failure is final. Between pushes, `recover` brings the same version back into a generator that was
restarted; the mailbox still holds it, so the trainer, which may have moved on, writes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from otj_runtime.api import DType
from otj_runtime.pod.errors import GeneratorLost, GeneratorNotReady
from otj_runtime.pod.names import SERVED_MODEL
from otj_runtime.weights.composed import PolicyTensor, whole
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.errors import MailboxError, WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.install import Phases, install, only_one
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.mailbox import MailboxWriter, Ticket
from otj_runtime.weights.probe import Agreement, TrainerScores, compare, prompt_sequences, random_sequences, trainer_scores
from otj_runtime.weights.ranks import Ranks
from otj_runtime.weights.tensors import is_sharded, policy_tensors, reshard, shares

logger = logging.getLogger(__name__)

RETURN_SECONDS = 600.0
"""How long a lost generator may take to answer again: kubelet's back-off plus the start of a large model."""

SYNC_SECONDS = 1800.0
"""How long a rank waits for rank 0 beyond the generator's start: two rounds with every phase near its deadline."""


@dataclass(frozen=True)
class SyncReport:
    """One finished sync.

    Attributes:
        version: policy version that the generator now serves.
        total_s: wall-clock seconds of all attempts.
        phases: seconds by phase, of rank 0, of the attempt that succeeded.
        bytes: bytes written by all ranks.
        agreement: what the probe found.
        attempts: 1, or 2 if the first failed.
    """

    version: int
    total_s: float
    phases: dict[str, float]
    bytes: int
    agreement: Agreement
    attempts: int

    @property
    def metrics(self) -> dict[str, float]:
        """The report as metrics by name; the total without the wait for a generator that was still starting."""
        return {
            "sync/total_s": self.total_s - self.phases.get("wait", 0.0),
            "sync/bytes": float(self.bytes),
            "sync/attempts": float(self.attempts),
            "sync/max_abs_logprob_diff": self.agreement.max_abs,
            "sync/mean_logprob_diff": self.agreement.mean,
            "sync/logprob_diff_bound": self.agreement.bound,
            **{f"sync/{name}_s": seconds for name, seconds in self.phases.items()},
        }


@dataclass(frozen=True)
class _Pushed:
    """What this run brought into the generator last: enough to do it again, and to prove it, without the trainer's weights."""

    version: int
    scores: TrainerScores


class WeightSync:
    """The training ranks' way to the generator's weights. Every rank makes one.

    Args:
        model: the unwrapped policy, a transformers causal language model.
        directory: folder of the mailbox, in memory that the generator sees under the same path.
        control: the generator.
        dtype: what the generator computes in.
        ready_timeout_s: how long the generator may take to start, in seconds.
        prompts: token ids of prompts of the run, the same on every rank, for the probe; without any, it is made of random tokens.
    """

    def __init__(
        self,
        *,
        model: Any,
        directory: Path,
        control: GeneratorControl,
        dtype: DType,
        ready_timeout_s: float = RETURN_SECONDS,
        prompts: Iterable[list[int]] = (),
    ) -> None:
        self._model = model
        self._path = directory / f"{SERVED_MODEL}.mailbox"
        self._control = control
        self._dtype = DType(dtype)
        self._ready_timeout_s = ready_timeout_s
        self._sequences = prompt_sequences(prompts) or random_sequences(model.config.get_text_config().vocab_size)
        self._ranks: Ranks | None = None
        self._writer: MailboxWriter | None = None
        self._pushed: _Pushed | None = None

    @property
    def version(self) -> int | None:
        """The version that was pushed last; None before the first."""
        return None if self._pushed is None else self._pushed.version

    def push(self, version: int) -> SyncReport:
        """Bring the model's current weights into the generator as `version`. Collective.

        Raises:
            GeneratorNotReady: if the generator does not answer in time.
            WeightSyncFailed, MailboxError: if a phase failed twice; the text names it.
            WeightsDiverged: if the probe did not agree, twice.
        """
        began = time.monotonic()
        try:
            report, self._pushed = self._attempt(version, began, attempt=1)
        except (WeightSyncFailed, MailboxError, WeightsDiverged) as error:
            logger.warning("sync of policy version %d failed and is made again: %s", version, error)
            report, self._pushed = self._attempt(version, began, attempt=2)
        return report

    def reinstall(self) -> None:
        """Give a generator that was restarted the version that was pushed last. Not collective: any rank may ask, at any time.

        Returns at once if the generator serves that version already.

        Raises:
            GeneratorLost: if it does not come back in time.
            WeightSyncFailed, MailboxError, WeightsDiverged: if the version cannot be installed, or does not prove right.
        """
        pushed = self._pushed
        if pushed is None:
            raise WeightSyncFailed("reinstall: nothing was pushed yet", phase="reinstall")
        with only_one(self._path.with_suffix(".lock"), deadline_s=2 * RETURN_SECONDS):
            try:
                self._control.wait_healthy(deadline_s=RETURN_SECONDS)
            except GeneratorNotReady as error:
                raise GeneratorLost(str(error)) from error
            if self._control.weight_version() != str(pushed.version):
                install(self._control, self._path, pushed.version, Phases())
                self._compare(pushed, self._control.score(self._sequences))

    def _attempt(self, version: int, began: float, *, attempt: int) -> tuple[SyncReport, _Pushed]:
        phases = Phases()
        ranks = self._connect()
        reshard(self._model)
        tensors = policy_tensors(self._model)
        sharded = is_sharded(tensors)
        with phases("write"):
            writer, ticket = self._begin(ranks, tensors, version)
            written = ranks.together(lambda: self._write(ranks, writer, ticket, tensors, sharded), phase="write")
        # The forward of a sharded model is collective, so all ranks score it; else rank 0 does below, while the others wait.
        scores = trainer_scores(self._model, self._sequences, self._dtype) if sharded else None
        reshard(self._model)

        def finish() -> tuple[SyncReport, _Pushed]:
            with phases("wait"):
                self._control.wait_healthy(deadline_s=self._ready_timeout_s)
            with phases("publish"):
                writer.publish(ticket)
            install(self._control, self._path, version, phases)
            with phases("probe"):
                pushed = _Pushed(version=version, scores=scores or trainer_scores(self._model, self._sequences, self._dtype))
                agreement = self._compare(pushed, self._control.score(self._sequences))
            total = time.monotonic() - began
            report = SyncReport(
                version=version, total_s=total, phases=phases.seconds, bytes=sum(written), agreement=agreement, attempts=attempt
            )
            return report, pushed

        return ranks.lead(finish, phase="install")

    def _connect(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(timeout_s=self._ready_timeout_s + SYNC_SECONDS)
        return self._ranks

    def _begin(self, ranks: Ranks, tensors: dict[str, PolicyTensor], version: int) -> tuple[MailboxWriter, Ticket]:
        """The writer of this rank and the ticket of all. The file is made by rank 0, at the first push."""
        layout = Layout.of(((name, tuple(tensor.shape)) for name, tensor in tensors.items()), getattr(torch, self._dtype))

        def draw() -> Ticket:
            if self._writer is None:
                self._writer = MailboxWriter.create(self._path, layout)
            return self._writer.begin(version)

        def follow() -> MailboxWriter:
            if self._writer is None:
                self._writer = MailboxWriter(self._path, layout)
            return self._writer

        ticket = ranks.lead(draw, phase="begin")
        ranks.together(lambda: follow() and None, phase="begin")
        return follow(), ticket

    def _write(self, ranks: Ranks, writer: MailboxWriter, ticket: Ticket, tensors: dict[str, PolicyTensor], sharded: bool) -> int:
        """Write this rank's share; return its bytes."""
        mine = set(shares(writer.layout.tensors, ranks=ranks.size)[ranks.rank])
        written = 0
        for name, tensor in tensors.items():
            if name in mine:
                written += writer.write(ticket, name, whole(tensor))
            elif sharded:
                whole(tensor)  # takes part in another rank's gathering
        return written

    def _compare(self, pushed: _Pushed, scores: list[list[float]]) -> Agreement:
        trained_in = DType(str(next(self._model.parameters()).dtype).removeprefix("torch."))
        return compare(pushed.scores, scores, sequences=self._sequences, version=pushed.version, dtypes={trained_in, self._dtype})
