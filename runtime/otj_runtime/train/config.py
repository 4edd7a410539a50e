"""GRPOConfig and OnlineDPOConfig: `transformers.TrainingArguments` plus what online training adds, under TRL's names.

The defaults are for a policy that is trained on its own samples: a small constant learning rate, every step logged, and columns
kept because rewards read them.

Scripts for TRL change their import and nothing else, so arguments of its first online trainers (0.14 to 0.16) are known here: most do
what they did, those of `REFUSED` say why not. transformers' and TRL's argument parsers give a field one type, so one that takes several
is annotated with what can be typed, and its metadata names the `types` of YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

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

WEIGHT_TRANSFERS = ("auto", "mailbox", "nccl", "ipc")
"""Values of `vllm_weight_transfer`."""

_OWN_SERVER = "rank 0 starts vLLM by itself, on vllm_device, and in a pod the generator's container is there already; leave it out"
_BENDS = (
    "would change what the generator samples from, and the trainer's probabilities would not be those of the sampled tokens; leave it out, "
    "and reward the form that you want (otj_runtime.rewards.format_match)"
)
REFUSED = {
    "vllm_mode": _OWN_SERVER,
    "vllm_server_host": _OWN_SERVER,
    "vllm_server_port": _OWN_SERVER,
    "vllm_server_base_url": _OWN_SERVER,
    "vllm_server_timeout": _OWN_SERVER,
    "vllm_guided_decoding_regex": _BENDS,
    "cache_implementation": "is for generation with transformers, which is the slow baseline here; leave it out, and set use_vllm=True for speed",
}
"""Arguments of TRL that have no place here, and what to do instead."""


@dataclass
class OnlineConfig(TrainingArguments):
    """Arguments that both methods share."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep false: rewards read the dataset's columns."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  # argument parsers of transformers take the first that is not None
        default="none", metadata={"help": "Experiment trackers to report to."}
    )
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
    vllm_weight_transfer: str = field(
        default="auto",
        metadata={
            "help": "How weights reach vLLM: mailbox (shared memory), ipc (read in the trainer's GPU), nccl (vLLM's own); auto takes ipc where it can."
        },
    )
    vllm_enable_prefix_caching: bool = field(default=True, metadata={"help": "Let vLLM keep the keys and values of shared prompts."})
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Of older TRL, without effect: weights leave a ZeRO-3 model for vLLM one tensor at a time, and a model that generates by "
            "itself stays cut."
        },
    )

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        """Refuse what is in `REFUSED` by name; a dataclass would call it an unexpected keyword.

        Raises:
            ValueError: with the advice.
        """
        for name in keywords.keys() & REFUSED.keys():
            raise ValueError(f"{name}: {REFUSED[name]}")
        return super().__new__(cls)

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
        if self.vllm_weight_transfer not in WEIGHT_TRANSFERS:
            raise ValueError(f"vllm_weight_transfer: {self.vllm_weight_transfer!r} is unknown; use {', '.join(WEIGHT_TRANSFERS)}")
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
    def whole_steps_per_iteration(self) -> int:
        """Optimizer steps that the micro-batches of one pass over a generation fall into; 1 where a step spans passes."""
        steps = self.optimizer_steps_per_iteration
        return int(steps) if steps.is_integer() else 1

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
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Divide advantages by the standard deviation of their group (or true), the batch, or none (or false)."},
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "help": "Let the reference model follow the policy (TR-DPO, arXiv:2404.09656): mix it in every ref_model_sync_steps steps."
        },
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the mixture; the rest is the reference as it was."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Optimizer steps between two mixtures."})
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
        if isinstance(self.beta, list):
            raise ValueError(f"beta: {self.beta} is a list, which only Online DPO has; give one number")
        require("loss_type", self.loss_type, GRPO_LOSSES)
        require("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        require("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, SAMPLER_WEIGHTS)
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(self.scale_rewards).lower(), self.scale_rewards)
        require("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        if self.loss_type == "gspo":
            self.importance_sampling_level = "sequence"
        if self.delta is not None and self.loss_type == "cispo":
            raise ValueError("delta: cispo bounds the ratio with epsilon_high alone; leave delta out")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(f"vllm_importance_sampling_clip_min: {low} is not below vllm_importance_sampling_clip_max, {high}")
        if self.sync_ref_model:
            self._check_reference()

    def _check_reference(self) -> None:
        if not self.beta:
            raise ValueError("sync_ref_model: beta is 0, so there is no reference model; set beta (TRL 0.15's default was 0.04)")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha: {self.ref_model_mixup_alpha} is no share of the policy; use more than 0, at most 1")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps: {self.ref_model_sync_steps} is too few; use at least 1")

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
    beta: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={
            "help": "Strength of the preference loss: smaller lets the policy move further. A list has one per epoch; the last stays."
        },
    )
    loss_type: str = field(default="sigmoid", metadata={"help": "Preference loss: sigmoid or ipo."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken from the reward of a completion that does not end."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Older name of max_completion_length; it wins where both are given."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt plus completion, in tokens: bounds max_prompt_length. Prompts are refused or dropped, never cut."
        },
    )
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Name or folder of the reward model, where the trainer is given neither rewards nor a judge."}
    )
    judge: str | None = field(
        default=None, metadata={"help": "Of older TRL: a name that a script turns into the judge that it gives the trainer."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Of older TRL, without effect: prompts are encoded once a node, in batches."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None:
            self.max_completion_length = self.max_new_tokens
        if self.max_length is not None:
            self.max_prompt_length = self._longest_prompt(self.max_length)
        require("loss_type", self.loss_type, ("sigmoid", "ipo"))
        betas = self.beta if isinstance(self.beta, list) else [self.beta]
        if not betas or min(betas) <= 0:
            raise ValueError(f"beta: {self.beta} must be above 0 (in a list, every one): it divides the pull towards the reference")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty <= 0:
            raise ValueError(f"missing_eos_penalty: {self.missing_eos_penalty} must be above 0: it is taken from the reward")

    def _longest_prompt(self, max_length: int) -> int:
        left = max_length - self.max_completion_length
        if left < 1:
            raise ValueError(
                f"max_length: {max_length} leaves no token for a prompt beside a completion of {self.max_completion_length}; raise it, or "
                "lower max_completion_length (max_new_tokens)"
            )
        return left if self.max_prompt_length is None else min(left, self.max_prompt_length)


def require(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, with the choices, if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; use {', '.join(choices[:-1])} or {choices[-1]}")
