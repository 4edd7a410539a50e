"""Prompts to token ids, once: generator and trainer get the same ids, and nothing is ever tokenised twice.

A conversation goes through the model's chat template, which writes special tokens itself; plain text gets them from the tokenizer.
Either way a prompt begins with one beginning-of-sequence token at most, also if the text already carries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from otj_runtime.pod.errors import DatasetInvalid

Message = dict[str, Any]


class PromptEncoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: the model's, as transformers loads it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, prompt: str | list[Message]) -> list[int]:
        """Token ids of `prompt`; of a conversation, up to where the assistant begins to speak.

        Raises:
            DatasetInvalid: if it is neither text nor messages, cannot be tokenised, or there is no chat template for messages.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif _is_conversation(prompt):
            ids = self._encode_conversation(prompt)
        else:
            raise DatasetInvalid(f"prompt {prompt!r:.100} is neither text nor a list of messages with role and content")
        if not ids:
            raise DatasetInvalid(f"prompt {prompt!r:.100} has no tokens")
        return ids

    def _encode_text(self, text: str) -> list[int]:
        try:
            return self._begun_once(list(self.tokenizer(text)["input_ids"]))
        except Exception as error:  # tokenizers raises plain Exception for text outside its vocabulary
            raise DatasetInvalid(f"prompt {text!r:.100} cannot be tokenised: {error}") from error

    def _encode_conversation(self, messages: list[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise DatasetInvalid(
                "prompts are conversations, but the model's tokenizer has no chat template: use plain text, or a chat model"
            )
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # templates are programs: they raise whatever they like
            raise DatasetInvalid(f"the model's chat template refuses {messages!r:.100}: {error}") from error
        return self._begun_once(list(ids))

    def _begun_once(self, ids: list[int]) -> list[int]:
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def check_lengths(self, prompts: Sequence[dict[str, Any]], *, max_tokens: int | None) -> None:
        """Encode every prompt once, so that none fails in the middle of the run.

        Args:
            prompts: rows with `prompt`.
            max_tokens: longest prompt that leaves room for a completion; None for no limit.

        Raises:
            DatasetInvalid: naming the first sample that cannot be encoded or is too long, its length and the limit.
        """
        if max_tokens is not None and max_tokens < 1:
            raise DatasetInvalid(
                f"no prompt fits: generation.maxModelLen leaves {max_tokens} tokens beside training.max_completion_length; raise it"
            )
        for index in range(len(prompts)):
            try:
                length = len(self.encode(prompts[index]["prompt"]))
            except DatasetInvalid as error:
                raise DatasetInvalid(f"sample {index}: {error}") from error
            if max_tokens is not None and length > max_tokens:
                raise DatasetInvalid(
                    f"sample {index}: its prompt has {length} tokens, the limit is {max_tokens} (the smaller of training.max_prompt_length and "
                    "generation.maxModelLen - training.max_completion_length): raise it, or remove the sample"
                )


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
