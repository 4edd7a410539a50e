"""LoRA in a job: the adapter's configuration from `spec.lora`.

What a PEFT model means for the rest stands where it happens: only the adapter has gradients and optimizer state, checkpoints hold the
adapter (transformers), the reference is the policy without it (`trainer`), the generator gets it alone or merged (`weights`), and the
end of the run saves it either way (`export`).
"""

from __future__ import annotations

from typing import Any

from otj_runtime.api.spec import LoRASpec


def peft_config(lora: LoRASpec | None) -> Any | None:
    """PEFT's configuration; None if all weights are trained. Without dropout: trainer and generator must be the same policy."""
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=lora.target_modules or "all-linear"
    )
