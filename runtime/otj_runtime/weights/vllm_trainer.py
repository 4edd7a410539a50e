"""The mailbox as a backend of vLLM's weight transfer: the trainer's half, for trainers that speak vLLM's interface.

    load_general_plugins()                                     as vLLM does: registers both halves under `otj_mailbox`
    engine = WeightTransferTrainerFactory.trainer_init(        on every rank; makes the mailbox, introduces it to the workers
        MailboxTrainerInitInfo(path=..., dtype="bfloat16", rank=rank), client=HTTPVLLMWeightSyncClient(url), source=ModuleSource(model))
    engine.send_weights()                                      on every rank, after each optimizer step

Our own trainer does without: it needs no vLLM, lets all ranks write, installs in one call and proves what it installed (`sync`). Here
rank 0 writes, as in vLLM's own backends, and what a trainer does around an update (pause, forget prefixes) is the trainer's business.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from otj_runtime.weights.errors import MailboxError
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.mailbox import MailboxWriter

BACKEND = "otj_mailbox"


@dataclass
class MailboxTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc]
    """How this trainer uses the mailbox.

    Attributes:
        path: of the file, in memory that the workers see under the same path.
        dtype: what the generator computes in, by torch's name.
        staging_bytes: what staging may take of a worker's GPU memory; None for as much as the weights have.
    """

    backend: ClassVar[str] = BACKEND

    path: str
    dtype: str
    staging_bytes: int | None = None


class MailboxTrainerEngine(TrainerWeightTransferEngine):  # type: ignore[misc]
    """Sends versions 1, 2, ... of a `WeightSource`; the generator's weights are named by them.

    Args:
        client: vLLM's way to the generator.
        source: the policy's tensors, the same names and shapes at every send.
        info: how it was asked for.

    Raises:
        MailboxError: if a tensor is not floating point, or there is no room for the mailbox.
    """

    init_info_cls = MailboxTrainerInitInfo

    def __init__(self, *, client: Any, source: Any, info: MailboxTrainerInitInfo) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self._version = 0
        self._writer: MailboxWriter | None = None
        if self.is_sender:
            self._writer = MailboxWriter.create(Path(info.path), _layout(source, getattr(torch, info.dtype)))
            client.init_weight_transfer_engine({"path": info.path, "staging_bytes": info.staging_bytes})

    @classmethod
    def trainer_init(cls, init_info: MailboxTrainerInitInfo, *, client: Any, source: Any = None) -> MailboxTrainerEngine:
        """The engine of this rank, ready to send.

        Raises:
            ValueError: without a source.
        """
        if source is None:
            raise ValueError("the mailbox sends all weights: give trainer_init a WeightSource, such as ModuleSource(model)")
        return cls(client=client, source=source, info=init_info)

    def send_weights(self) -> None:
        """Send the source's tensors. The workers stage them while they are written, and install them at the end, between two steps."""
        self._version += 1
        if self._writer is None:
            for _ in self.source:  # takes part in gathering them
                pass
            return
        ticket = self._writer.begin(self._version)
        self._open()
        self.client.update_weights(asdict(ticket))
        self._writer.write(ticket, self.source)
        self._writer.publish(ticket)
        self.client.finish_weight_update(weight_version=str(self._version))

    def _open(self) -> None:
        """Open an update; if one is open still, of a trainer that is gone or a send that failed, give that up first."""
        try:
            self.client.start_weight_update()
        except Exception:  # what a client raises is its own affair
            with suppress(Exception):  # the workers refuse it, which ends the update
                self.client.update_weights({"version": -1})
            self.client.start_weight_update()


def _layout(source: Any, dtype: torch.dtype) -> Layout:
    """Where the source's tensors go. On a machine with GPUs they are taken to lie there, as vLLM's own backends do."""
    metadata = source.metadata()
    if other := next((entry for entry in metadata if not entry.dtype.is_floating_point), None):
        raise MailboxError(f"parameter {other.name} is {other.dtype}: the mailbox carries floating point weights only")
    return Layout.of(((entry.name, tuple(entry.shape)) for entry in metadata), dtype, on_gpu=torch.cuda.is_available())
