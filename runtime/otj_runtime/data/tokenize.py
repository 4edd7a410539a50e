"""Prompts to token ids, once: generator and trainer get the same ids, and nothing is ever tokenised twice.

A conversation goes through the model's chat template, which writes special tokens itself; plain text gets them from the tokenizer.
Either way a prompt begins with one beginning-of-sequence token at most, also if the text already carries it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from otj_runtime.pod.errors import DatasetInvalid

Message = dict[str, Any]

PROMPT_IDS = "prompt_ids"
"""Column in which a prepared row carries its prompt's token ids."""

TOOLS, TEMPLATE_KWARGS = "tools", "chat_template_kwargs"
"""Columns of a conversation that its chat template gets: the tools that it may call (a list, or
its JSON, which keeps `datasets` from filling up its objects), and further arguments for this row."""


class PromptEncoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: the model's, as transformers loads it.
        template_kwargs: further arguments of its chat template, for every row.
    """

    def __init__(self, tokenizer: Any, *, template_kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._template_kwargs = template_kwargs or {}

    def encode(self, prompt: str | list[Message]) -> list[int]:
        """Token ids of `prompt`; of a conversation, up to where the assistant begins to speak, or goes on if the last message is its own.

        Raises:
            DatasetInvalid: if it is neither text nor messages, cannot be tokenised, or there is no chat template for messages.
        """
        return self.encode_row({"prompt": prompt})

    def encode_row(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a dataset's row: those that it carries, else of its prompt; the chat template gets the row's tools and arguments.

        Raises:
            DatasetInvalid: as `encode`.
        """
        if PROMPT_IDS in row:
            return list(row[PROMPT_IDS])
        return self._tokenize([self._render(row)], special=isinstance(row["prompt"], str))[0]

    def encode_rows(self, rows: Sequence[dict[str, Any]], *, first: int = 0) -> list[list[int]]:
        """Token ids of many rows, tokenised together, which uses every core.

        Args:
            rows: the rows, the first of which has the index `first` in the dataset.

        Raises:
            DatasetInvalid: naming the first sample that cannot be encoded.
        """
        try:
            texts = [self._render(row) for row in rows]
            special = [isinstance(row["prompt"], str) for row in rows]
            if len(set(special)) == 1:
                return self._tokenize(texts, special=special[0])
        except DatasetInvalid:
            pass  # one by one, to find out which
        found = []
        for index, row in enumerate(rows, start=first):
            try:
                found.append(self.encode_row(row))
            except DatasetInvalid as error:
                raise DatasetInvalid(f"sample {index}: {error}") from error
        return found

    def _render(self, row: dict[str, Any]) -> str:
        """The text to tokenise: plain, or what the chat template writes."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return prompt
        if not _is_conversation(prompt):
            raise DatasetInvalid(f"prompt {prompt!r:.100} is neither text nor a list of messages with role and content")
        if not self.tokenizer.chat_template:
            raise DatasetInvalid(
                "prompts are conversations, but the model's tokenizer has no chat template: use plain text, or a chat model"
            )
        goes_on = prompt[-1]["role"] == "assistant"
        own = row.get(TEMPLATE_KWARGS) or {}
        tools = row.get(TOOLS) or None
        try:
            text = self.tokenizer.apply_chat_template(
                prompt,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **self._template_kwargs | own,
            )
        except Exception as error:  # templates are programs: they raise whatever they like
            raise DatasetInvalid(f"the model's chat template refuses {prompt!r:.100}: {error}") from error
        return str(text)

    def _tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; with `special`, the tokenizer adds the tokens that a chat template writes itself."""
        try:
            found = [self._begun_once(list(ids)) for ids in self.tokenizer(texts, add_special_tokens=special)["input_ids"]]
        except Exception as error:  # tokenizers raises plain Exception for text outside its vocabulary
            raise DatasetInvalid(f"prompt {texts[0]!r:.100} cannot be tokenised: {error}") from error
        for text, ids in zip(texts, found, strict=True):
            if not ids:
                raise DatasetInvalid(f"prompt {text!r:.100} has no tokens")
        return found

    def _begun_once(self, ids: list[int]) -> list[int]:
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
