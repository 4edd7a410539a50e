"""WeightSync: brings the policy of the training ranks into the generator, and proves that it arrived.

One push, on every rank at once:

    rank 0                                      every rank                              the generator's workers
    begin: empties a slot of the mailbox, or
    none where only changes are to be sent
    update: the workers may stage               write: its share, cast to the           stage what arrives, beside decoding
                                                generator's dtype
                                                barrier
    publish                                                                             check all checksums, give a receipt
    install                                                                             between two engine steps
    broadcast: every rank gets the report, or raises the error that rank 0 met
    update, for the version after this one                                              look out for its first bytes

Where trainer and generator share a GPU (`lend`), rank 0 writes nothing in the middle but checksums of the weights as they are, the workers read those
where they are, and the slot is written afterwards, beside decoding (`_keep`).

and the proof, off that path:

    checksums: the workers compare what they have installed with what they staged, beside decoding
    probe: threads of rank 0 ask the generator, beside decoding, and the trainer's own model, while its weights stay as they are
    proven(version)                             every rank waits for it, before it trains on anything that this version sampled

A push that fails is made once more from scratch, after the generator answers again: it may have died and started anew in the
meantime. A proof that fails is made once more after the same version was staged and installed again. The second failure is final.
Between pushes, `reinstall` brings the same version back into a generator that was restarted; the mailbox still holds it, so the trainer,
which may have moved on, writes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from otj_runtime.api import DType
from otj_runtime.pod.names import SERVED_MODEL
from otj_runtime.weights.composed import PolicyTensor, whole
from otj_runtime.weights.control import RETURN_SECONDS, GeneratorControl
from otj_runtime.weights.errors import MailboxError, WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.install import Installer, Phases, only_one
from otj_runtime.weights.layout import STEPS, Layout, Ticket
from otj_runtime.weights.loan import Handle, Lender, gpu_uuid, handles, lendable
from otj_runtime.weights.mailbox import MailboxWriter
from otj_runtime.weights.patch_write import PatchWrite
from otj_runtime.weights.probe import Agreement, Probe, TrainerScores
from otj_runtime.weights.ranks import Ranks
from otj_runtime.weights.tensors import is_sharded, policy_tensors, reshard, shares

logger = logging.getLogger(__name__)

DENSE_PUSHES = 16
"""Versions that are sent whole after one that had changed too much for a patch."""

SYNC_SECONDS = 1800.0
"""How long a rank waits for rank 0 beyond the generator's start: two rounds with every phase near its deadline."""


@dataclass(frozen=True)
class SyncReport:
    """One finished push.

    Attributes:
        version: policy version that the generator now serves.
        total_s: wall-clock seconds of all attempts.
        phases: seconds by phase, of rank 0, of the attempt that succeeded; `paused` is what generation stood still for.
        bytes: bytes written by all ranks.
        attempts: 1, or 2 if the first failed.
        patched: whether only what had changed was sent.
    """

    version: int
    total_s: float
    phases: dict[str, float]
    bytes: int
    attempts: int
    patched: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """The report as metrics by name; the total without the wait for a generator that was still starting."""
        total = self.total_s - self.phases.get("wait", 0.0)
        return {
            "sync/total_s": total,
            "sync/bytes": float(self.bytes),
            "sync/gb_per_s": self.bytes / 1e9 / max(total, 1e-9),
            "sync/attempts": float(self.attempts),
            "sync/patched": float(self.patched),
            **{f"sync/{name}_s": seconds for name, seconds in self.phases.items()},
        }


@dataclass(frozen=True)
class Proof:
    """What the probe of a version found.

    Attributes:
        agreement: how close both sides are.
        again: whether the version had to be installed a second time: what was sampled from it before is of unknown weights.
        waited_s: seconds that `proven` took.
    """

    agreement: Agreement
    again: bool
    waited_s: float = 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """The proof as metrics by name."""
        return {
            "sync/max_abs_logprob_diff": self.agreement.max_abs,
            "sync/mean_logprob_diff": self.agreement.mean,
            "sync/logprob_diff_bound": self.agreement.bound,
            "sync/proof_wait_s": self.waited_s,
        }


class WeightSync:
    """The training ranks' way to the generator's weights. Every rank makes one.

    Args:
        model: the unwrapped policy, a transformers causal language model.
        directory: folder of the mailbox, in memory that the generator sees under the same path.
        control: the generator.
        dtype: what the generator computes in.
        ready_timeout_s: how long the generator may take to start, in seconds.
        prompts: token ids of prompts of the run, the same on every rank, for the probe; without any, it is made of random tokens.
        staging_bytes: what staging may take of the generator's GPU memory; None for as much as the weights have.
        delta: send what changed since the version before, where that is less.

    Raises:
        ValueError: if `delta` and `staging_bytes` are given both: a patch goes on top of a whole version.
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
        staging_bytes: int | None = None,
        delta: bool = False,
    ) -> None:
        if delta and staging_bytes is not None:
            raise ValueError("delta goes without staging_bytes: a patch is applied to a whole version, so all of it must be staged")
        self._model = model
        self._path = directory / f"{SERVED_MODEL}.mailbox"
        self._control = control
        self._installer = Installer(control, self._path, staging_bytes)
        self._dtype = DType(dtype)
        self._ready_timeout_s = ready_timeout_s
        self._probe = Probe(model, prompts, self._dtype)
        self._ranks: Ranks | None = None
        self._writer: MailboxWriter | None = None
        self._delta = delta
        self._patches: PatchWrite | None = None
        self._whole_for = 1  # pushes that are sent whole before a patch is tried
        self._lender: Lender | None = None
        self._kept: Future[None] | None = None  # rank 0 only: the slot's copy of what was lent
        self._pushed: Ticket | None = None
        self._scored: Future[TrainerScores] | None = None  # rank 0 only, as the next
        self._asked: Future[list[list[list[float]]]] | None = None
        self._proof: Proof | None = None
        self._talking: Future[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="otj-sync")
        self._answered = False

    @property
    def version(self) -> int | None:
        """The version that was pushed last; None before the first."""
        return None if self._pushed is None else self._pushed.version

    def has_room(self) -> bool:
        """Whether the shared memory has room for the mailbox. Collective."""
        ranks = self._connect()
        layout = self._layout(ranks)
        return ranks.lead(lambda: MailboxWriter.fits(self._path, layout), phase="begin")

    def lend(self) -> None:
        """From now on let the workers read the weights where this and the other ranks have them. Collective, before the first push.

        Raises:
            GeneratorNotReady: if the generator does not answer in time.
            WeightSyncFailed: on every rank, if one cannot lend its weights or a worker cannot read them; all is as before.
        """
        ranks = self._connect()

        def offer() -> tuple[str, list[Handle]]:
            tensors = lendable(policy_tensors(self._model))
            return gpu_uuid(tensors[0].device), handles(tensors)

        def introduce() -> None:
            self._open_writer(ranks)
            self._control.wait_healthy(deadline_s=self._ready_timeout_s)
            self._installer.introduce()

        loan: dict[str, list[Handle]] = {}
        for device, offered in ranks.together(offer, phase="lend"):
            loan.setdefault(device, offered)
        self._installer.loan = loan  # on every rank: any may have to introduce it again
        try:
            ranks.lead(introduce, phase="lend")
        except WeightSyncFailed:
            self.take_back()
            raise

    @property
    def lends(self) -> bool:
        """Whether the workers read the weights where the ranks have them."""
        return self._installer.loan is not None

    def take_back(self) -> None:
        """Lend nothing any more: from now on everything goes through the mailbox. On every rank."""
        self._installer.loan = None
        self._installer.forget()

    def push(self, version: int) -> SyncReport:
        """Bring the model's current weights into the generator as `version`. Collective.

        Raises:
            GeneratorNotReady: if the generator does not answer in time.
            WeightSyncFailed, MailboxError: if a phase failed twice; the text names it.
        """
        began = time.perf_counter()
        try:
            return self._attempt(version, began, attempt=1)
        except (WeightSyncFailed, MailboxError) as error:
            logger.warning("sync of policy version %d failed and is made again: %s", version, error)
            self._installer.forget()
            self._answered = False
            self._whole_for = 1
            return self._attempt(version, began, attempt=2)

    def proven(self, version: int) -> Proof:
        """Return when checksums and probe have shown that the generator serves `version`, the one pushed last. Collective.

        To be called before the model's weights change.

        Raises:
            WeightsDiverged: if a checksum or the probe did not agree, and not after a second installation either.
            WeightSyncFailed, MailboxError, GeneratorLost: if the generator could not be asked, or installed again.
        """
        pushed = self._pushed
        if pushed is None or pushed.version != version:
            raise WeightSyncFailed(f"proof: version {version} is not the one that was pushed last", phase="proof")
        if self._proof is None:
            began = time.perf_counter()
            proof = self._connect().lead(lambda: self._prove(pushed), phase="proof")
            self._proof = replace(proof, waited_s=time.perf_counter() - began)
        return self._proof

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
            self._control.wait_returned()
            if self._control.weight_version() != str(pushed.version):
                self._install_again(pushed)
                found = self._ask(pushed)
                if self._scored is not None:
                    self._compare(pushed, found)

    # -- the push --------------------------------------------------------------------------------------------------------------

    def _attempt(self, version: int, began: float, *, attempt: int) -> SyncReport:
        phases = Phases()
        ranks = self._connect()
        with phases("begin"):
            writer, ticket = self._begin(ranks, version, phases)
        opening = self._later(self._installer.begin, ticket, phases) if ranks.rank == 0 else None
        with phases("write"):
            reshard(self._model)
            tensors = policy_tensors(self._model)
            written = self._write(ranks, writer, ticket, tensors)
            if written is None:  # the patch is no use
                ticket = ranks.lead(lambda: writer.begin(version), phase="begin")
                opening = self._later(self._installer.instead, ticket, phases) if opening is not None else None
                written = self._write(ranks, writer, ticket, tensors)
            assert written is not None
            scores = None
            if is_sharded(tensors.values()):  # its forward takes all ranks
                scores = self._probe.score()
                reshard(self._model)

        def finish() -> SyncReport:
            if opening is not None:
                opening.result()
            with phases("publish"):
                writer.publish(ticket)
            self._installer.end(ticket, writer.receipts, phases)
            total = time.perf_counter() - began
            return SyncReport(version, total, phases.seconds, sum(written), attempt, patched=ticket.steps > 0)

        report = ranks.lead(finish, phase="install")
        self._pushed, self._proof = replace(ticket, lent=False), None
        if ranks.rank == 0:
            if ticket.lent:
                self._kept = self._threads.submit(self._keep, writer, self._pushed)
            self._scored = self._threads.submit(lambda: scores or self._probe.score())
            self._asked = self._threads.submit(self._ask, ticket)
            if self._delta:  # the next version may be a patch or whole, and is not known to be either before it is drawn
                self._later(self._installer.open)
            else:
                self._later(self._installer.expect, writer.following(ticket))
        return report

    def _later(self, action: Callable[..., None], *arguments: Any) -> Future[None]:
        """Let a thread talk to the generator: one at a time, in order."""
        before = self._talking

        def act() -> None:
            if before is not None:
                before.exception()
            action(*arguments)

        self._talking = self._threads.submit(act)
        return self._talking

    def _connect(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(timeout_s=self._ready_timeout_s + SYNC_SECONDS)
        return self._ranks

    def _begin(self, ranks: Ranks, version: int, phases: Phases) -> tuple[MailboxWriter, Ticket]:
        """The writer of this rank and the ticket of all. Rank 0 makes the file at first."""

        def draw() -> Ticket:
            self._settle_kept()
            made = self._open_writer(ranks)
            if not self._answered:
                with phases("wait"):
                    self._control.wait_healthy(deadline_s=self._ready_timeout_s)
                self._answered = True
            if self.lends:
                return made.begin_lent(version)
            if self._whole_for or self._pushed is None or self._pushed.steps == STEPS:
                return made.begin(version)
            return made.begin_patch(version)

        def follow() -> MailboxWriter:
            if self._writer is None:
                self._writer = MailboxWriter(self._path, self._layout(ranks))
            return self._writer

        ticket = ranks.lead(draw, phase="begin")
        if ranks.size > 1:
            ranks.together(lambda: follow() and None, phase="begin")
        return follow(), ticket

    def _open_writer(self, ranks: Ranks) -> MailboxWriter:
        """Rank 0's writer, which makes the file at first."""
        if self._writer is None:
            self._writer = MailboxWriter.create(self._path, self._layout(ranks))
        return self._writer

    def _layout(self, ranks: Ranks) -> Layout:
        """The layout of the model's tensors, which stay the same from one version to the next."""
        reshard(self._model)
        shapes = ((name, tuple(tensor.shape)) for name, tensor in policy_tensors(self._model).items())
        on_gpu = next(self._model.parameters()).device.type == "cuda"
        return Layout.of(shapes, getattr(torch, self._dtype), on_gpu=on_gpu, regions=ranks.size if self._delta else 0)

    def _write(self, ranks: Ranks, writer: MailboxWriter, ticket: Ticket, tensors: dict[str, PolicyTensor]) -> list[int] | None:
        """Write this rank's share; return the bytes of each rank, None if the version cannot be a patch."""
        if ticket.lent:
            ranks.together(lambda: self._settle_lent(writer, tensors), phase="write")
            lender = self._lender
            assert lender is not None
            return [ranks.lead(lambda: lender.lend(ticket), phase="write")]
        share = self._share(ranks, writer, tensors, is_sharded(tensors.values()))
        if not self._delta:
            return ranks.together(lambda: writer.write(ticket, share), phase="write")
        if self._patches is None:
            self._patches = PatchWrite(writer, ranks.rank)
        patches = self._patches
        if ticket.steps:
            found = ranks.together(lambda: patches.write(ticket, share), phase="write")
            written = [size for size in found if size is not None]
            if len(written) == ranks.size:
                return written
            # On a log that is empty the changes are too many, and will be; on another they may fit next time.
            self._whole_for = DENSE_PUSHES if ticket.steps == 1 else 1
            return None
        self._whole_for = max(self._whole_for - 1, 0)
        return ranks.together(lambda: writer.write(ticket, patches.remember(ticket, share)), phase="write")

    def _settle_lent(self, writer: MailboxWriter, tensors: dict[str, PolicyTensor]) -> None:
        """Make sure that this rank's tensors are where they were lent, and final."""
        found = lendable(tensors)
        if self._lender is None:
            self._lender = Lender(writer, found)
        self._lender.settle(found)

    def _keep(self, writer: MailboxWriter, ticket: Ticket) -> None:
        """Write what was lent into its slot. The weights stay as they are until it is proven, and that waits for this."""
        tensors = policy_tensors(self._model)
        device = next(self._model.parameters()).device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):  # not behind what the trainer asks for meanwhile
            writer.write(ticket, ((name, whole(tensor)) for name, tensor in tensors.items()))
        writer.publish(ticket)

    def _settle_kept(self) -> None:
        """Wait for the copy of what was lent last. Rank 0 only; the others have none."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.result()

    def _share(
        self, ranks: Ranks, writer: MailboxWriter, tensors: dict[str, PolicyTensor], sharded: bool
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """What this rank writes, in the model's order."""
        mine = set(shares(writer.layout.tensors, ranks=ranks.size)[ranks.rank]) if ranks.size > 1 else tensors.keys()
        for name, tensor in tensors.items():
            if name in mine:
                yield name, whole(tensor)
            elif sharded:
                whole(tensor)  # takes part in another rank's gathering

    # -- the proof -------------------------------------------------------------------------------------------------------------

    def _prove(self, pushed: Ticket) -> Proof:
        try:
            self._settle_kept()
        except Exception as error:
            logger.warning("policy version %d could not be kept in the mailbox, it is written once more: %s", pushed.version, error)
            assert self._writer is not None
            self._keep(self._writer, pushed)
        if self._asked is not None:
            asked, self._asked = self._asked, None
            try:
                return Proof(agreement=self._compare(pushed, asked.result()), again=False)
            except (WeightSyncFailed, WeightsDiverged) as error:
                logger.warning("proof of policy version %d failed, it is installed again: %s", pushed.version, error)
        with only_one(self._path.with_suffix(".lock"), deadline_s=2 * RETURN_SECONDS):
            self._control.wait_returned()
            self._install_again(pushed)
        return Proof(agreement=self._compare(pushed, self._ask(pushed)), again=True)

    def _ask(self, pushed: Ticket) -> list[list[list[float]]]:
        assert self._writer is not None
        return self._installer.scores(pushed, self._writer.receipts, self._probe.sequences)

    def _install_again(self, ticket: Ticket) -> None:
        assert self._writer is not None
        if self._talking is not None:
            self._talking.exception()  # what it says of the next version would end what is staged here
        self._installer.again(ticket, self._writer.receipts)

    def _compare(self, pushed: Ticket, scores: list[list[list[float]]]) -> Agreement:
        assert self._scored is not None
        return self._probe.compare(self._scored.result(), scores, version=pushed.version)
