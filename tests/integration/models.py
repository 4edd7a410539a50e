"""Tiny models with random weights and a tokenizer, as folders that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 256


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that attention of vLLM on CPU knows
    "max_position_embeddings": 512,
    # Large enough that every parameter moves the log-probabilities by more than the probe's bound.
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make_tiny_model(directory: Path, *, tied: bool, seed: int = 0) -> Path:
    """A Qwen3 of two layers and width 64 in `directory`: 100 to 150 thousand parameters, every family of a real one."""
    torch.manual_seed(seed)
    return _save(Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied)), directory)


def make_tiny_mixture(directory: Path) -> Path:
    """The same as a mixture of four experts in each layer, of which a token takes two."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return _save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts)), directory)


def _save(model: PreTrainedModel, directory: Path) -> Path:
    """Write the model and a tokenizer of words."""
    model.save_pretrained(directory)
    words = WordLevel({"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}, unk_token="</s>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(directory)
    return directory


def mean_id(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that hardly two answers share: the mean of the token ids, as a share of the largest."""
    return [sum(ids) / max(1, len(ids)) / VOCABULARY for ids in completion_ids]
