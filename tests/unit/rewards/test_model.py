"""Sequence-classification models as rewards: a real one, tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from otj_runtime.api.inputs import RewardSpec
from otj_runtime.data.model import build_tiny
from otj_runtime.pod.errors import InvalidSpec, RewardImportFailed
from otj_runtime.rewards import build_rewards, load_rewards
from otj_runtime.rewards.model import RewardModel

PROMPTS, SAID = ["ab=", "abc=", "a=", "h=", "abcdefgh="], ["ab", "abcd", "b", "", "hgfedcba"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with one label."""
    folder = tmp_path_factory.mktemp("judge") / "little-judge"
    build_tiny(folder)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=1)).save_pretrained(folder)
    return str(folder)


def scores(reward: Any, *, prompts: list[Any] = PROMPTS, **arguments: Any) -> list[float]:
    table = build_rewards(reward, **arguments).score(prompts=prompts, completions=SAID, completion_ids=[[0]] * len(SAID), columns={})
    return table.totals


def test_the_reward_is_the_logit_of_prompt_and_completion(judge: str) -> None:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1), AutoTokenizer.from_pretrained(judge)
    with torch.no_grad():
        texts = [prompt + said for prompt, said in zip(PROMPTS, SAID, strict=True)]
        alone = [float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]) for text in texts]
    assert len(set(alone)) == len(alone)
    assert scores(judge) == pytest.approx(alone, abs=1e-5)
    assert scores(model, reward_processing_classes=tokenizer) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_change_nothing(judge: str, batch_size: int) -> None:
    assert scores(RewardModel(judge, batch_size=batch_size)) == pytest.approx(scores(judge), abs=1e-5)


def test_a_conversation_goes_through_the_models_own_template(judge: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert scores(judge, prompts=asked, reward_processing_classes=[tokenizer]) == pytest.approx(scores(judge), abs=1e-5)


def test_a_text_that_is_too_long_loses_its_beginning(judge: str) -> None:
    cut = RewardModel(judge, max_length=2)
    [long, short] = cut(prompts=["abcdefgh=", ""], completions=["hg", "hg"])
    assert long == pytest.approx(short, abs=1e-6)


def test_a_job_names_a_model_with_its_arguments(judge: str) -> None:
    rewards = load_rewards([RewardSpec(model=judge, args={"device": "cpu", "batch_size": 2}, weight=2.0)])
    rewards.load()
    table = rewards.score(prompts=PROMPTS, completions=SAID, completion_ids=[[0]] * len(SAID), columns={})
    assert rewards.names == ["little-judge"]
    assert table.totals == pytest.approx([2 * score for score in scores(judge)], abs=1e-5)


def test_what_is_no_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RewardImportFailed, match=r"reward model nowhere cannot be loaded: .*one label"):
        build_rewards(str(tmp_path / "nowhere"))
    with pytest.raises(RewardImportFailed, match=r"args do not fit a reward model.*it takes device, batch_size"):
        load_rewards([RewardSpec(model="org/model", args={"devise": "cpu"})])
    with pytest.raises(RewardImportFailed, match=r"reward /no/such/judge: there is no such folder; check it"):
        load_rewards([RewardSpec(model="/no/such/judge")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reward_funcs": None}, "nothing judges the completions"),
        ({"reward_funcs": [len], "reward_weights": [1.0, 2.0]}, "reward_weights: there are 2 for 1 rewards"),
        ({"reward_funcs": [len], "reward_processing_classes": [None, None]}, "there are 2 for 1 reward_funcs"),
    ],
)
def test_numbers_that_do_not_match_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        build_rewards(**arguments)
