"""GRPOConfig and OnlineDPOConfig: `transformers.TrainingArguments` plus what online training adds, under TRL's names.

The defaults are for a policy that is trained on its own samples: a small constant learning rate, every step logged, and columns
kept because rewards read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class OnlineConfig(TrainingArguments):
    """Arguments that both methods share."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep false: rewards read the dataset's columns."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Experiment trackers to report to."})

    num_generations: int = field(default=8, metadata={"help": "Completions sampled for each prompt; they form a group."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches that share one generation. Default: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Times each generation is trained on."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens; longer ones are refused before training."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions that hit the length limit out of the loss."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weights of the reward functions. Default: all 1."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout, so that trainer and generator agree."})
    model_init_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Keyword arguments of from_pretrained."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Visit prompts in a random order that the seed fixes."})
    num_completions_to_print: int = field(default=2, metadata={"help": "Completions shown with each log line."})
    eval_prompts: int = field(default=0, metadata={"help": "Held-out prompts answered greedily before and after training; 0 for none."})

    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM instead of transformers."})
    vllm_device: str = field(default="auto", metadata={"help": "Device on which vLLM generates."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the device's memory that vLLM takes."})
    vllm_dtype: str = field(default="auto", metadata={"help": "Type of vLLM's weights."})
    vllm_max_model_len: int | None = field(default=None, metadata={"help": "Longest prompt plus completion that vLLM accepts, in tokens."})
    vllm_enable_prefix_caching: bool = field(default=True, metadata={"help": "Let vLLM keep the keys and values of shared prompts."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
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
    """Arguments of group relative policy optimization (arXiv:2402.03300)."""

    beta: float = field(default=0.0, metadata={"help": "Weight of the KL term to the base model; 0 keeps no reference model."})
    epsilon: float = field(default=0.2, metadata={"help": "Clipping range of the importance ratio below 1."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Clipping range above 1. Default: epsilon."})
    scale_rewards: bool = field(default=True, metadata={"help": "Divide advantages by the standard deviation of their group."})


@dataclass
class OnlineDPOConfig(OnlineConfig):
    """Arguments of online direct preference optimization (arXiv:2402.04792)."""

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of the optimizer."})
    num_generations: int = field(default=2, metadata={"help": "Completions sampled for each prompt; the best and the worst form a pair."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the preference loss: smaller lets the policy move further."})
    loss_type: str = field(default="sigmoid", metadata={"help": "Preference loss: sigmoid or ipo."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken from the reward of a completion that does not end."})
