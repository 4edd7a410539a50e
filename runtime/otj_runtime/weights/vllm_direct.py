"""vLLM's own transfer from GPU to GPU, `nccl`: the trainer's half, with vLLM's classes, on every rank.

    open   rank 0: init_weight_transfer_engine, which names the backend to our own; that makes vLLM's worker half of it (`vllm_plugin`).
           Trainer and workers meet in a group of their own meanwhile
    send   every rank replays the policy's tensors; rank 0: /otj/hold, start, update while it broadcasts, then /otj/install: finish, label,
           forget prefixes, go on

Its `ipc`, for a GPU that both sides are on, is not used: it loads as slowly as it does here (233 ms for 1.54B, 226 of them paused, on an H100), and its
handles travel pickled. See `loan`.

What is ours is the order around vLLM's phases: between start and finish a worker's model is written to, or taken apart, so nothing may be decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

from otj_runtime.api import DType
from otj_runtime.pod.ports import free_port
from otj_runtime.weights.composed import whole
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.direct import Conversation
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.tensors import policy_tensors


class PolicySource(WeightSource):  # type: ignore[misc]
    """The policy's tensors as vLLM reads them: whole, in the generator's dtype, one at a time."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        """Names and shapes, without gathering."""
        return [ParamMeta(name, self._dtype, tuple(tensor.shape)) for name, tensor in policy_tensors(self._model).items()]

    def largest(self) -> int:
        """Bytes of the largest tensor, which vLLM's buffers must hold."""
        return int(max(math.prod(entry.shape) for entry in self.metadata())) * self._dtype.itemsize

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor. Collective where the model is sharded."""
        with torch.no_grad():
            for name, tensor in policy_tensors(self._model).items():
                yield name, whole(tensor).detach().to(self._dtype)


class Client(HTTPVLLMWeightSyncClient):  # type: ignore[misc]
    """vLLM's client with our deadlines, errors and order."""

    def __init__(self, control: GeneratorControl, conversation: Conversation) -> None:
        super().__init__(control.url)
        self._control = control
        self._conversation = conversation

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers make their half of the backend."""
        super().init_weight_transfer_engine({"backend": "nccl", "init_info": init_info})

    def start_weight_update(self) -> None:
        """Stop decoding between two steps, then begin."""
        self._conversation.pausing()
        with self._conversation.noting():
            self._control.hold()
        super().start_weight_update()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update as the mailbox does, and go on."""
        with self._conversation.noting():
            self._control.install(self._conversation.version)
        self._conversation.resumed()

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        with self._conversation.noting():
            self._control.relay(path, json)


class DirectChannel:
    """An open way to the workers. Collective: every rank makes one and sends.

    Args:
        control: the generator.
        model: the unwrapped policy.
        dtype: what the generator computes in.
        rank: of this process; 0 sends.
        workers: how many receive.
        conversation: takes what is said on the way.
    """

    def __init__(self, *, control: GeneratorControl, model: Any, dtype: DType, rank: int, workers: int, conversation: Conversation) -> None:
        source = PolicySource(model, getattr(torch, dtype))
        info = NCCLTrainerInitInfo(
            rank=rank,
            master_address="127.0.0.1",
            master_port=free_port(),
            world_size=1 + workers,
            packed=True,
            packed_buffer_size_bytes=max(DEFAULT_PACKED_BUFFER_SIZE_BYTES, source.largest()),
        )
        client = Client(control, conversation)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
        require_nccl(self._engine.model_update_group)

    def send(self) -> None:
        """Send all weights and install them."""
        self._engine.send_weights()


def require_nccl(group: Any) -> None:
    """Refuse a group that sends nothing: where vLLM cannot load its NCCL it says so nowhere, and every transfer is of zeros.

    Raises:
        WeightSyncFailed: if it could not. A rank that does not send has no group.
    """
    if group is not None and group.disabled:
        raise WeightSyncFailed(
            "init: vLLM cannot load NCCL here (it is missing, or older than this vLLM wants), so nothing would be sent; let VLLM_NCCL_SO_PATH name "
            "a newer libnccl.so.2",
            phase="init",
        )
