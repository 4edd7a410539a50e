"""Which device generates on a bare machine: pure, so that every rank and every test finds the same.

The machine's GPUs, as the ranks see them, are numbered 0..count-1, and local rank r trains on GPU r. `vllm_device="auto"` is the first GPU
after those. The messages give the advice of the manual that users know from TRL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CUDA = re.compile(r"cuda:(\d+(?:,\d+)*)")

CPU = "cpu"
AUTO = "auto"


@dataclass(frozen=True)
class Placement:
    """Where the generator runs.

    Attributes:
        gpus: numbers of its GPUs as the ranks see them; empty on a CPU.
        shared: those that train as well.
    """

    gpus: tuple[int, ...]
    shared: tuple[int, ...] = ()


def place_generator(wish: str, *, training_ranks: int, gpus: int, on_cpu: bool) -> Placement:
    """The device that `wish`, a `vllm_device`, means.

    Args:
        wish: `auto`, `cpu`, `cuda:K`, or `cuda:K,L` for a model spread over several.
        training_ranks: ranks that train on this machine.
        gpus: GPUs that a rank sees.
        on_cpu: whether the ranks train on the CPU.

    Raises:
        ValueError: if there is no such device, with the fix.
    """
    if wish == CPU or (wish == AUTO and on_cpu):
        return Placement(())
    if wish == AUTO and gpus < 2:
        raise ValueError(
            f"use_vllm=True needs at least two GPUs, one that generates and one that trains; there {'is 1' if gpus == 1 else f'are {gpus}'}. "
            'Set use_vllm=False, or share one GPU: vllm_device="cuda:0" with a vllm_gpu_memory_utilization that leaves room for training'
        )
    chosen = (training_ranks,) if wish == AUTO else _parse(wish)
    missing = [gpu for gpu in chosen if gpu >= gpus]
    if missing:
        raise ValueError(_unavailable(missing[0], gpus))
    training = range(0 if on_cpu else training_ranks)
    return Placement(chosen, shared=tuple(gpu for gpu in chosen if gpu in training))


def _parse(wish: str) -> tuple[int, ...]:
    match = _CUDA.fullmatch(wish)
    if match is None:
        raise ValueError(f'vllm_device: {wish!r} is no device; use "auto", "cpu", "cuda:K", or "cuda:K,L" for several GPUs')
    return tuple(dict.fromkeys(int(number) for number in match[1].split(",")))


def _unavailable(gpu: int, gpus: int) -> str:
    if gpus < 2:
        return f"the requested device for vLLM (cuda:{gpu}) is not available: this machine shows {gpus} GPU{'s' * (gpus != 1)}"
    return (
        f"the requested device for vLLM (cuda:{gpu}) is not available: there are {gpus} GPUs. You are likely training on all of them. Set "
        "--num_processes to less than the number of GPUs of the machine; reducing it by one is enough. "
        f"In your case: --num_processes {gpus - 1}"
    )


def visible_devices(placement: Placement, *, inherited: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of the generator, whose numbers are the machine's.

    Args:
        inherited: the variable of this process, which renumbers the machine's GPUs.
    """
    names = [name.strip() for name in inherited.split(",")] if inherited else None
    return ",".join(names[gpu] if names else str(gpu) for gpu in placement.gpus)


def shared_warning(placement: Placement) -> str | None:
    """What to tell a user whose generator shares a GPU with training; None if it has its own."""
    if not placement.shared:
        return None
    return (
        f"the requested device cuda:{placement.shared[0]} is also used for training. For speed, and not to run out of memory, give vLLM a device "
        "of its own. If this is what you want, lower vllm_gpu_memory_utilization until both fit"
    )
