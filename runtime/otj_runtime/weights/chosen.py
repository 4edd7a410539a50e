"""ChosenSync: finds out at the first push which way to the generator is possible, and takes it.

    candidate         by what was asked for, and by what `auto` can use: `pod.transfer.candidate`
    look              what each rank and each worker see of the GPUs -> `pod.transfer.settle`
    meet              NCCL's rendezvous, or the workers open the memory that the ranks lend; what fails here leaves the generator as it was
    push              of weights that are lent: a link that passes wrong bytes shows in their checksums
    mailbox           whatever of this does not succeed, with the reason in the status

The probe runs in the trainer, because it alone knows when both sides are up, and at the first push, because only then the generator must answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from otj_runtime.pod.transfer import Direct, Found, Sight, Transfer, candidate, fallback, settle
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.direct import DirectSync
from otj_runtime.weights.errors import MailboxError, WeightSyncFailed
from otj_runtime.weights.loan import gpu_uuid
from otj_runtime.weights.ranks import Ranks
from otj_runtime.weights.sync import SYNC_SECONDS, Proof, SyncReport, WeightSync


class Way(Protocol):
    """What a rank asks of a way to the generator."""

    @property
    def version(self) -> int | None: ...

    def push(self, version: int) -> SyncReport: ...

    def proven(self, version: int) -> Proof: ...

    def reinstall(self) -> None: ...


def own_sight(kind: Direct, device: torch.device) -> Sight:
    """What this rank sees. vLLM brings what asks the driver; without it, only a GPU that both sides are on can be found."""
    try:
        from otj_runtime.weights.vllm_devices import look
    except ModuleNotFoundError:
        if kind == "ipc":
            return Sight(device=gpu_uuid(device))
        raise
    return look(device)


class ChosenSync:
    """The training ranks' way to the generator's weights, once it is known. Every rank makes one.

    Args:
        wish: what was asked for: auto, nccl or ipc.
        mailbox: the way that is always possible; `ipc` is this one as well, with the weights lent.
        nccl: makes the way of vLLM's engine.
        model: the unwrapped policy.
        control: the generator.
        ready_timeout_s: how long the generator may take to start, in seconds.
        tell: takes the outcome, on rank 0, where it is not what was announced.
        look: what this rank sees of the GPUs.
    """

    def __init__(
        self,
        wish: str,
        *,
        mailbox: WeightSync,
        nccl: Callable[[], DirectSync],
        model: Any,
        control: GeneratorControl,
        ready_timeout_s: float,
        tell: Callable[[Transfer], None],
        look: Callable[[Direct, torch.device], Sight] = own_sight,
    ) -> None:
        self._wish = wish
        self._mailbox = mailbox
        self._nccl = nccl
        self._model = model
        self._control = control
        self._ready_timeout_s = ready_timeout_s
        self._tell = tell
        self._look = look
        self._ranks: Ranks | None = None
        self._way: Way | None = None

    @property
    def version(self) -> int | None:
        """The version that was pushed last; None before the first."""
        return None if self._way is None else self._way.version

    def push(self, version: int) -> SyncReport:
        """Bring the model's current weights into the generator as `version`; the first time, choose the way. Collective."""
        if self._way is None:
            self._way = self._choose()
        if not self._mailbox.lends:
            return self._way.push(version)
        try:
            return self._mailbox.push(version)
        except (WeightSyncFailed, MailboxError) as error:  # the same on every rank
            self._mailbox.take_back()
            self._announce(Transfer("mailbox", f"a push by ipc failed: {error}"))
        return self._mailbox.push(version)

    def proven(self, version: int) -> Proof:
        """See `WeightSync` and `DirectSync`. Collective."""
        return self._chosen("proof").proven(version)

    def reinstall(self) -> None:
        """See `WeightSync` and `DirectSync`."""
        self._chosen("reinstall").reinstall()

    def _chosen(self, phase: str) -> Way:
        if self._way is None:
            raise WeightSyncFailed(f"{phase}: nothing was pushed yet", phase=phase)
        return self._way

    def _choose(self) -> Way:
        device = next(self._model.parameters()).device
        kind = candidate(self._wish, room=self._wish != "auto" or self._mailbox.has_room(), on_gpu=device.type == "cuda")
        if kind is None:
            return self._mailbox
        self._ranks = ranks = Ranks(timeout_s=self._ready_timeout_s + SYNC_SECONDS)
        way: Way = self._mailbox
        try:
            transfer = settle(self._wish, kind, self._probe(ranks, kind, device))
            if transfer.kind == kind:
                way = self._open(kind)
            elif self._wish == "auto" and kind == "ipc":  # GPUs of their own, as was announced
                return way
        except WeightSyncFailed as error:  # the same on every rank
            transfer = fallback(self._wish, kind, str(error))
        self._announce(transfer)
        return way

    def _announce(self, transfer: Transfer) -> None:
        if self._ranks is not None and self._ranks.rank == 0:
            self._tell(transfer)

    def _open(self, kind: Direct) -> Way:
        if kind == "ipc":
            self._mailbox.lend()
            return self._mailbox
        direct = self._nccl()
        direct.open()
        return direct

    def _probe(self, ranks: Ranks, kind: Direct, device: torch.device) -> Found:
        trainers = ranks.together(lambda: self._look(kind, device), phase="probe")

        def workers() -> tuple[Sight, ...]:
            self._control.wait_healthy(deadline_s=self._ready_timeout_s)
            return self._control.sights()

        return Found(trainers=tuple(trainers), workers=ranks.lead(workers, phase="probe"))
