"""Which GPUs a process can see and reach, asked of the driver. Worker and trainer both use it, so that their answers compare.

The driver is asked, not CUDA: a GPU that CUDA_VISIBLE_DEVICES hides is out of CUDA's reach but not of NCCL's, and one that the container
does not have is in neither's. The binding of NVML is the one that vLLM brings, loaded without vLLM, which would take seconds and change the
environment of a process that trains; without a driver nothing is listed.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from otj_runtime.pod.transfer import Sight
from otj_runtime.weights.loan import gpu_uuid


def _binding() -> Any:
    """vLLM's pynvml.

    Raises:
        ModuleNotFoundError: if there is no vLLM.
    """
    found = find_spec("vllm")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'vllm'")
    spec = spec_from_file_location("otj_pynvml", Path(found.origin).parent / "third_party" / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # it looks itself up there
    spec.loader.exec_module(module)
    return module


pynvml = _binding()

_READ = 0  # NVML_P2P_CAPS_INDEX_READ; the binding has a tuple there by mistake


def look(device: torch.device) -> Sight:
    """What this process sees, which computes on `device`."""
    if device.type != "cuda":
        return Sight(device="")
    own = gpu_uuid(device)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return Sight(device=own)
    try:
        return _ask(own)
    finally:
        pynvml.nvmlShutdown()


def _ask(own: str) -> Sight:
    handles: dict[str, Any] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):  # listed, but not this container's to use
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            handles[_plain(pynvml.nvmlDeviceGetUUID(handle))] = handle
    return Sight(
        device=own, listed=tuple(handles), peers=tuple(other for other in handles if other != own and _reaches(handles, own, other))
    )


def _reaches(handles: dict[str, Any], own: str, other: str) -> bool:
    if own not in handles:
        return False
    try:
        return bool(pynvml.nvmlDeviceGetP2PStatus(handles[own], handles[other], _READ) == pynvml.NVML_P2P_STATUS_OK)
    except pynvml.NVMLError:
        return False


def _plain(uuid: str | bytes) -> str:
    """As torch writes it."""
    return (uuid.decode() if isinstance(uuid, bytes) else uuid).removeprefix("GPU-")
