"""TRL's trainers on the pod's generator: the one file that knows TRL's inside.

TRL's server mode (`use_vllm=True, vllm_mode="server"`) speaks vLLM's own routes, which our generator serves; two things do not fit.
Its weights travel over NCCL between vLLM's workers and the trainer, so never on a CPU, and never between containers that do not
share a device; ours travel through the mailbox, and are proven. And a script's `vllm_server_host` and port are of the machine that
it was written on. So in the module `trl.generation.vllm_generation`, which GRPO, RLOO and the distillation trainers generate
through, and nowhere else:

    VLLMClient                      -> a subclass: asks the pod's generator, pushes through `Feed`, repeats what a lost generator lost
    VLLMGeneration.sync_weights     -> the original, then notes on every rank that these weights are not proven yet
    VLLMGeneration.generate         -> proves them with the first prompts that come, then the original

The shape of these three has been the same from TRL 1.11 to 1.16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from otj_runtime.compat.feed import Feed, floating
from otj_runtime.compat.hook import after_import
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import InvalidSpec
from otj_runtime.weights.precision import kept_in
from otj_runtime.weights.tensors import is_sharded, reshard

SUPPORTED = ((1, 11), (1, 17))
"""First version of TRL that this works with, and the first that was not tried."""

GENERATION = "trl.generation.vllm_generation"
NCCL_ENGINE = "vllm.distributed.weight_transfer.nccl_engine"

Step = Callable[[], int]
"""Optimizer steps made."""


class UnsupportedTRL(InvalidSpec):
    """The TRL that the script imports has another inside than the adaptation knows."""


def load(config: PodConfig, *, step: Step, feed: Feed) -> None:
    """Adapt TRL as soon as the script imports it.

    Args:
        step: the running trainer's step, which is the version of the weights that it pushes.
        feed: the way to the generator.
    """
    after_import(NCCL_ENGINE, _complete_nccl_engine)
    after_import(GENERATION, lambda module: adapt(module, step=step, feed=feed))


def _complete_nccl_engine(module: ModuleType) -> None:
    """TRL 1.11 and 1.12 import a name that vLLM dropped in 0.28; it is for the transfer that is not used here."""
    if not hasattr(module, "NCCLTrainerSendWeightsArgs"):
        module.NCCLTrainerSendWeightsArgs = None  # type: ignore[attr-defined]


def adapt(module: ModuleType, *, step: Step, feed: Feed) -> None:
    """Replace the three names of `trl.generation.vllm_generation`.

    Raises:
        UnsupportedTRL: if TRL is of another version, or the names have another shape.
    """
    import trl

    require_supported(trl.__version__)
    generation = module.VLLMGeneration
    wanted = [(generation, "sync_weights"), (generation, "generate")]
    wanted += [(module.VLLMClient, name) for name in ("init_communicator", "update_named_params", "generate", "chat", "close_communicator")]
    if missing := [f"{owner.__name__}.{name}" for owner, name in wanted if not callable(getattr(owner, name, None))]:
        raise UnsupportedTRL(f"TRL {trl.__version__} has no {', '.join(missing)}: its weight updates cannot be adapted")
    module.VLLMClient = client_class(module.VLLMClient, step=step, feed=feed)  # type: ignore[attr-defined]
    generation.sync_weights = _then_unproven(generation.sync_weights)
    generation.generate = _proven_before(generation.generate, feed)


def require_supported(version: str) -> None:
    """Refuse a TRL outside `SUPPORTED`.

    Raises:
        UnsupportedTRL: naming the version and the range.
    """
    first, end = SUPPORTED
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= numbers < end:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise UnsupportedTRL(f"TRL {version} is not supported: trainer.command works with trl >={low},<{high}; install one of these")


def client_class(base: Any, *, step: Step, feed: Feed) -> Any:
    """TRL's `VLLMClient` as a client of the pod's generator."""

    class PodClient(base):  # type: ignore[misc]
        def __init__(self, base_url: str | None = None, connection_timeout: float = 0.0, **addresses: Any) -> None:
            super().__init__(base_url=feed.url, connection_timeout=max(connection_timeout, feed.ready_timeout_s))

        def init_communicator(self, device: Any = 0) -> None:
            """Nothing: the mailbox is made at the first push."""

        def update_named_params(self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
            feed.push(step(), list(floating(metadata)), named_params)

        def update_named_param(self, name: str, weights: torch.Tensor) -> None:
            raise UnsupportedTRL(f"this trainer sends its weights one by one (the first is {name}), the mailbox takes them together")

        def weight_update(self) -> AbstractContextManager[None]:
            raise UnsupportedTRL("this trainer opens an update of its own; the mailbox takes all weights at once")

        def reset_prefix_cache(self) -> None:
            """Nothing: a push has done it, while nothing was generated."""

        def close_communicator(self) -> None:
            """Nothing: no connection stays open between pushes."""

        def generate(self, *arguments: Any, **named: Any) -> Any:
            return feed.faithfully(lambda: base.generate(self, *arguments, **named))

        def chat(self, *arguments: Any, **named: Any) -> Any:
            return feed.faithfully(lambda: base.chat(self, *arguments, **named))

    return PodClient


def _then_unproven(sync_weights: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(sync_weights)
    def sync(generation: Any) -> None:
        sync_weights(generation)
        generation.otj_unproven = generation.mode == "server"

    return sync


def _proven_before(generate: Callable[..., Any], feed: Feed) -> Callable[..., Any]:
    @functools.wraps(generate)
    def proven(generation: Any, prompts: list[list[int]], *arguments: Any, **named: Any) -> Any:
        if getattr(generation, "otj_unproven", False):
            _prove(generation, prompts, feed)
            generation.otj_unproven = False
        return generate(generation, prompts, *arguments, **named)

    return proven


def _prove(generation: Any, prompts: list[list[int]], feed: Feed) -> None:
    """Prove on rank 0 that the generator holds the trainer's weights. The forward of a sharded model takes all ranks."""
    leads, model = generation.accelerator.is_main_process, generation.model
    reshard(model)  # what a forward left gathered looks whole
    if not (leads or is_sharded(model.parameters())):
        return
    sequences, scores = feed.score(model, prompts)
    reshard(model)
    if leads and sequences:
        feed.prove(sequences, scores, trained_in=kept_in(model))
