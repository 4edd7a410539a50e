"""DirectSync: brings the policy from GPU to GPU through vLLM's own `nccl`, and proves that it arrived.

One push, on every rank at once:

    still there?      a generator that restarted meanwhile is met anew
    send              vLLM's engine: pause, start, update, install (`vllm_direct`)
    probe             beside decoding, as for the mailbox; every rank waits for it in `proven`

It trades what the mailbox promises for a way without host memory. vLLM's interface names no checksum, so the probe alone proves; one that
fails is made again after a second send. Nobody keeps a copy, so a generator that restarts while it samples cannot get its version back and
ends the attempt; between two pushes it costs nothing. A send that fails in its midst leaves a model in pieces and ends the attempt as well.
NCCL cannot be interrupted, so every send is made by a thread that is left behind when its deadline passes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from otj_runtime.api import DType
from otj_runtime.pod.errors import GeneratorLost, Stalled
from otj_runtime.weights.control import DEADLINES, RETURN_SECONDS, GeneratorControl
from otj_runtime.weights.errors import WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.install import Phases
from otj_runtime.weights.probe import Agreement, Probe, TrainerScores
from otj_runtime.weights.ranks import Ranks
from otj_runtime.weights.sync import SYNC_SECONDS, Proof, SyncReport
from otj_runtime.weights.tensors import is_sharded, policy_tensors, reshard

logger = logging.getLogger(__name__)

T = TypeVar("T")

OPEN_SECONDS = DEADLINES["init"] + 10.0
"""How long the two sides may take to meet: the generator's answer has its own, shorter deadline."""

POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 1.0
"""How long a thread may take to end by itself after the generator has refused something."""

ADVICE = "say generation.weightTransfer: mailbox, which needs no access from GPU to GPU"


class Conversation:
    """What rank 0 and the generator said during an opening or a send; other ranks have none.

    Attributes:
        version: of the weights that are sent.
        error: what the generator refused first.
        paused_s: seconds for which nothing was decoded.
    """

    def __init__(self, version: int = -1) -> None:
        self.version = version
        self.error: WeightSyncFailed | None = None
        self.paused_s = 0.0
        self._since = 0.0

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Remember the error of the block."""
        try:
            yield
        except WeightSyncFailed as error:
            self.error = self.error or error
            raise

    def pausing(self) -> None:
        """Decoding ends."""
        self._since = time.perf_counter()

    def resumed(self) -> None:
        """Decoding goes on."""
        self.paused_s = time.perf_counter() - self._since


class Channel(Protocol):
    """See `vllm_direct.DirectChannel`."""

    def send(self) -> None: ...


class Opener(Protocol):
    """Makes a `Channel`."""

    def __call__(
        self, *, control: GeneratorControl, model: Any, dtype: DType, rank: int, workers: int, conversation: Conversation
    ) -> Channel: ...


def vllm_channel(**arguments: Any) -> Channel:
    """vLLM's engine; imported here, because a trainer that uses the mailbox needs no vLLM."""
    from otj_runtime.weights.vllm_direct import DirectChannel

    return DirectChannel(**arguments)


class DirectSync:
    """The training ranks' way to the generator's weights; what is not named here is as in `WeightSync`.

    Args:
        open_channel: how the two sides meet.
    """

    def __init__(
        self,
        *,
        model: Any,
        control: GeneratorControl,
        dtype: DType,
        ready_timeout_s: float = RETURN_SECONDS,
        prompts: Iterable[list[int]] = (),
        open_channel: Opener = vllm_channel,
    ) -> None:
        self._model = model
        self._control = control
        self._dtype = DType(dtype)
        self._ready_timeout_s = ready_timeout_s
        self._probe = Probe(model, prompts, self._dtype)
        self._open_channel = open_channel
        self._ranks: Ranks | None = None
        self._channel: Channel | None = None
        self._conversation = Conversation()
        self._pushed: int | None = None
        self._scored: Future[TrainerScores] | None = None  # rank 0 only, as the next
        self._asked: Future[list[list[list[float]]]] | None = None
        self._proof: Proof | None = None
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="otj-sync")

    @property
    def version(self) -> int | None:
        """The version that was pushed last; None before the first."""
        return self._pushed

    def open(self) -> None:
        """Meet the generator. Collective.

        Raises:
            GeneratorNotReady: if it does not answer in time.
            WeightSyncFailed: if the two sides cannot meet; the generator is as it was.
            Stalled: if one side waits for the other without end: the generator may never answer again.
        """
        ranks = self._connect()

        def count() -> int:
            self._control.wait_healthy(deadline_s=self._ready_timeout_s)
            return self._control.workers()

        workers = ranks.lead(count, phase="init")

        self._conversation = Conversation()

        def meet() -> Channel:
            return self._open_channel(
                control=self._control,
                model=self._model,
                dtype=self._dtype,
                rank=ranks.rank,
                workers=workers,
                conversation=self._conversation,
            )

        def attempt() -> None:
            self._channel = self._bounded(meet, seconds=OPEN_SECONDS, phase="init", what="meet the generator")

        ranks.together(attempt, phase="init")

    def push(self, version: int) -> SyncReport:
        """Bring the model's current weights into the generator as `version`. Collective.

        Raises:
            GeneratorLost: if the generator does not answer in time.
            WeightSyncFailed, Stalled: if a phase failed; the text names it, and nothing must be sampled from the generator any more.
        """
        began = time.perf_counter()
        ranks, phases = self._connect(), Phases()
        sent = self._deliver(version, phases)
        self._pushed, self._proof = version, None
        if ranks.rank == 0:
            self._asked = self._threads.submit(self._control.score, self._probe.sequences)
        total = time.perf_counter() - began
        return ranks.lead(lambda: SyncReport(version, total, phases.seconds, sent, attempts=1), phase="send")

    def proven(self, version: int) -> Proof:
        """Return when the probe has shown that the generator serves `version`, the one pushed last. Collective.

        To be called before the model's weights change.

        Raises:
            WeightsDiverged: if the probe did not agree, and not after a second send either.
            WeightSyncFailed, GeneratorLost, Stalled: if the generator could not be asked, or sent to again.
        """
        if self._pushed is None or self._pushed != version:
            raise WeightSyncFailed(f"proof: version {version} is not the one that was pushed last", phase="proof")
        if self._proof is None:
            began = time.perf_counter()
            agreement = self._connect().lead(self._first_look, phase="proof")
            again = agreement is None
            if agreement is None:
                self._deliver(version, Phases())
                agreement = self._connect().lead(lambda: self._compare(self._control.score(self._probe.sequences)), phase="proof")
            self._proof = Proof(agreement=agreement, again=again)
            self._proof = replace(self._proof, waited_s=time.perf_counter() - began)
        return self._proof

    def reinstall(self) -> None:
        """Return if the generator still serves the version that was pushed last. Not collective: any rank may ask, at any time.

        Raises:
            GeneratorLost: if it does not: the version that it lost is nowhere but in a trainer that may have moved on.
        """
        self._control.wait_returned()
        served = self._control.weight_version()
        if served != str(self._pushed):
            raise GeneratorLost(
                f"the generator restarted and serves weights {served} instead of {self._pushed}, of which nccl keeps no copy: the run goes on "
                "from its last checkpoint; generation.weightTransfer: mailbox brings them back without that"
            )

    # -- sending ---------------------------------------------------------------------------------------------------------------

    def _connect(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(timeout_s=self._ready_timeout_s + SYNC_SECONDS)
        return self._ranks

    def _deliver(self, version: int, phases: Phases) -> int:
        """Send all weights; return the bytes. Collective."""
        ranks = self._connect()
        with phases("begin"):
            if self._channel is None or not ranks.lead(self._still_there, phase="begin"):
                self.open()
        channel, talk = self._channel, self._conversation
        assert channel is not None
        talk.version, talk.error = version, None
        reshard(self._model)
        tensors = policy_tensors(self._model)
        with phases("send"):
            ranks.together(lambda: self._bounded(channel.send, seconds=DEADLINES["update"], phase="send", what="send"), phase="send")
        phases.seconds["paused"] = talk.paused_s
        if is_sharded(tensors.values()):  # its forward takes all ranks
            scores = self._probe.score()
            reshard(self._model)
            self._scored = Future()
            self._scored.set_result(scores)
        elif ranks.rank == 0:
            self._scored = self._threads.submit(self._probe.score)
        itemsize = getattr(torch, self._dtype).itemsize
        return sum(math.prod(tensor.shape) for tensor in tensors.values()) * int(itemsize)

    def _still_there(self) -> bool:
        """Whether the generator is the one that got the last version, or that was met and has got none yet."""
        if self._pushed is None:
            return True
        served = self._control.weight_version()
        if served is None:
            self._control.wait_returned()
            served = self._control.weight_version()
        return served == str(self._pushed)

    def _bounded(self, action: Callable[[], T], *, seconds: float, phase: str, what: str) -> T:
        """The result of `action` in a thread, which is left behind when its time is up, or when the generator has refused its part.

        Raises:
            Stalled: when `seconds` have passed here, or the generator's own deadline.
        """
        outcome: Future[T] = Future()
        device = next(self._model.parameters()).device

        def act() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # a new thread is on the first one
                    torch.cuda.synchronize(device)  # vLLM reads the weights on streams of its own
                outcome.set_result(action())
            except BaseException as error:
                outcome.set_exception(error)

        talk, refused = self._conversation, False
        threading.Thread(target=act, daemon=True, name=f"otj-{phase}").start()
        end = time.monotonic() + seconds
        while not outcome.done() and time.monotonic() < end:
            wait([outcome], timeout=POLL_SECONDS)
            if talk.error is not None and not refused:
                refused, end = True, min(end, time.monotonic() + LAST_WORDS_SECONDS)
        if talk.error is not None:
            if isinstance(talk.error.__cause__, TimeoutError):
                raise Stalled(f"{talk.error}; {ADVICE}") from talk.error
            raise talk.error
        if not outcome.done():
            raise Stalled(f"{phase}: nccl did not {what} in {seconds:.0f} s; {ADVICE}")
        return outcome.result()

    # -- the proof -------------------------------------------------------------------------------------------------------------

    def _first_look(self) -> Agreement | None:
        """What the probe found; None if it has to be made again after a second send."""
        assert self._asked is not None
        asked, self._asked = self._asked, None
        try:
            return self._compare(asked.result())
        except (WeightSyncFailed, WeightsDiverged) as error:
            logger.warning("proof of policy version %s failed, it is sent again: %s", self._pushed, error)
            return None

    def _compare(self, found: list[list[list[float]]]) -> Agreement:
        assert self._scored is not None
        assert self._pushed is not None
        return self._probe.compare(self._scored.result(), found, version=self._pushed)
