"""The tiny model of the samples: a Qwen3 with 132,800 random parameters that learns to copy four symbols in seconds on a CPU.

It is made without torch or transformers, from numpy's random numbers and the file formats alone, so the model container starts
at once. Heads have 32 dimensions, because vLLM's attention kernels begin there. Embeddings are untied, because tied ones need twice
the steps to learn to reverse. A token is a character, so that prompts can be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

END = "<|endoftext|>"
"""Begins a prompt, ends a completion and fills up rows. One token for all, so that decoding, which skips it, never shifts a symbol."""

SYMBOLS = "abcdefgh"
"""What the built-in tasks copy and reverse are written in."""

SEPARATOR = "="
"""Ends their prompts."""

VOCABULARY = [END, SEPARATOR, *SYMBOLS]

LAYERS, HIDDEN, INTERMEDIATE, HEADS, HEAD_SIZE, POSITIONS = 2, 64, 256, 2, 32, 512
INITIAL_DEVIATION = 0.02
SEED = 20


def config() -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": INITIAL_DEVIATION,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | special_ids()


def special_ids() -> dict[str, int]:
    """Token ids by their role; one token plays all."""
    end = VOCABULARY.index(END)
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def tensors(seed: int = SEED) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Initial weights by checkpoint name, float32: matrices normal with deviation 0.02, norms one, as transformers initialises."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(INITIAL_DEVIATION)

    def ones(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ones(size, dtype=np.float32)

    attention = HEADS * HEAD_SIZE
    found = {
        "model.embed_tokens.weight": matrix(len(VOCABULARY), HIDDEN),
        "model.norm.weight": ones(HIDDEN),
        "lm_head.weight": matrix(len(VOCABULARY), HIDDEN),
    }
    for layer in range(LAYERS):
        pieces = {
            "input_layernorm": ones(HIDDEN),
            "post_attention_layernorm": ones(HIDDEN),
            "self_attn.q_proj": matrix(attention, HIDDEN),
            "self_attn.k_proj": matrix(attention, HIDDEN),
            "self_attn.v_proj": matrix(attention, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, attention),
            "self_attn.q_norm": ones(HEAD_SIZE),
            "self_attn.k_norm": ones(HEAD_SIZE),
            "mlp.gate_proj": matrix(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": matrix(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, INTERMEDIATE),
        }
        found |= {f"model.layers.{layer}.{name}.weight": values for name, values in pieces.items()}
    return found


def tokenizer() -> Tokenizer:
    """One token per character; a character outside the vocabulary is an error, never an unknown token."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    made.add_special_tokens([END])
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, VOCABULARY.index(END))])
    return made


def write_tiny(directory: Path) -> None:
    """The model as a transformers folder in `directory`, which exists."""
    save_file(tensors(), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "generation_config.json", special_ids())
    _write_json(directory / "config.json", config())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
