"""Model and tokenizer as the trainer wants them: from a name, a folder, or as given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from otj_runtime.pod.errors import ModelNotFound
from otj_runtime.train.config import OnlineConfig
from otj_runtime.train.shared_prompts import install


def load_policy(model: Any, tokenizer: Any, *, args: OnlineConfig, peft_config: Any) -> tuple[Any, Any]:
    """The policy as `args` want it, and its tokenizer.

    Args:
        model: as `load_model` takes it.
        tokenizer: the policy's; None for the one that was saved with it.
        peft_config: the adapter to train instead of the whole, if any.

    Raises:
        ModelNotFound, ValueError: see `load_model` and `load_tokenizer`.
    """
    init = dict(args.model_init_kwargs or {})
    found = load_tokenizer(tokenizer or source_of(model), revision=init.get("revision"))
    policy = load_model(model, **init)
    if args.disable_dropout:
        switch_off_dropout(policy)
    install(policy)  # now: what wraps it later hides what class it is
    if peft_config is not None:
        set_seed(args.seed)  # the adapter's first values are drawn, and every strategy must begin with the same
        policy = with_adapter(policy, peft_config)
    return policy, found


def load_model(source: Any, **keywords: Any) -> Any:
    """The policy, a causal language model.

    Args:
        source: a name on the hub, a folder, or the model itself.
        keywords: of `from_pretrained`. `dtype` is the type of the master weights, float32 unless given.

    Raises:
        ModelNotFound: if transformers can load no causal language model from there.
        ValueError: if `source` is a model already and there are keywords, which would have no effect.
    """
    if not isinstance(source, str | Path):
        if keywords:
            raise ValueError("model_init_kwargs: the model is loaded already; give its name or path, or load it with these arguments")
        model = source
    else:
        dtype = keywords.pop("dtype", keywords.pop("torch_dtype", "float32"))
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **keywords)
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFound(f"cannot load a causal language model from {source}: {error}") from error
    model.config.use_cache = False
    return model


def load_tokenizer(source: Any, *, revision: str | None = None) -> Any:
    """The model's tokenizer, with a padding token (the end of sequence, if it has none of its own).

    Args:
        source: the model's name or folder, or the tokenizer itself.
        revision: of the model on the hub.

    Raises:
        ModelNotFound: if there is none, or it knows neither token.
    """
    tokenizer = source
    if isinstance(source, str | Path):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFound(f"cannot load a tokenizer from {source}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelNotFound(f"the tokenizer of {source} has neither a padding nor an end-of-sequence token")
    return tokenizer


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Make every dropout layer pass its input through: with dropout, trainer and generator would be different policies."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a completion, by the model's generation configuration and its tokenizer."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ends = {stated} if isinstance(stated, int) else set(stated or ())
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def with_adapter(model: Any, peft_config: Any) -> Any:
    """The PEFT model of which only the adapter that `peft_config` describes is trained."""
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def is_peft_model(model: Any) -> bool:
    """Whether `model` is a base model with adapters."""
    return hasattr(model, "peft_config")


def source_of(model: Any) -> str | Path:
    """The name or folder that `model` was loaded from, or is to be."""
    return model if isinstance(model, str | Path) else str(model.config._name_or_path)


def default_output(model: Any, method: str) -> str:
    """Output folder of a run that names none."""
    return f"{Path(source_of(model)).name or type(model).__name__}-{method}"


def source_of_prompts(dataset: Any) -> str | None:
    """Where the rows of `dataset` come from, if it says so: prompts of a job do, and datasets of the hub."""
    source = getattr(dataset, "source", None) or getattr(getattr(dataset, "info", None), "dataset_name", None)
    return None if source is None else str(source)
