"""AdapterSync: brings a LoRA adapter, and nothing else, into a generator that loaded the frozen base model itself.

One push, on every rank at once:

    gather            the thin matrices, whole (collective where they are sharded)
    write             rank 0: a PEFT adapter folder beside where the mailbox would be, under a new name; from here on rank 0 alone:
    pause(wait)       requests under way end first: vLLM ties a request to the adapter it began with
    load              vLLM's `/v1/load_lora_adapter`, under the name by which the policy is asked for; the one before is unloaded
    label, reset_prefix_cache, resume, probe

It trades generality for bytes: an adapter of rank 16 is a hundredth of its model, but requests must not span a push, so it serves
trainers that sample on-policy; and only the layers that vLLM knows LoRA for can be adapted. Otherwise the adapter is merged
(`composed`), which needs neither. The folder of the last push stays, so a generator that was restarted gets it again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from otj_runtime.api import DType
from otj_runtime.weights.composed import available, is_collective, whole
from otj_runtime.weights.control import RETURN_SECONDS, GeneratorControl
from otj_runtime.weights.errors import WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.install import Phases, only_one
from otj_runtime.weights.probe import Agreement, Probe, TrainerScores
from otj_runtime.weights.ranks import Ranks
from otj_runtime.weights.sync import SYNC_SECONDS, Proof, SyncReport
from otj_runtime.weights.tensors import reshard

logger = logging.getLogger(__name__)


class AdapterSync:
    """The training ranks' way to the generator's adapter; the arguments are those of `WeightSync`.

    Args:
        model: the unwrapped PEFT model.
        directory: folder in memory, or on a volume, that the generator sees under the same path.
        control: the generator.
        dtype: what the generator computes in.
        ready_timeout_s: how long the generator may take to start, in seconds.
        prompts: token ids of prompts of the run, the same on every rank, for the probe.
    """

    def __init__(
        self,
        *,
        model: Any,
        directory: Path,
        control: GeneratorControl,
        dtype: DType,
        ready_timeout_s: float = RETURN_SECONDS,
        prompts: Iterable[list[int]] = (),
    ) -> None:
        self._model = model
        self._adapter = model.active_adapters[0]
        self._directory = directory
        self._control = control
        self._ready_timeout_s = ready_timeout_s
        self._probe = Probe(model, prompts, DType(dtype), adapter_apart=True)
        self._ranks: Ranks | None = None
        self._pushes = 0
        self._pushed: tuple[int, Path, TrainerScores] | None = None
        self._proof: Proof | None = None

    @property
    def version(self) -> int | None:
        """The version that was pushed last."""
        return None if self._pushed is None else self._pushed[0]

    def push(self, version: int) -> SyncReport:
        """Bring the current adapter into the generator as `version`. Collective.

        Raises:
            GeneratorNotReady: if the generator does not answer in time.
            WeightSyncFailed: if a phase failed twice; the text names it.
            WeightsDiverged: if the probe did not agree, twice.
        """
        began = time.monotonic()
        try:
            return self._attempt(version, began, attempt=1)
        except (WeightSyncFailed, WeightsDiverged) as error:
            logger.warning("sync of policy version %d failed and is made again: %s", version, error)
            return self._attempt(version, began, attempt=2)

    def proven(self, version: int) -> Proof:
        """What the probe found when `version`, the one pushed last, was pushed."""
        if self._proof is None or version != self.version:
            raise WeightSyncFailed(f"proof: version {version} is not the one that was pushed last", phase="proof")
        return self._proof

    def reinstall(self) -> None:
        """Give a generator that was restarted the adapter that was pushed last. Not collective: any rank may ask, at any time.

        Raises:
            GeneratorLost: if it does not come back in time.
            WeightSyncFailed, WeightsDiverged: if the adapter cannot be loaded, or does not prove right.
        """
        if self._pushed is None:
            raise WeightSyncFailed("reinstall: nothing was pushed yet", phase="reinstall")
        version, folder, scores = self._pushed
        with only_one(self._directory / "adapter.lock", deadline_s=2 * RETURN_SECONDS):
            self._control.wait_returned()
            if self._control.weight_version() != str(version):
                self._install(version, folder, Phases())
                self._compare(version, scores)

    def _attempt(self, version: int, began: float, *, attempt: int) -> SyncReport:
        phases = Phases()
        self._ranks = ranks = self._ranks or Ranks(timeout_s=self._ready_timeout_s + SYNC_SECONDS)
        reshard(self._model)
        with phases("write"):
            tensors, collective = self._gather(leads=ranks.rank == 0)
        scores = self._probe.score() if collective else None
        reshard(self._model)
        self._pushes += 1
        folder = self._directory / f"adapter-{self._pushes}"

        def finish() -> tuple[SyncReport, Proof, TrainerScores]:
            with phases("write"):
                self._write(folder, tensors)
            with phases("wait"):
                self._control.wait_healthy(deadline_s=self._ready_timeout_s)
            self._install(version, folder, phases)
            with phases("probe"):
                own = scores or self._probe.score()
                agreement = self._compare(version, own)
            sent = sum(tensor.nbytes for tensor in tensors.values())
            total = time.monotonic() - began
            report = SyncReport(version=version, total_s=total, phases=phases.seconds, bytes=sent, attempts=attempt)
            return report, Proof(agreement=agreement, again=False), own

        report, self._proof, proven = ranks.lead(finish, phase="install")
        self._pushed = version, folder, proven
        return report

    def _gather(self, *, leads: bool) -> tuple[dict[str, Any], bool]:
        """The adapter's matrices by PEFT's names on rank 0 (none elsewhere), and whether all ranks had to take part."""
        marker = f".{self._adapter}."
        parts = {
            name.replace(marker, "."): available(p) for name, p in self._model.named_parameters() if ".lora_" in name and marker in name
        }
        collective = any(map(is_collective, parts.values())) or any(map(is_collective, map(available, self._model.parameters())))
        tensors = {}
        for name, part in parts.items():
            if leads or is_collective(part):
                tensor = whole(part)
                if leads:
                    tensors[name] = tensor.detach().to(device="cpu", dtype=tensor.dtype).contiguous()
        return tensors, collective

    def _write(self, folder: Path, tensors: dict[str, Any]) -> None:
        """An adapter folder as PEFT writes it. Folders of earlier pushes but the last are removed."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        self._model.peft_config[self._adapter].save_pretrained(str(folder))
        kept = {folder, self._pushed[1]} if self._pushed is not None else {folder}
        for old in self._directory.glob("adapter-*"):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def _install(self, version: int, folder: Path, phases: Phases) -> None:
        with phases("pause"):
            self._control.drain()
        try:
            with phases("update"):
                self._control.load_adapter(str(folder))
            with phases("finish"):
                self._control.label(version)
            with phases("reset_prefix_cache"):
                self._control.reset_prefix_cache()
        finally:
            with phases("resume"):
                self._control.resume()

    def _compare(self, version: int, scores: TrainerScores) -> Agreement:
        return self._probe.compare(scores, self._control.score(self._probe.sequences), version=version)
