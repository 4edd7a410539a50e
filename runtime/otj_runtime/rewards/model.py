"""Sequence-classification models as rewards: prompt and completion in, the model's one logit out.

    prompts, completions -> texts, through the reward model's own chat template if they are messages
                         -> batches of similar length -> logits

The model shares the rank's training device unless it gets one of its own; either way it stays there for the whole run, without
gradients. Its weights load in `load`, not when the object is made, so that a job's rewards can be checked before anything large loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from otj_runtime.pod.errors import RewardImportFailed

if TYPE_CHECKING:
    import torch


class RewardModel:
    """A reward function that asks a model with a single label.

    Args:
        model: folder or hub name of a sequence-classification model, or the model itself.
        tokenizer: the model's; loaded from the same place if None.
        device: where the model computes, such as "cuda:1" or "cpu". Default: the device that this rank trains on.
        batch_size: texts of one forward pass.
        max_length: longest text, in tokens; longer ones lose their beginning, because what is judged stands at the end. Default: no limit.
        dtype: type of the weights, by its torch name. Default: as the model was saved.
        revision: of the hub model.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        device: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise RewardImportFailed(f"reward model {_name(model)}: batch_size: {batch_size} is too small; use at least 1")
        self.__name__ = _name(model)
        self._source = model
        self._tokenizer = tokenizer
        self._device = device
        self._batch_size = batch_size
        self._max_length = max_length
        self._dtype = dtype
        self._revision = revision
        self._model: Any = None

    def load(self) -> None:
        """Load the weights onto their device, once.

        Raises:
            RewardImportFailed: naming the model, what failed and the fix.
        """
        if self._model is not None:
            return
        from accelerate import PartialState
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from otj_runtime.weights.composed import unpartitioned

        model, tokenizer = self._source, self._tokenizer
        try:
            if isinstance(model, str):
                model = AutoModelForSequenceClassification.from_pretrained(model, dtype=self._dtype, num_labels=1, revision=self._revision)
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, revision=self._revision)
            model = unpartitioned(model).to(self._device or PartialState().device)
        except Exception as error:  # loaders and drivers raise what they like
            raise RewardImportFailed(
                f"reward model {self.__name__} cannot be loaded: {type(error).__name__}: {str(error)[:600]}; it must be a "
                "sequence-classification model with one label"
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self._max_length is not None:
            tokenizer.truncation_side = "left"
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One logit per completion."""
        import torch

        self.load()
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # alike lengths together: little padding
        scores = [0.0] * len(texts)
        with torch.inference_mode():
            for first in range(0, len(order), self._batch_size):
                chosen = order[first : first + self._batch_size]
                for index, score in zip(chosen, self._logits([texts[index] for index in chosen]).tolist(), strict=True):
                    scores[index] = score
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + str(completion)
        return str(self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))

    def _logits(self, texts: list[str]) -> torch.Tensor:
        """[texts] float32: the model's single logit of each text."""
        inputs = self._tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=self._max_length is not None,
            max_length=self._max_length,
            add_special_tokens=False,
        ).to(self._model.device)
        logits: torch.Tensor = self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return logits[:, 0].float()


def _name(model: Any) -> str:
    source = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return str(source).rstrip("/").split("/")[-1]
