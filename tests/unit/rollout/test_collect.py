"""What a rank does with prompts and completions happens off the trainer's own thread."""

from __future__ import annotations

import threading
from typing import Any, cast

from otj_runtime.data.tokenize import PromptEncoder
from otj_runtime.rewards.scoring import Reward, Rewards
from otj_runtime.rollout.collect import Rollouts
from otj_runtime.rollout.types import Completion, Sampling


class Threads:
    """An engine, an encoder and a tokenizer in one, which note the thread that each is called in."""

    shares_model = False

    def __init__(self) -> None:
        self.seen: dict[str, threading.Thread] = {}

    def _note(self, what: str) -> None:
        self.seen[what] = threading.current_thread()

    def encode_row(self, row: dict[str, Any]) -> list[int]:
        self._note("tokenisation")
        return [1]

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, policy_version: int) -> list[list[Completion]]:
        self._note("generation")
        return [[Completion([2], [-0.1], True, policy_version)] for _ in prompts]

    def batch_decode(self, tokens: list[list[int]], **_: Any) -> list[str]:
        self._note("decoding")
        return ["two"] * len(tokens)

    def reward(self, completions: list[str], **_: Any) -> list[float]:
        self._note("rewards")
        return [1.0] * len(completions)


def test_tokenisation_generation_decoding_and_rewards_keep_the_trainers_thread_free() -> None:
    all_in_one = Threads()
    rollouts = Rollouts(
        engine=cast(Any, all_in_one),
        encoder=cast(PromptEncoder, all_in_one),
        rewards=Rewards([Reward(name="one", function=all_in_one.reward)]),
        tokenizer=all_in_one,
    )
    (group,) = rollouts.start([{"prompt": "one"}], Sampling(count=1, max_tokens=1), policy_version=3).result(30)
    assert (group.texts, group.rewards) == (["two"], [1.0])
    assert set(all_in_one.seen) == {"tokenisation", "generation", "decoding", "rewards"}
    assert threading.current_thread() not in all_in_one.seen.values()
