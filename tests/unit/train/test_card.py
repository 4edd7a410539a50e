"""What a model card tells."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from otj_runtime.api import Algorithm
from otj_runtime.pod.metrics import HeldOut, MetricsLine
from otj_runtime.train.card import model_card

LINES = [
    MetricsLine(step=0, total_steps=20, time=0, heldout=HeldOut(accuracy=0.125, answers=[])),
    *(MetricsLine(step=step, total_steps=20, time=0, metrics={"reward": step / 20, "kl": 0.5}) for step in range(1, 21)),
    MetricsLine(step=20, total_steps=20, time=0, heldout=HeldOut(accuracy=0.875, answers=[])),
]


def card(base_model: str) -> str:
    return model_card(
        name="me/model", method=Algorithm.GRPO, base_model=base_model, dataset="task copy", rewards=["right", "short"], lines=LINES
    )


def test_it_tells_method_data_rewards_and_the_figures_of_both_ends() -> None:
    text = card("Qwen/Qwen3-0.6B")
    for words in (
        "arXiv:2402.03300",
        "task copy",
        "`right`, `short`",
        "20 optimizer steps",
        "| reward | 0.15 | 0.9 |",
        "| 0.125 | 0.875 |",
    ):
        assert words in text


def test_the_hub_can_read_it_and_is_told_of_base_models_that_it_has(tmp_path: Path) -> None:
    assert ModelCard(card("Qwen/Qwen3-0.6B")).data.base_model == "Qwen/Qwen3-0.6B"
    assert ModelCard(card(str(tmp_path))).data.base_model is None
