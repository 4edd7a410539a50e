"""GRPOConfig and OnlineDPOConfig: `transformers.TrainingArguments` plus what online training adds, under TRL's names.

The defaults are for a policy that is trained on its own samples: a small constant learning rate, every step logged, and columns
kept because rewards read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

GRPO_LOSSES = ("grpo", "gspo", "bnpo", "dr_grpo", "dapo", "cispo")
"""Values of `loss_type`; see `grpo`."""

SAMPLER_WEIGHTS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
"""Values of `vllm_importance_sampling_mode`; see `losses.sampler_weight`."""

CISPO_LARGEST_RATIO = 5.0
"""What ScaleRL (arXiv:2510.13786) recommends; TRL falls back on `epsilon`, which would shrink every gradient to a fifth."""

NEUTRAL = {"top_p": (1.0, None), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
"""Values of sampling arguments that leave the policy's distribution as it is."""


@dataclass
class OnlineConfig(TrainingArguments):
    """Arguments that both methods share."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep false: rewards read the dataset's columns."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Experiment trackers to report to."})
    enable_jit_checkpoint: bool = field(default=True, metadata={"help": "Save a checkpoint and end on SIGTERM, within one micro-batch."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the hub: only end, with the finished model."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Set true for models of which a step may leave parameters unused, such as mixtures of experts."}
    )

    num_generations: int = field(default=8, metadata={"help": "Completions sampled for each prompt; they form a group."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches that share one generation. Default: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Times each generation is trained on."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens; overlong_prompts says what becomes of longer ones."}
    )
    overlong_prompts: str = field(
        default="refuse", metadata={"help": "What becomes of prompts that are too long: refuse them before training, or drop them."}
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further arguments of the tokenizer's chat template, such as enable_thinking."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; the trainer divides logits by it, too."})
    top_p: float = field(default=1.0, metadata={"help": "Keep 1: cutting the distribution off would bias the importance ratio."})
    top_k: int | None = field(default=0, metadata={"help": "Keep 0: cutting the distribution off would bias the importance ratio."})
    min_p: float | None = field(default=None, metadata={"help": "Keep null: cutting the distribution off would bias the importance ratio."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Keep 1: bending the distribution would bias the importance ratio."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions that hit the length limit out of the loss."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weights of the reward functions. Default: all 1."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout, so that trainer and generator agree."})
    model_init_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Keyword arguments of from_pretrained."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Visit prompts in a random order that the seed fixes."})
    log_completions: bool = field(
        default=False, metadata={"help": "Write every completion and what it earned to completions/*.parquet in the output folder."}
    )
    num_completions_to_print: int = field(default=2, metadata={"help": "Completions shown with each log line."})
    num_generations_eval: int = field(default=1, metadata={"help": "Completions of each prompt in evaluation."})
    eval_temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of evaluation; 0 answers greedily."})
    eval_prompts: int = field(default=0, metadata={"help": "Held-out prompts answered greedily before and after training; 0 for none."})

    staleness: int = field(
        default=0,
        metadata={"help": "Generations that are sampled ahead of the one trained on: 0 waits for each, 1 samples while it trains."},
    )
    straggler_factor: float | None = field(
        default=None,
        metadata={"help": "Drop prompts that take this many times longer than three quarters of their batch. Default: finish all."},
    )

    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM instead of transformers."})
    vllm_device: str = field(
        default="auto",
        metadata={"help": "Device on which vLLM generates: auto (the first GPU after those that train), cuda:K, cuda:K,L, or cpu."},
    )
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the device's memory that vLLM takes."})
    vllm_dtype: str = field(default="auto", metadata={"help": "Type of vLLM's weights."})
    vllm_max_model_len: int | None = field(default=None, metadata={"help": "Longest prompt plus completion that vLLM accepts, in tokens."})
    vllm_enable_prefix_caching: bool = field(default=True, metadata={"help": "Let vLLM keep the keys and values of shared prompts."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        if self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy: {self.hub_strategy} uploads the output folder, which holds checkpoints and caches, while training writes "
                "to it; leave it at end"
            )
        self._check_sampling()
        if self.use_liger_kernel:  # its fused loss needs labels, and replaces the forward whose output layer `logprobs` borrows
            self.liger_kernel_config = (self.liger_kernel_config or {}) | {"fused_linear_cross_entropy": False}
        # One process trains on one GPU: transformers would spread its batches over every GPU it sees, the generator's included.
        self._n_gpu = min(self.n_gpu, 1)
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.staleness < 0:
            raise ValueError(f"staleness: {self.staleness} is negative; 0 waits for each generation")
        if self.straggler_factor is not None and self.straggler_factor < 1:
            raise ValueError(f"straggler_factor: {self.straggler_factor} would drop prompts that are on time; use at least 1")
        if self.num_generations < 2:
            raise ValueError(f"num_generations: {self.num_generations} is too few; use at least 2")
        if self.completions_per_rank % self.num_generations:
            raise ValueError(
                f"num_generations: {self.num_generations} does not divide the {self.completions_per_rank} completions of a rank "
                "(per_device_train_batch_size x steps_per_generation)"
            )
        if self.micro_batches_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps} does not divide the {self.micro_batches_per_generation} "
                "micro-batches of a generation (steps_per_generation x num_iterations)"
            )

    def _check_sampling(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} leaves nothing to compare; use a value above 0")
        for name, neutral in NEUTRAL.items():
            if (value := getattr(self, name)) not in neutral:
                raise ValueError(
                    f"{name}: {value} changes what the generator samples from, and the trainer's probabilities would not be those of the "
                    f"sampled tokens: every importance ratio would be biased; leave it at {neutral[0]}, and use temperature to sharpen"
                )

    @property
    def optimizer_steps_per_iteration(self) -> float:
        """Optimizer steps that one pass over a generation makes; below 1 if a step spans several passes."""
        return int(self.steps_per_generation or 1) / self.gradient_accumulation_steps

    @property
    def micro_batches_per_generation(self) -> int:
        """Micro-batches that are trained on one generation."""
        return int(self.steps_per_generation or 1) * self.num_iterations

    @property
    def completions_per_rank(self) -> int:
        """Completions one rank asks for at a time."""
        return self.per_device_train_batch_size * int(self.steps_per_generation or 1)

    @property
    def prompts_per_rank(self) -> int:
        """Prompts behind those completions."""
        return self.completions_per_rank // self.num_generations


@dataclass
class GRPOConfig(OnlineConfig):
    """Arguments of group relative policy optimization (arXiv:2402.03300) and its relatives; docs/algorithms.md has the formulas."""

    loss_type: str = field(default="dapo", metadata={"help": "Loss: grpo, gspo, bnpo, dr_grpo, dapo or cispo."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL term to the base model; 0 keeps no reference model."})
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL term by the importance ratio, so that its gradient is that of the reverse KL."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "Clipping range of the importance ratio below 1."})
    epsilon_high: float | None = field(
        default=None,
        metadata={"help": "Clipping range above 1; with cispo the largest ratio itself. Default: epsilon, and 5 with cispo."},
    )
    delta: float | None = field(
        default=None, metadata={"help": "Largest ratio with which a worse-than-average token counts. Default: unbounded."}
    )
    importance_sampling_level: str = field(
        default="token", metadata={"help": "One importance ratio per token, or per completion: token or sequence. gspo means sequence."}
    )
    scale_rewards: str | bool = field(
        default="group",
        metadata={"help": "Divide advantages by the standard deviation of their group (or true), the batch, or none (or false)."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Weigh tokens that vLLM sampled by how likely the trainer would have sampled them."}
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={"help": "How that weight is bounded: token_truncate, token_mask, sequence_truncate or sequence_mask."},
    )
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "Upper bound of that weight; null for none."})
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "Lower bound of that weight. Default: none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require("loss_type", self.loss_type, GRPO_LOSSES)
        require("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        require("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, SAMPLER_WEIGHTS)
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        require("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        if self.loss_type == "gspo":
            self.importance_sampling_level = "sequence"
        if self.delta is not None and self.loss_type == "cispo":
            raise ValueError("delta: cispo bounds the ratio with epsilon_high alone; leave delta out")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(f"vllm_importance_sampling_clip_min: {low} is not below vllm_importance_sampling_clip_max, {high}")

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high` with its default filled in."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return CISPO_LARGEST_RATIO if self.loss_type == "cispo" else self.epsilon

    @property
    def corrects_sampler(self) -> bool:
        """Whether tokens carry a weight for having been sampled by another program. transformers samples from the very policy."""
        return self.use_vllm and self.vllm_importance_sampling_correction


@dataclass
class OnlineDPOConfig(OnlineConfig):
    """Arguments of online direct preference optimization (arXiv:2402.04792)."""

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of the optimizer."})
    num_generations: int = field(default=2, metadata={"help": "Completions sampled for each prompt; the best and the worst form a pair."})
    beta: float | list[float] = field(
        default=0.1,
        metadata={
            "help": "Strength of the preference loss: smaller lets the policy move further. A list has one per epoch; the last stays."
        },
    )
    loss_type: str = field(default="sigmoid", metadata={"help": "Preference loss: sigmoid or ipo."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken from the reward of a completion that does not end."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Older name of max_completion_length; it wins where both are given."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None:
            self.max_completion_length = self.max_new_tokens
        require("loss_type", self.loss_type, ("sigmoid", "ipo"))
        betas = self.beta if isinstance(self.beta, list) else [self.beta]
        if not betas or min(betas) <= 0:
            raise ValueError(f"beta: {self.beta} must be above 0 (in a list, every one): it divides the pull towards the reference")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty <= 0:
            raise ValueError(f"missing_eos_penalty: {self.missing_eos_penalty} must be above 0: it is taken from the reward")


def require(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, with the choices, if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; use {', '.join(choices[:-1])} or {choices[-1]}")
