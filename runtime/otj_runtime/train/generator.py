"""Connects a training rank with its generator: weights go there, completions come back, and a lost generator is brought back.

A generator that died restarts in place with dummy weights. The rank that notices first installs the current version from the
mailbox again, the others find it done; so it costs the requests that were under way, which are asked again, and no optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otj_runtime.api import DType
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.transfer import Transfer, choose
from otj_runtime.rollout.vllm_engine import VLLMEngine
from otj_runtime.train.sampling import Exclusive
from otj_runtime.weights.adapter import AdapterSync
from otj_runtime.weights.chosen import ChosenSync, Way
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.direct import DirectSync
from otj_runtime.weights.probe import prompt_sequences
from otj_runtime.weights.sync import WeightSync


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A vLLM server and the way weights take to it. It need not answer yet.

    Attributes:
        url: where it listens, such as http://127.0.0.1:8000.
        mailbox: folder of the weights mailbox, in memory that both sides share.
        dtype: what it computes in.
        ready_timeout_s: how long it may take to start, in seconds.
        engines: copies of the model behind it.
        adapter_only: whether it loaded the model itself and gets a LoRA adapter only.
        delta: whether it gets what changed instead of all weights, where that is less.
        wish: auto, nccl or ipc let the first push find out which way is possible; anything else takes the mailbox.
        note: folder in which the outcome is left for the launcher; None where there is none.
    """

    url: str
    mailbox: Path
    dtype: DType
    ready_timeout_s: float
    engines: int = 1
    adapter_only: bool = False
    delta: bool = False
    wish: str = "auto"
    note: Path | None = None


def pod_generator(config: PodConfig) -> Generator:
    """The generator that the pod brings."""
    transfer = choose(config)
    print(f"weights: {transfer.describe(None)}", flush=True)
    return Generator(
        url=config.generator_url,
        mailbox=Path(config.mailbox),
        dtype=config.generator_dtype,
        ready_timeout_s=float(config.generator_ready_timeout_seconds),
        engines=config.generator_engines,
        adapter_only=transfer.kind == "adapter",
        delta=transfer.kind == "delta",
        wish=config.weight_transfer,
        note=Path(config.run_directory),
    )


@dataclass(frozen=True)
class Connection:
    """The two ways to a generator."""

    engine: VLLMEngine
    weights: Exclusive


def connect(
    generator: Generator,
    *,
    model: Any,
    end_tokens: set[int],
    prompts: Iterable[list[int]],
    failure: Callable[[], str | None] | None = None,
) -> Connection:
    """Both ways to `generator`; nothing is asked of it yet.

    Args:
        model: the unwrapped policy whose weights are sent.
        end_tokens: tokens that end a completion.
        prompts: token ids of the run's prompts, the same on every rank; the first few are what the weight sync proves itself with.
        failure: says why the generator will never answer, where somebody knows.
    """
    control = GeneratorControl(generator.url, engines=generator.engines, failure=failure)
    weights = make_weights(generator, model=model, control=control, prompts=prompts)
    exclusive = Exclusive(weights, weights.reinstall)
    engine = VLLMEngine(generator.url, end_tokens=end_tokens, recover=exclusive.recover, engines=generator.engines)
    return Connection(engine=engine, weights=exclusive)


def make_weights(generator: Generator, *, model: Any, control: GeneratorControl, prompts: Iterable[list[int]]) -> Way:
    """The way of the weights to `generator`; the arguments are those of `connect`."""
    known: dict[str, Any] = {"model": model, "control": control, "dtype": generator.dtype, "ready_timeout_s": generator.ready_timeout_s}
    first = prompt_sequences(prompts)  # once: both ways may be made, and prompts can be gone through once
    if generator.adapter_only:
        return AdapterSync(directory=generator.mailbox, prompts=first, **known)
    mailbox = WeightSync(directory=generator.mailbox, delta=generator.delta, prompts=first, **known)
    if generator.wish not in ("auto", "nccl", "ipc"):
        return mailbox

    def tell(transfer: Transfer) -> None:
        print(f"weights: {transfer.describe(None)}", flush=True)
        if generator.note is not None:
            transfer.write(generator.note)

    return ChosenSync(
        generator.wish,
        mailbox=mailbox,
        nccl=lambda: DirectSync(prompts=first, **known),
        model=model,
        control=control,
        ready_timeout_s=generator.ready_timeout_s,
        tell=tell,
    )
