"""OnlineTrainer: the loop that both methods share, as a `transformers.Trainer` whose batches are sampled from the policy itself.

One optimizer step, on every rank at once, and where to read each part:

    prompts                             `prompts`: the rows that this rank samples
      -> weights into the generator     `sampling`: the policy as the last step left it; `weights.sync`: written, installed, proven
      -> completions                    `rollout.pipeline`: asked for now or a generation ago; `rollout.vllm_engine`
      -> rewards                        `rollout.collect`, `rewards.scoring`
      -> advantages, or pairs           `select` of `grpo` and `online_dpo`: what to train on
      -> micro-batches                  `batch`: dealt out evenly, padded
      -> log-probabilities -> loss      `compute_loss` below: `logprobs`, then `policy_loss` of the method, made of `losses`; backward
      -> optimizer step, log            transformers; `report`
      -> checkpoint                     `saving`

The hook is `get_batch_samples`: transformers asks it for the micro-batches of an optimizer step, and gets freshly sampled ones.
`policy version` is the number of optimizer steps behind the weights: `state.global_step`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from otj_runtime.data.tokenize import PROMPT_IDS, PromptEncoder
from otj_runtime.rewards import build_rewards
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.types import Group
from otj_runtime.train.batch import MicroBatch, Selection, collate, split
from otj_runtime.train.child import plan_server
from otj_runtime.train.completions import CompletionTable
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.engine import make_engine
from otj_runtime.train.evaluate import evaluate
from otj_runtime.train.generator import Generator
from otj_runtime.train.loading import default_output, is_peft_model, load_policy, source_of, source_of_prompts
from otj_runtime.train.logprobs import Scorer, Scores
from otj_runtime.train.meters import Meters, device_memory
from otj_runtime.train.mismatch import mismatch
from otj_runtime.train.prompts import PromptLoader, PromptOrder, prepare_eval_prompts, prepare_prompts, prompt_order
from otj_runtime.train.reference import frozen_copy
from otj_runtime.train.report import Reporter
from otj_runtime.train.sampling import Sampler
from otj_runtime.train.saving import SavingTrainer
from otj_runtime.train.signals import StopRequested
from otj_runtime.train.throughput import step_clock


class OnlineTrainer(SavingTrainer):
    """Trains a causal language model on its own samples. Subclasses say which rows to train on and with which loss.

    With `args.use_vllm`, completions come from `generator`, or, without one, from a vLLM server that rank 0 starts and ends (see
    `child`); else from the model itself.

    Args:
        model: the policy: a name on the hub, a folder, or a transformers causal language model, which is trained in place.
        reward_funcs: a callable, a sequence-classification model or the name of one, or a list of these; see `rewards.build_rewards`.
        args: the method's configuration. Default: its defaults, with an output folder named after model and method.
        train_dataset: rows with a `prompt` (text, or messages) and whatever columns the rewards read.
        eval_dataset: such rows, to evaluate on.
        processing_class: the model's tokenizer. Default: loaded from the model's name or folder.
        reward_processing_classes: tokenizers of reward models, one per reward function or None. Default: loaded with them.
        callbacks: of transformers' Trainer, in addition to its own.
        optimizers: optimizer and scheduler. Default: as `args` say.
        peft_config: makes the policy a PEFT model of which only the adapter is trained.
        judge: compares completions in pairs, besides or instead of `reward_funcs`; see `rewards.judge`.
        generator: a running vLLM server to use instead of starting one.

    Raises:
        ImportError: if vLLM is wanted and not installed.
        ValueError: if an argument does not fit the machine or the others.
        ModelNotFound, DatasetInvalid, RewardImportFailed: naming what cannot be used.
    """

    unit = 1
    """Consecutive rows that must stay in one micro-batch."""

    config_class: ClassVar[type[OnlineConfig]]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OnlineConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        judge: Any = None,
        generator: Generator | None = None,
    ) -> None:
        args = args or self.config_class(output_dir=default_output(model, self.algorithm))
        if train_dataset is None:
            raise ValueError("train_dataset: is missing; give rows with a prompt")
        plan = plan_server(args) if args.use_vllm and generator is None else None
        policy, tokenizer = load_policy(model, processing_class, args=args, peft_config=peft_config)
        encoder = PromptEncoder(tokenizer, template_kwargs=args.chat_template_kwargs)
        prompts_source = source_of_prompts(train_dataset)
        longest = prompt_limit(args, policy.config)
        train_dataset = prepare_prompts(train_dataset, encoder, args=args, max_tokens=longest)
        self._prepare_eval = partial(prepare_eval_prompts, encoder=encoder, args=args, max_tokens=longest)
        rewards = build_rewards(
            reward_funcs, reward_weights=args.reward_weights, reward_processing_classes=reward_processing_classes, judge=judge
        )
        self.config = args
        self.reporter = Reporter(output=Path(str(args.output_dir)), world_size=args.world_size)
        super().__init__(
            base_model=str(source_of(model)),
            dataset_name=prompts_source,
            reward_names=rewards.names,
            model=policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self._prepare_eval(eval_dataset),
            processing_class=tokenizer,
            callbacks=[self.reporter, *(callbacks or [])],
            optimizers=optimizers,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)  # the reporter's lines say the same, readably
        self.loss_is_scaled_for_ga = True  # `normalizer` already spans all micro-batches of a step
        self._prompts = train_dataset
        self._order: PromptOrder | None = None
        self.reference = self.make_reference()
        self.meters = Meters()
        self._pad_id = tokenizer.pad_token_id
        engine, self.weights = make_engine(
            policy=self.accelerator.unwrap_model(self.model),
            tokenizer=tokenizer,
            prompts=(row[PROMPT_IDS] for row in train_dataset),
            generator=generator,
            plan=plan,
            output=self._output,
            owner=self,
        )
        self.rollouts = Rollouts(engine=engine, encoder=encoder, rewards=rewards, tokenizer=tokenizer, trainer_state=lambda: self.state)
        self.completions = CompletionTable(self._output) if args.log_completions else None
        self.sampler = Sampler(
            config=args,
            samples=self._samples,
            rollouts=self.rollouts,
            weights=self.weights,
            meters=self.meters,
            reporter=self.reporter,
            stop=self.stop,
            build=self._build_batches,
        )
        self._step_began: float | None = None
        self._clock = step_clock(policy, self.accelerator.device)

    def make_reference(self) -> Any | None:
        """The base model, frozen, that the loss compares with; None if it needs none, or a PEFT model without its adapter is it."""
        if not self.needs_reference or is_peft_model(self.model):
            return None
        return frozen_copy(self.accelerator.unwrap_model(self.model), device=self.accelerator.device)

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with the reference."""

    @abstractmethod
    def select(self, groups: list[Group]) -> Selection:
        """What to train on of this rank's groups, once per generation. Collective: it may look at the rewards of all ranks."""

    @abstractmethod
    def policy_loss(self, batch: MicroBatch, logprobs: torch.Tensor) -> torch.Tensor:
        """Sum of the method's loss over the micro-batch, not yet divided by `normalizer`. `logprobs`: [B, C] float32, in nats, with
        gradient."""

    # -- sampling ------------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers. However it ends, no rollout is left in flight."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.sampler.cancel()

    def push_weights(self) -> None:
        """Bring the current policy into the generator, unless it is there already. Collective."""
        self.sampler.push(self.state.global_step)

    def get_train_dataloader(self) -> PromptLoader:
        """Counts micro-batches for transformers."""
        return PromptLoader(self._prompt_order())

    def _samples(self, generation: int) -> list[dict[str, Any]]:
        if self._order is None:
            self._order = self._prompt_order()
        return [self._prompts[index] for index in self._order.of_generation(generation)]

    def _prompt_order(self) -> PromptOrder:
        accelerator = self.accelerator
        return prompt_order(self._prompts, args=self.config, rank=accelerator.process_index, ranks=accelerator.num_processes)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[int]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], None]:
        """The micro-batches of the next optimizer step, sampled now if the last generation is used up."""
        self.begin_step()
        if self.state.global_step >= self.state.max_steps:  # resumed from the checkpoint of the last step; transformers would make one more
            self.control.should_training_stop = True
            return [], None
        if self._step_began is None:
            self.push_weights()  # the first push waits for the generator's start, which is no part of a step
            self._step_began = time.monotonic()
        counted = sum(1 for _ in zip(range(num_batches), epoch_iterator, strict=False))
        try:
            batches = [self.sampler.next(step=self.state.global_step, max_steps=self.state.max_steps) for _ in range(counted)]
        except StopRequested:
            self.stop.stop(self.control)
            batches = []
        self._clock.batches_ready()
        return batches, None

    def _build_batches(self, groups: list[Group]) -> list[MicroBatch]:
        selection = self.select(groups)
        if self.completions is not None:
            self.completions.add(groups, {id(row.completion): row.advantage for row in selection.rows})
        config = self.config
        steps = config.whole_steps_per_iteration
        parts = split(selection.rows, parts=int(config.steps_per_generation or 1), unit=self.unit, steps=steps)
        masked = config.mask_truncated_completions
        batches = [collate(part, pad_id=self._pad_id, mask_truncated=masked, normalizer=selection.normalizer) for part in parts]
        batches = [batch.to(self.accelerator.device) for batch in batches]
        # The first optimizer step meets its micro-batches with the old policy and notes it; for later steps it would be too late.
        for batch in batches[config.gradient_accumulation_steps :]:
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
        self._clock.count(scores.tokens)
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
        entropy = (scores.entropy * mask).sum() / tokens.clamp(min=1)
        self.meters.add({"entropy": entropy, **mismatch(batch.old_logprobs, batch.sampler_logprobs, mask)}, weight=tokens)

    def floating_point_ops(self, inputs: Any) -> int:
        """transformers estimates this from a dictionary of inputs, which a micro-batch is not; it is reported nowhere."""
        return 0

    # -- evaluating ----------------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Answer the prompts of the eval dataset (of each, if there are several by name) with the current weights. Collective.

        Returns:
            the metrics of training where they make sense, under TRL's names with the prefix; none if a signal ended it, and the training.
        """
        prompts: Any = self.eval_dataset if eval_dataset is None else self._prepare_eval(eval_dataset)
        if prompts is None:
            raise ValueError("eval_dataset: is missing; give rows with a prompt")
        if isinstance(prompts, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in prompts.items()]
            return {name: value for part in parts for name, value in part.items()}
        self.push_weights()

        def answer() -> dict[str, float]:
            return evaluate(
                self.rollouts,
                prompts,
                config=self.config,
                accelerator=self.accelerator,
                policy_version=self.state.global_step,
                stop=self.stop,
            )

        try:
            found = answer()
            if not self.sampler.settle():  # it was of unknown weights
                found = answer()
        except StopRequested:
            self.sampler.settle()
            self.stop.stop_after_step(self.control)
            self.control.should_evaluate = False  # on_evaluate would say so; the end of the epoch would begin another one
            return {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    # -- reporting and remembering ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' log line plus everything measured since the last one, averaged over ranks. Collective."""
        if "loss" in logs and self._step_began is not None:
            now = time.monotonic()
            self.meters.add({"step_time": (now - self._step_began) / max(1.0, self.config.logging_steps)})
            self._step_began = now
            self.meters.add(self._clock.read())
            self.meters.add(device_memory(self.accelerator.device))
            logs = logs | self.meters.take(self.accelerator)
            if self.completions is not None:
                self.completions.write(self.state.global_step, first=self.is_world_process_zero())
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        began = time.monotonic()
        super()._save_checkpoint(*args, **kwargs)
        self.meters.add({"time/ckpt": time.monotonic() - began})

    def rank_state(self) -> dict[str, Any]:
        """See `SavingTrainer`."""
        return {"meters": self.meters.state(), "sampler": self.sampler.state()}

    def restore_rank_state(self, state: dict[str, Any]) -> None:
        """See `SavingTrainer`."""
        self.meters.restore(state["meters"])
        self.sampler.restore(state["sampler"])


def prompt_limit(args: OnlineConfig, model_config: Any) -> int | None:
    """Longest prompt that leaves room for a completion, in tokens; None if nothing limits it."""
    window = args.vllm_max_model_len or getattr(model_config.get_text_config(), "max_position_embeddings", None)
    limits = [args.max_prompt_length, window - args.max_completion_length if window is not None else None]
    return min((limit for limit in limits if limit is not None), default=None)
