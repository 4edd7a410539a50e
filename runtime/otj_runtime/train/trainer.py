"""OnlineTrainer: the loop that both methods share, as a `transformers.Trainer` whose batches are sampled from the policy itself.

One optimizer step, on every rank at once:

    prompts (PromptOrder)
      -> sampler.next(prompts)            weights into the generator, completions and rewards back: see `sampling`
      -> select(groups)                   what to train on: the subclass knows (advantages, pairs)
      -> micro-batches                    dealt out evenly, padded
      -> compute_loss per micro-batch     forward, the subclass's loss, backward
      -> optimizer step, log, checkpoint  transformers

The hook is `get_batch_samples`: transformers asks it for the micro-batches of an optimizer step, and gets freshly sampled ones.
`policy version` is the number of optimizer steps behind the weights: `state.global_step`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.types import Group
from otj_runtime.train.batch import MicroBatch, Selection, collate, split
from otj_runtime.train.checkpoints import INCOMPLETE, publish_checkpoint, remove_old_checkpoints
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.logprobs import Scorer, Scores
from otj_runtime.train.meters import Meters
from otj_runtime.train.prompts import PromptLoader, PromptOrder
from otj_runtime.train.report import Reporter
from otj_runtime.train.sampling import Sampler, Weights


class OnlineTrainer(Trainer):
    """Trains a causal language model on its own samples. Subclasses say which rows to train on and with which loss.

    Args:
        model: the policy, a transformers causal language model; trained in place.
        args: the method's configuration.
        train_dataset: rows with a `prompt` and whatever columns the rewards read.
        rollouts: completes and scores prompts.
        weights: brings the policy into the generator; None if the engine uses the model itself.
        reference: the base model, frozen; None unless the loss needs it.
        pad_id: token that fills rows.
        reporter: tells of every step.
    """

    unit = 1
    """Consecutive rows that must stay in one micro-batch."""

    def __init__(
        self,
        model: Any,
        *,
        args: OnlineConfig,
        train_dataset: Any,
        rollouts: Rollouts,
        weights: Weights | None,
        reference: Any | None = None,
        pad_id: int,
        reporter: Reporter,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=[reporter])
        self.loss_is_scaled_for_ga = True  # `normalizer` already spans all micro-batches of a step
        self.config = args
        self._prompts = train_dataset
        self._output = Path(str(args.output_dir))
        self.rollouts = rollouts
        self.weights = weights
        self.reference = reference
        self.meters = Meters()
        self.reporter = reporter
        self._pad_id = pad_id
        self.sampler = Sampler(
            config=args, rollouts=rollouts, weights=weights, meters=self.meters, reporter=reporter, build=self._build_batches
        )
        self._resumed_from: str | None = None
        self._random_state_restored = False
        self._step_began: float | None = None

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with the reference."""

    @abstractmethod
    def select(self, groups: list[Group]) -> Selection:
        """What to train on of this rank's groups, once per generation. Collective: it may look at the rewards of all ranks."""

    @abstractmethod
    def policy_loss(self, batch: MicroBatch, logprobs: torch.Tensor) -> torch.Tensor:
        """Sum of the method's loss over the micro-batch, not yet divided by `normalizer`. `logprobs`: [B, C], with gradient."""

    # -- sampling ------------------------------------------------------------------------------------------------------------

    def push_weights(self) -> None:
        """Bring the current policy into the generator, unless it is there already. Collective."""
        self.sampler.push(self.state.global_step)

    def get_train_dataloader(self) -> PromptLoader:
        """Prompts of this rank, one item per micro-batch."""
        order = PromptOrder(
            size=len(self._prompts),
            per_rank=self.config.prompts_per_rank,
            repeats=self.config.micro_batches_per_generation,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            seed=self.config.seed if self.config.shuffle_dataset else None,
        )
        return PromptLoader(self._prompts, order)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], None]:
        """The micro-batches of the next optimizer step, sampled now if the last generation is used up."""
        self._load_rng_state(self._resumed_from)
        if self._step_began is None:
            self.push_weights()  # the first push waits for the generator's start, which is no part of a step
            self._step_began = time.monotonic()
        items = (item for _, item in zip(range(num_batches), epoch_iterator, strict=False))
        return [self.sampler.next(samples, step=self.state.global_step) for samples in items], None

    def _build_batches(self, groups: list[Group]) -> list[MicroBatch]:
        selection = self.select(groups)
        parts = split(selection.rows, parts=int(self.config.steps_per_generation or 1), unit=self.unit)
        masked = self.config.mask_truncated_completions
        batches = [collate(part, pad_id=self._pad_id, mask_truncated=masked, normalizer=selection.normalizer) for part in parts]
        batches = [batch.to(self.accelerator.device) for batch in batches]
        # The first optimizer step meets its micro-batches with the old policy and notes it; for later steps it would be too late.
        for batch in batches[self.config.gradient_accumulation_steps :]:
            with torch.no_grad(), self.compute_loss_context_manager():
                batch.old_logprobs = self._scorer(self.model_wrapped, batch).logprobs
        return batches

    # -- learning ------------------------------------------------------------------------------------------------------------

    # transformers knows dictionaries; our batches are a class, and on the device already.
    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:  # type: ignore[override]
        return inputs

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The method's loss of one micro-batch, divided by what the whole step counts."""
        if self.needs_reference and inputs.reference_logprobs is None:
            inputs.reference_logprobs = self._reference_logprobs(model, inputs)
        scores = self._scorer(model, inputs)
        if inputs.old_logprobs is None:
            inputs.old_logprobs = scores.logprobs.detach()
        self._measure(inputs, scores)
        return self.policy_loss(inputs, scores.logprobs) / inputs.normalizer

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.accelerator.unwrap_model(self.model), temperature=self.config.temperature)

    @cached_property
    def _reference_scorer(self) -> Scorer:
        return Scorer(self.accelerator.unwrap_model(self.reference), temperature=self.config.temperature)

    @torch.no_grad()
    def _reference_logprobs(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """[B, C] under the base model: a copy of its own, or the policy without its adapters."""
        if self.reference is not None:
            return self._reference_scorer(self.reference, batch).logprobs
        with self.accelerator.unwrap_model(model).disable_adapter():
            return self._scorer(model, batch).logprobs

    def mean_over_ranks(self, number: float) -> float:
        """The mean of every rank's number. Collective."""
        return float(self.accelerator.reduce(torch.tensor(number, device=self.accelerator.device), reduction="mean"))

    def _measure(self, batch: MicroBatch, scores: Scores) -> None:
        """Entropy, and how far trainer and sampler disagree on the same tokens: the early sign of a stale or mismatched generator."""
        assert batch.old_logprobs is not None
        mask = batch.completion_mask
        tokens = mask.sum()
        difference = ((batch.old_logprobs - batch.sampler_logprobs).abs() * mask).nan_to_num(nan=0.0)
        self.meters.add(
            {
                "sampling/sampling_logp_difference/mean": difference.sum() / tokens.clamp(min=1),
                "sampling/sampling_logp_difference/max": difference.max(),
                "entropy": (scores.entropy * mask).sum() / tokens.clamp(min=1),
            },
            weight=tokens,
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """transformers estimates this from a dictionary of inputs, which a micro-batch is not; it is reported nowhere."""
        return 0

    # -- resuming ------------------------------------------------------------------------------------------------------------
    # transformers restores the random state after it has asked for the first batch; here, asking is sampling. So it is restored
    # before that, once.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed_from = resume_from_checkpoint

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self._random_state_restored:
            super()._load_rng_state(checkpoint)
            self._random_state_restored = True

    # -- reporting and saving ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' log line plus everything measured since the last one, averaged over ranks. Collective."""
        if "loss" in logs and self._step_began is not None:
            now = time.monotonic()
            self.meters.add({"step_time": (now - self._step_began) / max(1.0, self.config.logging_steps)})
            self._step_began = now
            logs = logs | self.meters.take(self.accelerator)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._output / INCOMPLETE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(self._output, self.state.global_step)
            remove_old_checkpoints(self._output, keep=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
