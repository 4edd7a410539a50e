"""The built-in tasks."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otj_runtime.api.inputs import BUILT_IN_TASKS, PUZZLE
from otj_runtime.data.puzzles import PREFIX
from otj_runtime.data.tasks import TASKS, Sample, make_samples
from otj_runtime.data.tiny import tokenizer
from otj_runtime.pod.errors import DatasetInvalid
from otj_runtime.rewards import load_rewards


def prompts(samples: list[Sample]) -> list[str]:
    return [str(sample["prompt"]) for sample in samples]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_training_never_sees_a_held_out_prompt(name: str, seed: int) -> None:
    samples = make_samples(name, {}, seed=seed)
    assert samples.train
    assert samples.held_out
    assert not set(prompts(samples.train)) & set(prompts(samples.held_out))


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_fixes_the_samples(name: str) -> None:
    first, same, other = (make_samples(name, {}, seed=seed).train for seed in (1, 1, 2))
    assert first == same != other
    assert make_samples(name, {"seed": 1}, seed=9).train == first


@pytest.mark.parametrize("name", ["copy", "reverse"])
def test_held_out_strings_are_the_same_for_every_seed(name: str) -> None:
    assert make_samples(name, {}, seed=1).held_out == make_samples(name, {}, seed=2).held_out


def test_answers_to_held_out_sums_do_not_occur_in_training() -> None:
    samples = make_samples("addition", {}, seed=0)
    assert (len(samples.train), len(samples.held_out)) == (108, 36)
    assert not {sample["answer"] for sample in samples.train} & {sample["answer"] for sample in samples.held_out}


def test_every_sum_is_asked_for_in_words_and_right() -> None:
    samples = make_samples("addition", {}, seed=0)
    for sample in samples.train + samples.held_out:
        [message] = sample["prompt"]
        a, b = message["content"].removeprefix("What is ").removesuffix("?").split(" + ")
        assert message["role"] == "user"
        assert sample["answer"] == int(a) + int(b)


@settings(max_examples=30)
@given(length=st.integers(1, 6), size=st.integers(1, 20), seed=st.integers(0, 100), name=st.sampled_from(["copy", "reverse"]))
def test_strings_have_the_length_and_number_asked_for(length: int, size: int, seed: int, name: str) -> None:
    samples = make_samples(name, {"length": length, "size": size}, seed=seed).train
    assert len(samples) == size
    for sample in samples:
        asked = sample["prompt"].removesuffix("=")
        assert len(asked) == length
        assert sample["answer"] == (asked if name == "copy" else asked[::-1])


@pytest.mark.parametrize("name", ["copy", "reverse"])
def test_the_tiny_tokenizer_gives_a_beginning_the_symbols_and_a_separator(name: str) -> None:
    encode = tokenizer()
    for sample in make_samples(name, {"length": 5}, seed=0).held_out:
        tokens = encode.encode(sample["prompt"]).tokens
        assert tokens == ["<|endoftext|>", *sample["prompt"]]
        assert len(encode.encode(sample["answer"], add_special_tokens=False).ids) == 5


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_earns_the_tasks_whole_reward_and_a_wrong_one_less(name: str) -> None:
    samples = make_samples(name, {}, seed=0).held_out

    def total(answers: list[str]) -> float:
        ids = [[0]] * len(answers)
        columns = {"answer": [sample["answer"] for sample in samples]}
        asked = [sample["prompt"] for sample in samples]
        table = load_rewards([], name).score(prompts=asked, completions=answers, completion_ids=ids, columns=columns)
        return sum(table.totals) / len(samples)

    assert total([str(sample["answer"]) for sample in samples]) == 1.0
    assert total(["x" + str(sample["answer"]) + "0" for sample in samples]) < 0.5


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("copie", {}, "no built-in task copie; there are addition, copy, reverse and reasoning_gym/NAME; did you mean copy?"),
        ("copy", {"lenght": 4}, "dataset.args.lenght: task copy has no such argument; it has length, size, seed, symbols"),
        ("addition", {"length": 4}, "dataset.args.length: task addition has no such argument; it has seed"),
        ("copy", {"length": "4"}, "dataset.args.length: '4' is a str; task copy wants int"),
        ("copy", {"length": True}, "is a bool"),
        ("copy", {"length": 0}, "dataset.args.length: 0 is too small"),
        ("reverse", {"size": -1}, "dataset.args.size: -1 is too small"),
        ("copy", {"symbols": "a"}, "at least two characters"),
        ("copy", {"symbols": "aab"}, "each once"),
    ],
)
def test_wrong_arguments_are_refused_with_what_there_is(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetInvalid) as caught:
        make_samples(name, args, seed=0)
    assert words in str(caught.value)


def test_the_api_knows_every_task_by_name() -> None:
    assert (*TASKS,) == BUILT_IN_TASKS
    assert re.match(PUZZLE, f"{PREFIX}chain_sum")
