"""The package's face: the seed's names, found without loading torch until they are asked for, with the seed's arguments."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import otj_runtime
from otj_runtime import GRPOConfig, GRPOTrainer, OnlineDPOConfig, OnlineDPOTrainer

ROWS = [{"prompt": text, "answer": "1"} for text in ("abc", "bcd", "cde", "def")]


def constant(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(right) for right in answer]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import otj_runtime, sys; assert 'torch' not in sys.modules; assert 'GRPOTrainer' in dir(otj_runtime)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SFTTrainer"):
        otj_runtime.SFTTrainer  # noqa: B018


def test_positional_arguments_are_the_seeds() -> None:
    names = [name for name, p in inspect.signature(GRPOTrainer).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == [
        *("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
        *("reward_processing_classes", "callbacks", "optimizers", "peft_config"),
    ]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_is_named_or_given(tiny_folder: Path, tmp_path: Path, loaded: bool) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8, max_completion_length=2, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder) if loaded else str(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder) if loaded else None
    trainer = GRPOTrainer(model=model, reward_funcs=constant, args=args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_older_online_dpo_script_runs(tiny_folder: Path, tmp_path: Path) -> None:
    args = OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8, max_new_tokens=2, max_steps=1)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    trainer = OnlineDPOTrainer(model=str(tiny_folder), ref_model=reference, reward_model=constant, args=args, train_dataset=ROWS)
    assert trainer.reference is reference
    assert trainer.config.max_completion_length == 2
    trainer.train()
    assert trainer.state.global_step == 1


def test_uploading_checkpoints_while_training_goes_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hub_strategy.*leave it at end"):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, hub_strategy="every_save")
