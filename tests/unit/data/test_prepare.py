"""Prompts encoded once, rows that are too long, and streams as sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from otj_runtime.data.load import Prompts, Stream, prompts_of
from otj_runtime.data.model import build_tiny
from otj_runtime.data.prepare import ENDLESS, LengthRule, StreamedPrompts, TokenizedPrompts, prepare
from otj_runtime.data.tokenize import PROMPT_IDS, PromptEncoder
from otj_runtime.pod.errors import DatasetInvalid

LONG, SHORT = "abcdef=", "ab="


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(directory)
    return PromptEncoder(AutoTokenizer.from_pretrained(directory))


def prompts(*texts: str) -> Prompts:
    return Prompts([{"prompt": text, "number": i} for i, text in enumerate(texts)], {})


def stream(*texts: str) -> Stream:
    def start(number: int) -> Iterator[dict[str, Any]]:
        return iter([{"prompt": text, "pass": number} for text in texts])

    return Stream("dataset x", start)


@given(texts=st.lists(st.text(alphabet="abcdefgh=", min_size=1, max_size=9), min_size=1, max_size=20), limit=st.integers(2, 10))
def test_rows_that_fit_keep_their_order_columns_and_ids(encoder: PromptEncoder, texts: list[str], limit: int) -> None:
    fitting = [i for i, text in enumerate(texts) if len(encoder.encode(text)) <= limit]
    rule = LengthRule(max_tokens=limit, overlong="drop")
    if not fitting:
        with pytest.raises(DatasetInvalid, match="nothing is left to train on"):
            prepare(prompts(*texts), encoder, rule)
        return
    found = prepare(prompts(*texts), encoder, rule)
    assert isinstance(found, TokenizedPrompts)
    assert [row["number"] for row in found] == fitting
    assert [row[PROMPT_IDS] for row in found[:]] == [encoder.encode(texts[i]) for i in fitting]
    assert found.dropped == len(texts) - len(fitting)


@pytest.mark.parametrize("limit", [8, None])
def test_prompts_as_long_as_the_limit_pass(encoder: PromptEncoder, limit: int | None) -> None:
    assert len(prepare(prompts(LONG, SHORT), encoder, LengthRule(max_tokens=limit))) == 2


def test_a_prompt_that_is_too_long_is_refused_with_its_length_the_limit_and_the_fix(encoder: PromptEncoder) -> None:
    with pytest.raises(DatasetInvalid, match=r"sample 1: its prompt has 8 tokens, the limit is 6 .* set training.overlong_prompts to drop"):
        prepare(prompts(SHORT, LONG), encoder, LengthRule(max_tokens=6))


def test_a_limit_that_leaves_no_room_for_any_prompt_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(DatasetInvalid, match=r"no prompt fits.*maxModelLen leaves -4 tokens"):
        prepare(prompts(SHORT), encoder, LengthRule(max_tokens=-4))


def test_ranks_of_a_node_share_what_one_of_them_encoded(encoder: PromptEncoder, tmp_path: Path) -> None:
    class Refusing(PromptEncoder):
        def encode_rows(self, rows: Any, *, first: int = 0) -> list[list[int]]:
            raise AssertionError("encoded twice")

    barrier = Barrier(2, timeout=10)

    def rank(number: int) -> list[Any]:
        own = encoder if number == 0 else Refusing(None)
        return prepare(prompts(LONG, SHORT), own, LengthRule(), folder=tmp_path, writes=number == 0, wait=barrier.wait)[:]  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(rank, range(2))
    assert first == second
    assert list(tmp_path.iterdir()) == [], "the shared files stayed behind"


def test_a_stream_begins_again_and_counts_what_it_drops(encoder: PromptEncoder) -> None:
    found = prepare(stream(SHORT, LONG, "c="), encoder, LengthRule(max_tokens=6, overlong="drop"))
    assert isinstance(found, StreamedPrompts)
    assert [(row["prompt"], row["pass"]) for row in itertools.islice(found, 5)] == [
        (SHORT, 0),
        ("c=", 0),
        (SHORT, 1),
        ("c=", 1),
        (SHORT, 2),
    ]
    assert (len(found), found.dropped) == (ENDLESS, 2)


@given(indices=st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_an_index_of_a_stream_means_the_same_row_whatever_was_read_before(encoder: PromptEncoder, indices: list[int]) -> None:
    texts = ["a=", LONG, "b=", "c="]
    kept = ["a=", "b=", "c="]
    found = prepare(stream(*texts), encoder, LengthRule(max_tokens=6, overlong="drop"))
    assert [found[i]["prompt"] for i in indices] == [kept[i % 3] for i in indices]


@pytest.mark.parametrize(
    ("texts", "rule", "words"),
    [
        ([SHORT, LONG], LengthRule(max_tokens=6), "dataset x, row 1 of pass 0: its prompt has 8 tokens, the limit is 6"),
        ([SHORT, "xyz"], LengthRule(), "dataset x, row 1 of pass 0: .*cannot be tokenised"),
        ([LONG], LengthRule(max_tokens=6, overlong="drop"), "dataset x: no prompt has at most 6 tokens"),
    ],
)
def test_a_streams_bad_row_is_named_when_it_is_read(encoder: PromptEncoder, texts: list[str], rule: LengthRule, words: str) -> None:
    with pytest.raises(DatasetInvalid, match=words):
        list(itertools.islice(prepare(stream(*texts), encoder, rule), 2))


@pytest.mark.parametrize(
    "dataset",
    [
        [{"prompt": SHORT}],
        datasets.Dataset.from_list([{"prompt": SHORT}]),
        datasets.Dataset.from_list([{"prompt": SHORT}]).to_iterable_dataset(),
    ],
)
def test_a_scripts_dataset_is_taken_whatever_its_kind(dataset: Any, encoder: PromptEncoder) -> None:
    assert prepare(prompts_of(dataset, seed=0), encoder, LengthRule())[0] == {"prompt": SHORT, PROMPT_IDS: encoder.encode(SHORT)}


@pytest.mark.parametrize(("dataset", "words"), [([], "has no rows"), ([{"question": "x"}], "no column prompt; it has question")])
def test_a_scripts_dataset_without_prompts_is_refused(dataset: Any, words: str) -> None:
    with pytest.raises(DatasetInvalid, match=words):
        prompts_of(dataset, seed=0)
