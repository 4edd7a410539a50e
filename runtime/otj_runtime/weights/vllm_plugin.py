"""The mailbox as a backend of vLLM's weight transfer: the one file that touches vLLM's classes.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes. Chosen by
`--weight-transfer-config '{"backend": "otj_mailbox"}'`; init_info is {"path": ...}, update_info is {"version": ...}.

An update is all or nothing as far as vLLM allows: the mailbox is verified to the last byte before the model is touched, and
the model's layers are opened, loaded and closed within the one update call. So a refused update leaves the old weights
serving, and start and finish have nothing to do here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from otj_runtime.weights.errors import MailboxError, UnsupportedVLLM
from otj_runtime.weights.mailbox import MailboxReader

BACKEND = "otj_mailbox"
SUPPORTED = ((0, 32), (0, 33))
"""First version of vLLM that this works with, and the first that was not tried. The classes used here have had their shape since
0.28, but only 0.32 says in its answers which weights produced each token, without which a rollout cannot be trusted."""


def require_supported(version: str) -> None:
    """Refuse a vLLM outside `SUPPORTED`.

    Raises:
        UnsupportedVLLM: naming the version and the range.
    """
    first, end = SUPPORTED
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= numbers < end:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise UnsupportedVLLM(f"vLLM {version} is not supported: the weights mailbox works with vllm >={low},<{high}")


require_supported(vllm.__version__)


def register() -> None:
    """Make the backend known to vLLM. May be called more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MailboxEngine)


@dataclass
class MailboxInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the mailbox is."""

    path: str


@dataclass
class MailboxUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which version to install; it must be the latest in the mailbox."""

    version: int


class MailboxEngine(WeightTransferEngine):  # type: ignore[misc]
    """Installs versions from the mailbox into this worker's model."""

    init_info_cls = MailboxInitInfo
    update_info_cls = MailboxUpdateInfo

    def init_transfer_engine(self, init_info: MailboxInitInfo) -> None:
        """Note the path. The file is opened for each update, because a trainer that starts again makes a new one."""
        self._path = Path(init_info.path)

    def start_weight_update(self) -> None:
        """Nothing: see the module's text."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's own, but for its call to synchronize the accelerator, which raises where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: MailboxUpdateInfo) -> None:
        """Verify the version, then load it into the model.

        Raises:
            MailboxError: if it cannot be verified (the model is untouched), or does not hold all parameters (it is not).
        """
        with MailboxReader(self._path).reading(update_info.version) as tensors:
            # Before the reload opens the layers: it parts tied parameters, and one that is tied has no name of its own to load.
            wanted = {name for name, _ in self.model.named_parameters()}
            initialize_layerwise_reload(self.model)
            try:
                loaded = self.model.load_weights(iter(tensors))
            finally:
                finalize_layerwise_reload(self.model, self.model_config)
        if loaded is not None and (missing := wanted - set(loaded)):
            raise MailboxError(f"version {update_info.version} brings nothing for {len(missing)} parameters, the first is {min(missing)}")
        if self.device.type == "cpu":
            repack_tied_heads(self.model)

    def finish_weight_update(self) -> None:
        """Nothing: see the module's text."""

    def shutdown(self) -> None:
        """Nothing: no file stays open between updates."""


def repack_tied_heads(model: torch.nn.Module) -> None:
    """Pack the weights of output layers that share them with the embedding again.

    vLLM's CPU kernels multiply with a packed copy. A reload packs a layer when its own weights are loaded; a tied head has
    none of its own, so it would go on multiplying with the copy of the old weights while every call answers 200.
    """
    embeddings = {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.data_ptr() in embeddings:
            module.quant_method.process_weights_after_loading(module)
