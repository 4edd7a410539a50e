"""One rank's rollouts: rows of the dataset -> prompt token ids -> completions -> rewards -> groups.

`collect` does it and returns. `start` does it in a thread of its own, off the trainer's critical path, so that several batches can
be under way; tokenizer and rewards are shared, and used by one batch at a time. The thread is a daemon: nothing in it, not even a
reward that hangs, keeps the process from ending.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from otj_runtime.data.tokenize import PROMPT_IDS, PromptEncoder
from otj_runtime.pod.metrics import Answer
from otj_runtime.rewards import Rewards
from otj_runtime.rollout.types import Group, RolloutEngine, Sampling


class Rollouts:
    """Completes and scores prompts.

    Args:
        engine: samples completions.
        encoder: prompts to token ids, the same ids for generator and trainer.
        rewards: scores completions.
        tokenizer: decodes completions for the rewards.
        trainer_state: transformers' state of the training, for rewards that depend on its progress.
    """

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        rewards: Rewards,
        tokenizer: Any,
        trainer_state: Callable[[], Any] = lambda: None,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._trainer_state = trainer_state
        self._tokenizer_lock = threading.Lock()  # a fast tokenizer raises "Already borrowed" when two threads use it
        self._rewards_lock = threading.Lock()  # authors of rewards do not expect to be called for two batches at once

    def start(self, samples: list[dict[str, Any]], sampling: Sampling, *, policy_version: int) -> Future[list[Group]]:
        """`collect` in the background; the future holds what it returns or raises. It is done at once if the engine shares the
        trainer's model, which cannot sample while it learns."""
        future: Future[list[Group]] = Future()

        def work() -> None:
            try:
                future.set_result(self.collect(samples, sampling, policy_version=policy_version))
            except BaseException as error:
                future.set_exception(error)

        if self._engine.shares_model:
            work()
        else:
            threading.Thread(target=work, name=f"rollouts of version {policy_version}", daemon=True).start()
        return future

    def busy_seconds(self) -> float:
        """Seconds in which anything of this rank's was being generated."""
        return self._engine.busy_seconds()

    def cancel(self) -> None:
        """Call off what was started; its futures raise `Cancelled`."""
        self._engine.cancel()

    def collect(self, samples: list[dict[str, Any]], sampling: Sampling, *, policy_version: int) -> list[Group]:
        """A scored group per sample, sampled from the weights of `policy_version` or later ones that arrived meanwhile. Groups that
        were dropped as stragglers are left out.

        Raises:
            Cancelled: if `cancel` was called meanwhile.
            GeneratorLost: if the generator does not come back.
            RewardFailed: if a reward raises, hangs, or returns the wrong thing.
        """
        with self._tokenizer_lock:
            prompts = [self._encoder.encode_row(sample) for sample in samples]
        completions = self._engine.generate(prompts, sampling, policy_version=policy_version)
        with self._tokenizer_lock:
            groups = [
                Group(sample, prompt, found, texts=self._tokenizer.batch_decode([c.token_ids for c in found], skip_special_tokens=True))
                for sample, prompt, found in zip(samples, prompts, completions, strict=True)
                if found
            ]
        with self._rewards_lock:
            self._score(groups)
        return groups

    def _score(self, groups: list[Group]) -> None:
        """Score all completions of all groups in one call per reward function, as batched rewards want it."""
        rows = [(group, i) for group in groups for i in range(len(group.completions))]
        columns = {name: [group.sample[name] for group, _ in rows] for name in groups[0].sample if name not in ("prompt", PROMPT_IDS)}
        table = self._rewards.score(
            prompts=[group.sample["prompt"] for group, _ in rows],
            completions=[group.texts[i] for group, i in rows],
            completion_ids=[group.completions[i].token_ids for group, i in rows],
            columns=columns,
            group_ids=[number for number, group in enumerate(groups) for _ in group.completions],
            trainer_state=self._trainer_state(),
        )
        first = 0
        for group in groups:
            own = slice(first, first + len(group.completions))
            group.rewards = table.totals[own]
            group.scores = {name: scores[own] for name, scores in table.scores.items()}
            group.extra = {name: values[own] for name, values in table.extra.items()}
            group.logged = table.metrics
            first = own.stop

    def answers(self, groups: list[Group]) -> list[Answer]:
        """The first completion of each group, for people; one without a reward shows 0."""
        return [
            Answer(
                prompt=prompt_text(group.sample["prompt"]),
                completion=group.texts[0],
                reward=0.0 if math.isnan(group.rewards[0]) else group.rewards[0],
            )
            for group in groups
        ]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one line for people: of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """What groups tell of themselves, under TRL's names. Completions without a reward (NaN) count in none of the rewards' numbers."""
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    ended = [len(completion.token_ids) for group in groups for completion in group.completions if completion.finished]
    rewards = [[reward for reward in group.rewards if not math.isnan(reward)] for group in groups]
    scored = [found for found in rewards if found] or [[0.0]]
    prompt_tokens = sum(len(group.prompt_ids) * len(group.completions) for group in groups)
    return {
        "reward": _mean([reward for found in scored for reward in found]),
        "reward_std": _mean([_deviation(found) for found in scored]),
        "frac_reward_zero_std": _mean([float(max(found) == min(found)) for found in scored]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": _mean(ended or [0]),
        "completions/min_terminated_length": float(min(ended, default=0)),
        "completions/max_terminated_length": float(max(ended, default=0)),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "num_tokens": float(prompt_tokens + sum(lengths)),
        "tokens_generated": float(sum(lengths)),
    }


def reward_metrics(groups: list[Group]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each reward function, under TRL's names, and what functions logged themselves.

    Returns:
        value and weight by name; the weight is the number of completions that the function applies to.
    """
    found: dict[str, tuple[float, float]] = {name: (value, 1.0) for name, value in groups[0].logged.items()}
    for name in groups[0].scores:
        scores = [score for group in groups for score in group.scores[name] if score is not None]
        if scores:
            found[f"rewards/{name}/mean"] = (_mean(scores), len(scores))
            found[f"rewards/{name}/std"] = (_deviation(scores), len(scores))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return float((sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5)
