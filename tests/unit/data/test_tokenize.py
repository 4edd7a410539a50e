"""Prompts to token ids, with real tokenizers: the tiny model's, and a byte-level one with a chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from otj_runtime.data.model import build_tiny
from otj_runtime.data.tasks import make_samples
from otj_runtime.data.tiny import SEPARATOR, SYMBOLS
from otj_runtime.data.tokenize import PromptEncoder
from otj_runtime.pod.errors import DatasetInvalid

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> Any:
    """Any text, byte by byte, with a beginning token that plain text gets from the post-processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["<s>", *alphabet])}, merges=[]))
    made.add_special_tokens(["<s>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", chat_template=chat_template)


BYTES = byte_tokenizer()
CHAT = byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(directory)
    return PromptEncoder(AutoTokenizer.from_pretrained(directory))


def rows(*prompts: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


@given(text=st.text().filter(lambda text: "<s>" not in text))
def test_text_survives_the_way_there_and_back(text: str) -> None:
    ids = PromptEncoder(BYTES).encode(text)
    assert ids[0] == 0
    assert BYTES.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


@given(content=st.text(alphabet=st.characters(blacklist_characters="<", blacklist_categories=["Cs"]), min_size=1))
def test_a_conversation_goes_through_the_template_up_to_the_assistant(content: str) -> None:
    ids = PromptEncoder(CHAT).encode([{"role": "user", "content": content}])
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert CHAT.decode(ids[1:], clean_up_tokenization_spaces=False) == f"<user>{content}\n<assistant>"


def test_text_that_carries_its_beginning_gets_no_second_one() -> None:
    assert PromptEncoder(BYTES).encode("<s>hello") == PromptEncoder(BYTES).encode("hello")


@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_a_tasks_prompt_is_a_beginning_its_symbols_and_the_separator(task: str, tiny: PromptEncoder) -> None:
    for sample in make_samples(task, {}, seed=0).held_out:
        assert tiny.encode(sample["prompt"]) == [0, *(2 + SYMBOLS.index(symbol) for symbol in sample["prompt"][:-1]), 1]
        assert sample["prompt"][-1] == SEPARATOR


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "neither text nor a list of messages"),
        (7, "neither text nor a list of messages"),
        ([], "neither text nor a list of messages"),
        (["hello"], "neither text nor a list of messages"),
        ([{"role": "user"}], "neither text nor a list of messages"),
        ("xyz", "cannot be tokenised"),
        ([{"role": "user", "content": "abc"}], "no chat template"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_refused_with_its_sample(prompt: Any, words: str, tiny: PromptEncoder) -> None:
    with pytest.raises(DatasetInvalid, match=f"sample 1: .*{words}"):
        tiny.encode_rows(rows("abcd=", prompt))


def test_a_prompt_without_tokens_is_refused() -> None:
    silent = byte_tokenizer()
    silent.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DatasetInvalid, match="sample 0: prompt '' has no tokens"):
        PromptEncoder(silent).encode_rows(rows(""))


def test_a_template_that_refuses_a_role_is_quoted() -> None:
    strict = byte_tokenizer("{{ raise_exception('no system messages here') }}")
    with pytest.raises(DatasetInvalid, match=r"sample 0: .*no system messages here"):
        PromptEncoder(strict).encode_rows(rows([{"role": "system", "content": "x"}]))


@given(texts=st.lists(st.text().filter(lambda text: "<s>" not in text), min_size=1, max_size=5))
def test_rows_encoded_together_are_the_rows_encoded_alone(texts: list[str]) -> None:
    encoder = PromptEncoder(CHAT)
    mixed = [text if i % 2 else [{"role": "user", "content": text}] for i, text in enumerate(texts)]
    assert encoder.encode_rows(rows(*mixed)) == [encoder.encode(prompt) for prompt in mixed]


def test_an_assistant_that_has_begun_goes_on() -> None:
    template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    goes_on = byte_tokenizer(template)
    ids = PromptEncoder(goes_on).encode([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}])
    assert goes_on.decode(ids, clean_up_tokenization_spaces=False) == "<user>hi\n<assistant>so"


def test_the_template_gets_the_runs_arguments_the_rows_and_its_tools() -> None:
    spoken = byte_tokenizer("{{ style }}{{ depth }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}")
    encoder = PromptEncoder(spoken, template_kwargs={"style": "plain", "depth": 1})
    tools = [{"type": "function", "function": {"name": "look"}}]
    row = {"prompt": [{"role": "user", "content": "hi"}], "tools": json.dumps(tools), "chat_template_kwargs": {"depth": 2}}
    assert spoken.decode(encoder.encode_row(row), clean_up_tokenization_spaces=False) == "plain2look"
    assert encoder.encode_row(row) == encoder.encode_row(row | {"tools": tools})


def test_a_prepared_row_is_not_encoded_again() -> None:
    assert PromptEncoder(BYTES).encode_row({"prompt": "hello", "prompt_ids": [1, 2]}) == [1, 2]
