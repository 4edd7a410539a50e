"""The mailbox as a backend of vLLM's weight transfer: the worker's half. With `vllm_install` and `vllm_trainer` the only code that
touches vLLM's classes.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes. Chosen by
`--weight-transfer-config '{"backend": "otj_mailbox"}'`. The phases are vLLM's own, so that anybody's trainer can drive them:

    init_transfer_engine  {"path", "staging_bytes", "loan"}   opens the mailbox and pins it, and what the trainer lends of its own memory
    start_weight_update                               nothing
    update_weights        {"version", "sequence", "slot", "steps", "lent"}   begins to stage that version and returns, while decoding goes on; with the
                                                      version alone, the latest in the mailbox
    finish_weight_update                              waits until all is staged and checked, then installs it: the only phase that
                                                      changes the model, to be called between two engine steps

Another backend of vLLM takes over where `init_transfer_engine` gets {"backend", "init_info"}: `nccl`, made by vLLM's own factory. A server has
one backend for its life, and whether that one is possible shows only when both sides have met, so the choice cannot be the server's.
What `nccl` does with what arrives is ours where it can be: the model's copies are recorded at the first update and replayed from then on, where
vLLM takes the model apart and puts it together again (171 ms for 1.54B, of which the bytes need about ten).

How it installs is decided at the first update. Where the model's loader only copies, its copies are recorded and replayed (`plan`). Else
(a CPU's packed layouts, quantised weights, mixtures of experts) the tensors go through vLLM's own layerwise reload, which packs and
quantises again; that is slower, and the pause is as long as it takes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from otj_runtime.rollout.vllm_bursts import send_in_bursts
from otj_runtime.weights.borrowed import BorrowedStaging
from otj_runtime.weights.errors import MailboxError, UnsupportedVLLM
from otj_runtime.weights.installed import InstalledCheck
from otj_runtime.weights.layout import Ticket
from otj_runtime.weights.loan import Loan, borrow
from otj_runtime.weights.mailbox import MailboxReader
from otj_runtime.weights.plan import Plan, ReplayingLoader, record
from otj_runtime.weights.staging import DeviceStaging, HostStaging, Staging
from otj_runtime.weights.vllm_install import offer_installation
from otj_runtime.weights.vllm_trainer import BACKEND, MailboxTrainerEngine

logger = logging.getLogger(__name__)

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


PLAIN_LAYERS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}
"""vLLM's layers whose parameters stay as they were loaded, on a GPU."""


def register() -> None:
    """Make the backend known to vLLM. May be called more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MailboxEngine)
        WeightTransferTrainerFactory.register_engine(BACKEND, MailboxTrainerEngine)
    offer_installation()
    send_in_bursts()


@dataclass
class MailboxInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the mailbox is, how many bytes of GPU memory staging may take (None for as many as the model has), and the trainer's own memory."""

    path: str
    staging_bytes: int | None = None
    loan: Loan | None = None


@dataclass
class HandOver(WeightTransferInitInfo):  # type: ignore[misc]
    """Another backend of vLLM, by its name, and what it is to be told."""

    backend: str
    init_info: dict[str, Any]


@dataclass
class MailboxUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which version to stage; with `sequence` and `slot`, one that is still being written."""

    version: int
    sequence: int | None = None
    slot: int | None = None
    steps: int = 0
    lent: bool = False


class MailboxEngine(WeightTransferEngine):  # type: ignore[misc]
    """Installs versions from the mailbox into this worker's model."""

    init_info_cls = MailboxInitInfo
    update_info_cls = MailboxUpdateInfo
    supports_draft_weight_update = False
    _other: WeightTransferEngine | None = None
    _loader: ReplayingLoader | None = None  # stands in for the other's model
    _staging: Staging | None = None
    _plan: Plan | None = None
    _check: InstalledCheck | None = None
    _computes = False
    _replay: dict[int, list[torch.Tensor]] | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> MailboxInitInfo | HandOver:
        """As vLLM's own, or a hand-over to another backend."""
        return HandOver(**init_dict) if "backend" in init_dict else super().parse_init_info(init_dict)

    def init_transfer_engine(self, init_info: MailboxInitInfo | HandOver) -> None:
        """Open the mailbox. Repeated by every trainer that starts, because it makes a new file; the plan stays while the tensors do."""
        self.shutdown()
        if isinstance(init_info, HandOver):
            config = WeightTransferConfig(backend=init_info.backend)
            other = WeightTransferEngineFactory.create_engine(config, self.vllm_config, self.device, self.model)
            other.init_transfer_engine(other.parse_init_info(init_info.init_info))
            self._other, self._plan = other, None
            if isinstance(other, NCCLWeightTransferEngine) and self.device.type == "cuda" and self._plain():
                other.model = self._loader = ReplayingLoader(self.model)
            return
        reader = MailboxReader(Path(init_info.path))
        if reader.layout.on_gpu and self.device.type == "cpu":
            raise MailboxError("the trainer is on a GPU and this generator on a CPU: run both on the same kind of device")
        try:
            self._staging = self._make_staging(reader, init_info)
        except BaseException:
            reader.close()
            raise
        if self._plan is not None and self._plan.layout != reader.layout:
            self._plan = None

    def _make_staging(self, reader: MailboxReader, info: MailboxInitInfo) -> Staging:
        parallel = self.parallel_config
        worker = int(parallel.data_parallel_index * parallel.world_size + parallel.rank)
        if not (self.device.type == "cuda" and reader.layout.on_gpu):
            return HostStaging(reader, worker)
        if info.loan is not None:
            lent, here = borrow(info.loan, reader.layout, self.device)
            return BorrowedStaging(reader, worker, device=self.device, lent=lent, far=not here)
        return DeviceStaging(reader, worker, device=self.device, limit=info.staging_bytes)

    def start_weight_update(self) -> None:
        """Nothing: see the module's text."""
        if self._other is not None and self._loader is None:
            self._other.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's own, but without waiting for the device: what goes on there is staging."""
        if self._other is not None:
            self._other.update_weights(update_info)
            return
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: MailboxUpdateInfo) -> None:
        """Begin to stage the version.

        Raises:
            MailboxError: if nothing was opened, or the version is neither published nor described.
        """
        staging = self._opened()
        if update_info.version < 0:
            staging.stop()
            raise MailboxError("the update was given up")
        if update_info.sequence is None or update_info.slot is None:
            ticket = staging.reader.latest(update_info.version)
        else:
            ticket = Ticket(update_info.version, update_info.slot, update_info.sequence, update_info.steps, update_info.lent)
        staging.begin(ticket)

    def finish_weight_update(self) -> None:
        """Install what was staged, when all of it is there and fits its checksums.

        Raises:
            MailboxError: if it does not (the model is untouched, unless staging is limited), or does not hold all parameters.
        """
        if self._other is not None:
            self._finish(self._other)
            return
        staging = self._opened()
        staging.require_published()
        if not staging.partial:
            staging.wait()
        ticket = staging.take()
        with staging.reader.guarding(ticket):
            self._install(staging, ticket)
        staging.confirm(ticket, lambda: self._differing(staging, ticket))

    def _finish(self, other: WeightTransferEngine) -> None:
        if self._loader is None:
            other.finish_weight_update()
        elif missed := self._loader.untouched():
            self._reload_from_now_on(missed)
            other.model = self.model
            self._loader = None

    def _reload_from_now_on(self, missed: list[str]) -> None:
        self._computes = True
        logger.warning("this model's loader does more than copy (%s): weights go through vLLM's reload from now on", missed[0])

    def _install(self, staging: Staging, ticket: Ticket) -> None:
        if staging.on_device and self._plan is not None:
            self._copy(staging, ticket, self._plan)
            return
        staging.drain()
        if staging.on_device and self._plain():
            self._record(staging, ticket)
        else:
            self._reload(staging, ticket)

    def _differing(self, staging: Staging, ticket: Ticket) -> list[str]:
        """Parameters that do not hold what was staged; none where they hold what vLLM has computed from it."""
        if self._plan is None or not staging.on_device:
            return []
        self._check = self._check or InstalledCheck(self._plan, self.model)
        return self._check.differing(staging.kept(ticket))

    def shutdown(self) -> None:
        """Stop staging and let go of the mailbox and the buffer, or of the other backend."""
        if self._other is not None:
            self._other.shutdown()
        self._other = self._loader = None
        if self._staging is not None:
            self._staging.stop()
            self._staging.reader.close()
        self._staging = self._replay = self._check = None  # they hold addresses of what is let go here

    def _opened(self) -> Staging:
        if self._staging is None:
            raise MailboxError("no mailbox was opened: init_weight_transfer_engine comes first")
        return self._staging

    def _plain(self) -> bool:
        """Whether every layer keeps its parameters as they were loaded, and derives no others from them (as latent attention does)."""
        if self._computes or getattr(self.model_config, "use_mla", False):
            return False
        methods = {
            type(method).__name__ for module in self.model.modules() if (method := getattr(module, "quant_method", None)) is not None
        }
        return methods <= PLAIN_LAYERS

    def _record(self, staging: Staging, ticket: Ticket) -> None:
        """Load with the model's own loader, which pauses longer than a replay, and remember the copies."""
        with torch.no_grad():
            plan = record(self.model.load_weights, staging.reader.layout, staging.content(ticket))
        torch.cuda.synchronize(self.device)
        self._require_all(plan.loaded, ticket)
        if missed := plan.untouched(self.model):
            self._reload_from_now_on(missed)
            return
        self._plan = plan
        logger.info("recorded %d copies of %d tensors", len(plan.copies), len(plan.layout.tensors))

    def _copy(self, staging: Staging, ticket: Ticket, plan: Plan) -> None:
        """Replay the plan: at once if all is near, else run by run."""
        destinations, sources = [copy.destination for copy in plan.copies], self._sources(plan, staging.near(ticket))
        if not (isinstance(staging, DeviceStaging) and staging.partial):
            torch._foreach_copy_(destinations, sources)
            torch.cuda.current_stream(self.device).synchronize()
            return
        waiting = sorted(range(len(plan.copies)), key=lambda index: plan.copies[index].tensor, reverse=True)
        for _, end in staging.runs():
            chosen = []
            while waiting and plan.copies[waiting[-1]].tensor < end:
                chosen.append(waiting.pop())
            torch._foreach_copy_([destinations[index] for index in chosen], [sources[index] for index in chosen])
            staging.installed(end)
        staging.wait()

    def _sources(self, plan: Plan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each copy reads; made once for each place where the tensors lie, because making views takes as long as copying."""
        self._replay = {} if self._replay is None else self._replay
        place = tensors[0].data_ptr()
        if place not in self._replay:
            self._replay[place] = plan.sources(tensors)
        return self._replay[place]

    def _reload(self, staging: Staging, ticket: Ticket) -> None:
        """Load through vLLM's layerwise reload."""
        # Before the reload opens the layers: it parts tied parameters, and one that is tied has no name of its own to load.
        wanted = {name for name, _ in self.model.named_parameters()}
        named = zip((entry.name for entry in staging.reader.layout.tensors), staging.content(ticket), strict=True)
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(iter(named))
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        self._require_all(loaded, ticket, wanted)
        if self.device.type == "cpu":
            repack_tied_heads(self.model)
            repack_experts(self.model)
        else:
            torch.cuda.synchronize(self.device)

    def _require_all(self, loaded: Any, ticket: Ticket, wanted: set[str] | None = None) -> None:
        if wanted is None:
            wanted = {name for name, _ in self.model.named_parameters()}
        if loaded is not None and (missing := wanted - set(loaded)):
            raise MailboxError(f"version {ticket.version} brings nothing for {len(missing)} parameters, the first is {min(missing)}")


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


def repack_experts(model: torch.nn.Module) -> None:
    """Pack the weights of experts again, for vLLM's CPU kernels.

    vLLM packs them when it makes the kernel. A reload finds the kernel made and leaves the weights as they are loaded, in memory of the same
    size, so the kernel would read them in an order that they do not have.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is not None:
            method.moe_kernel.fused_experts.process_weights_after_loading(module)
