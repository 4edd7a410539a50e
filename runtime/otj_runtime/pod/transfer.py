"""Which way the weights take to the generator, and why. Facts in, a choice with its reason out; the only file is the note of it.

`choose` decides from the pod's configuration alone, so that trainer and launcher agree before either has seen a device. `ipc` and `nccl`
depend on what the two sides can see, which `settle` judges once the generator answers; the launcher then reads the outcome from a note that rank 0
leaves in the run directory.

`ipc` is the best where it is possible: the weights pass the host by. Else shared memory is preferred wherever it has room: it needs no access from one
GPU to the other, and stages beside decoding. vLLM's `nccl` takes the model apart, receives and loads it while nothing is generated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from otj_runtime.api import Device, DType
from otj_runtime.pod.config import PodConfig

SMALL_STEPS = 1e-6
"""Learning rate at which about one bfloat16 weight of a hundred changes in a step; more than one of 16 are not sent as deltas."""

Direct = Literal["nccl", "ipc"]
"""Ways that pass the host by: vLLM's own, and by memory that the trainer lends to the generator."""

NOTE = "transfer.json"
LONGEST = 200
"""Characters of a reason: the status takes 256 with the choice and its speed."""


@dataclass(frozen=True)
class Transfer:
    """A choice. `reason` is for people."""

    kind: Literal["mailbox", "delta", "adapter", "nccl", "ipc"]
    reason: str

    def describe(self, gb_per_s: float | None) -> str:
        """The choice with its measured speed, for the status."""
        speed = "" if gb_per_s is None else f", {gb_per_s:.3g} GB/s"
        reason = self.reason if len(self.reason) <= LONGEST else self.reason[: LONGEST - 3] + "..."
        return f"{self.kind}{speed}: {reason}"

    def write(self, directory: Path) -> None:
        """Leave the choice for the launcher, whole or not at all."""
        draft = directory / f".{NOTE}"
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(directory / NOTE)

    @classmethod
    def read(cls, directory: Path) -> Transfer | None:
        """The choice that was left in `directory`; None if none was."""
        try:
            return cls(**json.loads((directory / NOTE).read_text()))
        except FileNotFoundError:
            return None


def choose(config: PodConfig) -> Transfer:
    """What goes to the generator after each step; `nccl` and `ipc` only until `settle` has seen both sides."""
    if config.adapter is not None:
        return Transfer("adapter", "lora.sync is adapter")
    if config.weight_transfer == "delta":
        return Transfer("delta", "asked for; everything is sent whole where that is safer, or less")
    if config.weight_transfer == "mailbox":
        return Transfer("mailbox", "asked for")
    if config.weight_transfer == "nccl" or config.weight_transfer == "ipc":
        return Transfer(config.weight_transfer, "asked for; tried at the first sync, else the mailbox")
    if config.device is Device.CPU:
        return Transfer("mailbox", "both sides compute on CPUs and share memory")
    own = "trainer and generator have GPUs of their own, and shared memory needs no access from one to the other"
    rate = config.training.get("learning_rate", SMALL_STEPS)  # neither method's default is higher
    if not config.script and config.generator_dtype is not DType.FLOAT32 and isinstance(rate, (int, float)) and rate <= SMALL_STEPS:
        return Transfer(
            "mailbox", f"{own}; weightTransfer: delta sends less at this learning rate, for a copy of the weights in GPU memory"
        )
    return Transfer("mailbox", own)


@dataclass(frozen=True)
class Sight:
    """What one process can see.

    Attributes:
        device: UUID of the GPU that it computes on; empty on a CPU.
        listed: UUIDs of all GPUs that its driver lists, those that CUDA_VISIBLE_DEVICES hides included.
        peers: of these, the ones whose memory its own GPU may map.
    """

    device: str
    listed: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What both sides can see: the training ranks in order, and every worker of the generator."""

    trainers: tuple[Sight, ...]
    workers: tuple[Sight, ...]


def candidate(wish: str, *, room: bool, on_gpu: bool) -> Direct | None:
    """What is worth a probe; None for the mailbox.

    Args:
        wish: what was asked for; `auto` turns to `nccl` only where the mailbox, which `ipc` keeps its copy in, does not fit.
        room: whether it does.
        on_gpu: whether the trainer computes on one.
    """
    match wish:
        case "ipc":
            return "ipc"
        case "nccl":
            return "nccl"
        case "auto" if not room:
            return "nccl"
        case "auto" if on_gpu:
            return "ipc"
        case _:
            return None


def settle(wish: str, kind: Direct, found: Found) -> Transfer:
    """The way after a look at both sides: `kind` if nothing stands against it, else the mailbox."""
    against = hindrance(kind, found)
    if against is None:
        return Transfer(kind, "; ".join(filter(None, [_because(wish, kind), _possible(kind, found)])))
    return fallback(wish, kind, against)


def fallback(wish: str, kind: Direct, against: str) -> Transfer:
    """The mailbox, because `against` speaks against `kind`."""
    because = _because(wish, kind)
    return Transfer("mailbox", f"{because}, but {kind} is not possible: {against}" if because else f"{kind} is not possible: {against}")


def hindrance(kind: Direct, found: Found) -> str | None:
    """What stands against `kind`; None if nothing that can be seen does."""
    lead, own = found.trainers[0], {trainer.device for trainer in found.trainers}
    if not all(sight.device for sight in (*found.trainers, *found.workers)):
        return "it goes from GPU to GPU, and one side computes on a CPU"
    for worker in found.workers:
        if kind == "ipc" and worker.device in own:
            continue
        if worker.device == lead.device:
            return f"rank 0 and the generator are both on GPU {lead.device}, and NCCL wants one each; ipc is for that"
        if not lead.listed:
            return "the trainer cannot ask its driver which GPUs it reaches: that takes vLLM beside it"
        if worker.device not in lead.listed:
            return f"the trainer's container does not see the generator's GPU {worker.device}"
        if lead.device not in worker.listed:
            return f"the generator's container does not see the trainer's GPU {lead.device}"
        if worker.device not in lead.peers:
            return f"GPU {lead.device} has no peer access to GPU {worker.device}"
        if kind == "ipc" and lead.device not in worker.peers:
            return f"GPU {worker.device} has no peer access to GPU {lead.device}"
    return None


def _because(wish: str, kind: Direct) -> str:
    if wish != "auto":
        return f"{wish} was asked for"
    return "the mailbox has no room in the shared memory" if kind == "nccl" else ""


def _possible(kind: Direct, found: Found) -> str:
    if kind == "nccl":
        return f"each side sees the other's GPU, with peer access to {len(found.workers)}"
    own = {trainer.device for trainer in found.trainers}
    if all(worker.device in own for worker in found.workers):
        return "trainer and generator share their GPU, and the weights are read where the trainer has them"
    return "the generator's GPU may map the trainer's memory, and reads the weights there"
