"""The committed table of training arguments equals the configuration classes."""

from __future__ import annotations

from importlib import resources

import pytest

from otj_runtime.train.arguments import render
from otj_runtime.train.config import GRPOConfig


def test_the_committed_arguments_are_those_of_the_configuration_classes() -> None:
    committed = resources.files("otj_runtime.api").joinpath("training_arguments.json").read_text()
    assert committed == render(), "run: python -m otj_runtime.train.arguments"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_device_train_batch_size": 6, "num_generations": 4}, "num_generations: 4 does not divide the 6 completions of a rank"),
        ({"num_generations": 1}, "num_generations: 1 is too few"),
        (
            {"per_device_train_batch_size": 8, "steps_per_generation": 1, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: 2 does not divide the 1 micro-batches",
        ),
    ],
)
def test_a_batch_that_does_not_fit_its_groups_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir="unused", use_cpu=True, **arguments)
