"""LoRA in a job: the adapter's configuration from `spec.lora`, and the whole model at the end.

What a PEFT model means for the rest stands where it happens: only the adapter has gradients and optimizer state, checkpoints hold the
adapter (transformers), the reference is the policy without it (`trainer`), and the generator gets it alone or merged (`weights`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from otj_runtime.api.spec import LoRASpec
from otj_runtime.weights.composed import whole
from otj_runtime.weights.tensors import policy_tensors, reshard


def peft_config(lora: LoRASpec | None) -> Any | None:
    """PEFT's configuration; None if all weights are trained. Without dropout: trainer and generator must be the same policy."""
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=lora.target_modules or "all-linear"
    )


def save_merged(trainer: Any, folder: Path) -> None:
    """Write the base model with the adapter merged, in the type of its weights, as a transformers folder with the tokenizer.
    Collective; the training weights stay as they are."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    reshard(model)
    base, state = model.get_base_model(), {}
    for name, tensor in policy_tensors(model).items():
        merged = whole(tensor)
        if trainer.accelerator.is_main_process:
            state[name] = merged.detach().to(device="cpu", dtype=base.dtype)
    if trainer.accelerator.is_main_process:
        # A model of its own: the training model's names are those of its adapted layers.
        plain = type(base).from_pretrained(None, config=base.config, state_dict=state, dtype=base.dtype)
        plain.generation_config = base.generation_config
        plain.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
