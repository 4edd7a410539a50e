"""The model card of a trained model: where it comes from, how it was trained, and the figures of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from otj_runtime.api import Algorithm
from otj_runtime.pod.metrics import MetricsLine, values

PAPERS = {
    Algorithm.GRPO: "group relative policy optimization ([arXiv:2402.03300](https://arxiv.org/abs/2402.03300))",
    Algorithm.ONLINE_DPO: "online direct preference optimization ([arXiv:2402.04792](https://arxiv.org/abs/2402.04792))",
}

SHOWN = {
    "reward": "reward",
    "completions/mean_length": "tokens per completion",
    "completions/clipped_ratio": "share of completions cut off",
    "kl": "KL to the base model",
    "objective/kl": "KL to the base model",
    "entropy": "entropy, nats per token",
}
"""Metrics that a card tells, and what it calls them."""

WINDOW = 5
"""Steps that a figure is averaged over at either end."""


def model_card(
    *, name: str, method: Algorithm, base_model: str, dataset: str | None, rewards: Sequence[str], lines: Sequence[MetricsLine]
) -> str:
    """The card's text: the hub's metadata, then a page for people.

    Args:
        name: of the trained model.
        base_model: name or folder that training began from; a folder is not told to the hub, which would look for it.
        dataset: what the prompts come from, if it is known.
        rewards: names of the reward functions.
        lines: of metrics.jsonl.
    """
    on_hub = not Path(base_model).exists()
    metadata = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=name,
        tags=["online-training", str(method).lower()],
    )
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else f"`{base_model}`"
    facts = [
        f"- base model: {origin}",
        f"- method: {PAPERS[method]}",
        f"- prompts: {dataset or 'given as a list'}",
        f"- rewards: {', '.join(f'`{reward}`' for reward in rewards)}",
    ]
    return "\n".join(["---", metadata.to_yaml(), "---", "", f"# {name}", "", *facts, "", *_figures(lines), ""])


def _figures(lines: Sequence[MetricsLine]) -> list[str]:
    steps = [line for line in lines if line.metrics]
    if not steps:
        return ["No step was made."]
    table = [f"## {steps[-1].step} optimizer steps", "", f"| mean over | first {WINDOW} steps | last {WINDOW} steps |", "|---|---|---|"]
    for metric, label in SHOWN.items():
        found = list(values(steps, metric))
        if found:
            table.append(f"| {label} | {_mean(found[:WINDOW]):.3g} | {_mean(found[-WINDOW:]):.3g} |")
    held_out = [line.heldout.accuracy for line in lines if line.heldout is not None]
    if held_out:
        table.append(f"| reward on held-out prompts | {held_out[0]:.3g} | {held_out[-1]:.3g} |")
    return table


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
