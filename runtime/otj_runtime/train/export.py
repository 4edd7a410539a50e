"""The trained model as one plain folder, whatever it was spread over.

saved_whole    transformers' own `save_model`, made to gather what FSDP2 has sharded: with sharded checkpoints, which are the fast
               ones, it would save no model at all and say nothing
save_merged    the base model with its adapter merged
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import deepspeed

from otj_runtime.weights.composed import whole
from otj_runtime.weights.tensors import policy_tensors, reshard


@contextmanager
def saved_whole(accelerator: Any, *, whole: bool) -> Iterator[None]:
    """Have what is saved in the block gathered on rank 0, if it is `whole` that is wanted and FSDP would save shards."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or not whole:
        yield
        return
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)


@contextmanager
def _loaded_whole() -> Iterator[None]:
    """Have transformers load a model on this rank alone: with ZeRO-3 it would cut it into pieces, together with ranks that do not come."""
    running, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = running


def save_merged(trainer: Any, folder: Path) -> None:
    """Write the base model with the adapter merged, in the type of its weights, as a transformers folder with tokenizer and card.
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
        with _loaded_whole():
            plain = type(base).from_pretrained(None, config=base.config, state_dict=state, dtype=base.dtype)
        plain.generation_config = base.generation_config
        plain.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        trainer.write_card(folder)
    trainer.accelerator.wait_for_everyone()
