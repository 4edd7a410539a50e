"""SavingTrainer: a `transformers.Trainer` that leaves nothing half done.

Checkpoints. transformers writes model, optimizer, scheduler, every rank's random state and its own state below `.incomplete/`; each rank
adds `rank-<r>.pt`, which holds what transformers does not know: micro-batches of a generation that are still to be trained on, and running
totals; `common.pt`, where there is one, holds what is the same on all of them. When all have written, the folder is renamed to its place
(`checkpoints`). A run that resumes there makes the very steps, numbers included, that the first one would have made.

In the middle of a step. A checkpoint is then one of the last finished step: gradients are forgotten, and the random and rank state saved
are those noted at the begin of the step (`begin_step`).

Export. `save_model` leaves a plain transformers folder: weights, configuration, generation configuration, tokenizer, and a model card.
`push_to_hub` uploads such a folder and never the output folder, which holds checkpoints and caches.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils.hub import hf_api

from otj_runtime.api import Algorithm
from otj_runtime.pod.metrics import read_metrics
from otj_runtime.pod.names import METRICS_FILE
from otj_runtime.train.card import model_card
from otj_runtime.train.checkpoints import (
    INCOMPLETE,
    complete_checkpoints,
    forget_incomplete,
    publish_checkpoint,
    remove_old_checkpoints,
)
from otj_runtime.train.export import saved_whole
from otj_runtime.train.signals import StopOnSignal

EXPORT = "model"
"""Folder of the trained model below the output folder."""

CARD = "README.md"
COMMON_FILE = "common.pt"


@dataclass(frozen=True)
class RandomState:
    """State of every random generator that this rank draws from."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """The current state."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Draw again from here on."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class SavingTrainer(Trainer):
    """Saves whole checkpoints and whole models. Subclasses say what a rank must remember besides what transformers saves."""

    algorithm: ClassVar[Algorithm]

    def __init__(self, *, base_model: str, dataset_name: str | None, reward_names: Sequence[str], **keywords: Any) -> None:
        super().__init__(**keywords)
        set_seed(self.args.seed, device_specific=True)  # ranks that generate by themselves must not all draw the same numbers
        self.pop_callback(JITCheckpointCallback)
        self.stop = StopOnSignal(self.accelerator, self.save_last_step)
        self.add_callback(self.stop)
        self._output = Path(str(self.args.output_dir))
        self._facts: dict[str, Any] = {"base_model": base_model, "dataset": dataset_name, "rewards": reward_names}
        self._resumed_from: str | None = None
        self._restored = False
        self._begun: tuple[RandomState, dict[str, Any]] | None = None

    @abstractmethod
    def rank_state(self) -> dict[str, Any]:
        """What this rank must remember, between two optimizer steps."""

    @abstractmethod
    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """Remember it."""

    def common_state(self) -> dict[str, Any] | None:
        """What the run must remember and every rank knows; None for nothing. Tensors and plain values only."""
        return None

    def restore_common_state(self, state: dict[str, Any]) -> None:
        """Remember it."""

    def train(self, *args: Any, **keywords: Any) -> Any:
        """See transformers. With `args.enable_jit_checkpoint`, SIGTERM ends it early, with a checkpoint."""
        if self.args.should_save:
            forget_incomplete(self._output)
        self.accelerator.wait_for_everyone()
        with self.stop.listening() if self.args.enable_jit_checkpoint else nullcontext():
            return super().train(*args, **keywords)

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Note what a checkpoint in the middle of the step that begins must hold. Before the first step, restore what one held."""
        self._load_rng_state(self._resumed_from)
        self._begun = (RandomState.now(), self.rank_state())

    def save_last_step(self) -> None:
        """Save a checkpoint of the last finished step in the middle of the next, unless there is one. Collective."""
        step = self.state.global_step
        if self._begun is None or step == 0 or self._output / f"checkpoint-{step}" in complete_checkpoints(self._output):
            return
        self._begun[0].restore()
        self._save_checkpoint(self.model, None, rank_state=self._begun[1])

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._output / INCOMPLETE)

    def _save_checkpoint(self, model: Any, trial: Any, rank_state: dict[str, Any] | None = None) -> None:
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        folder = self._output / INCOMPLETE / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)  # rank 0 may still be on its way
        torch.save(rank_state or self.rank_state(), folder / self._rank_file)
        if self.args.should_save and (common := self.common_state()) is not None:
            torch.save(common, folder / COMMON_FILE)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(self._output, step)
            remove_old_checkpoints(self._output, keep=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    @property
    def _rank_file(self) -> str:
        return f"rank-{self.accelerator.process_index}.pt"

    # transformers restores the random state after it has asked for the first batch; here, asking is sampling. So it is restored before
    # that, once. Which checkpoint it is, is heard where every strategy passes: the model of a DeepSpeed run is loaded elsewhere.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._restored:
            return
        super()._load_rng_state(checkpoint)
        own = Path(checkpoint) / self._rank_file
        if own.exists():  # not after a change of the number of ranks: then the generation begins anew
            self.restore_rank_state(torch.load(own, map_location=self.accelerator.device, weights_only=False))
        if (common := Path(checkpoint) / COMMON_FILE).exists():
            self.restore_common_state(torch.load(common, map_location=self.accelerator.device, weights_only=True))
        self._restored = True

    # -- export --------------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as a transformers folder with its card, and push it if `args.push_to_hub`. Collective."""
        folder = Path(output_dir or str(self.args.output_dir))
        with saved_whole(self.accelerator, whole=not _internal_call):
            super().save_model(str(folder), _internal_call=True)
        if _internal_call:
            return
        self.write_card(folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        dataset_name: str | None = None,
        **_: Any,
    ) -> Any:
        """Upload the model, tokenizer and card to `args.hub_model_id`. Collective.

        Args:
            blocking: whether to return only when it is uploaded.
            dataset_name: what the card names as the source of the prompts.

        Returns:
            What `huggingface_hub.upload_folder` returns, on rank 0.
        """
        if dataset_name is not None:
            self._facts["dataset"] = dataset_name
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        folder = self._output / EXPORT
        with saved_whole(self.accelerator, whole=True):
            super().save_model(str(folder), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.write_card(folder)
        return hf_api().upload_folder(  # type: ignore[call-overload]  # it knows literals only
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    def write_card(self, folder: Path) -> None:
        """Write the model card into `folder`, on rank 0."""
        if not self.is_world_process_zero():
            return
        lines, _ = read_metrics(self._output / METRICS_FILE)
        name = self.hub_model_id or (folder if folder.name != EXPORT else folder.parent).absolute().name
        (folder / CARD).write_text(model_card(name=name, method=self.algorithm, lines=lines, **self._facts))
