"""Which tensors are sent, and who writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from otj_runtime.weights.composed import unpartitioned, whole
from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.tensors import is_sharded, policy_tensors, shares


def tiny_model(*, tied: bool) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_sent_once_under_the_embeddings_name(tied: bool) -> None:
    names = list(policy_tensors(tiny_model(tied=tied)))
    assert names[0] == "model.embed_tokens.weight"
    assert ("lm_head.weight" in names) is not tied


def test_two_parameters_on_one_memory_are_sent_once() -> None:
    model = torch.nn.Module()
    model.first = torch.nn.Parameter(torch.rand(4))
    model.second = torch.nn.Parameter(model.first.data)
    model.part = torch.nn.Parameter(model.first.data[:2])
    assert list(policy_tensors(model)) == ["first", "part"]


def test_persistent_floating_buffers_come_along_and_no_others() -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.rand(2))
    model.register_buffer("bias_of_router", torch.rand(2))
    model.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    model.register_buffer("frequencies", torch.rand(2), persistent=False)
    assert list(policy_tensors(model)) == ["weight", "bias_of_router"]


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """DeepSpeed's way to gather parameters that `cut` has cut; the list notes how many at a time."""
    gathering: list[int] = []

    @contextmanager
    def gathered_parameters(parameters: list[Any]) -> Iterator[None]:
        gathering.append(len(parameters))
        for parameter in parameters:
            parameter.data = parameter.ds_kept
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered_parameters)))
    return gathering


def cut(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Leave of each parameter what ZeRO-3 leaves of it; what they were, by name."""
    kept = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        vars(parameter).update(ds_id=number, ds_shape=parameter.shape, ds_kept=kept[name])
        parameter.data = torch.empty(0)
    return kept


def test_a_parameter_that_zero3_has_cut_is_gathered_when_it_is_written(zero3: list[int]) -> None:
    model = torch.nn.Linear(2, 3)
    kept = cut(model)
    tensors = policy_tensors(model)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"weight": (3, 2), "bias": (3,)}
    assert is_sharded(tensors.values())
    assert zero3 == []
    written = whole(tensors["weight"])
    assert torch.equal(written, kept["weight"])
    assert written.data_ptr() != kept["weight"].data_ptr()
    assert zero3 == [1], "the whole model would not fit"


def test_a_model_that_zero3_has_cut_is_made_whole_in_a_plain_copy(zero3: list[int]) -> None:
    model = torch.nn.Linear(2, 3)
    assert unpartitioned(model) is model
    kept = cut(model)
    plain = unpartitioned(model)
    assert not any(hasattr(parameter, "ds_id") for parameter in plain.parameters())
    assert torch.equal(plain.weight, kept["weight"])
    assert model.weight.numel() == 0, "the model that learns stays cut"


@pytest.fixture
def lora_model() -> Any:
    """A model with an adapter that changes its outputs, and an output layer that is trained whole."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    return get_peft_model(tiny_model(tied=False), config)


def test_an_adapter_is_merged_in_a_copy_under_the_names_of_the_base_model(lora_model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in lora_model.state_dict().items()}
    tensors = {name: whole(tensor) for name, tensor in policy_tensors(lora_model).items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_model.state_dict().items())
    expected = dict(lora_model.merge_and_unload().named_parameters())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name].detach())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), r"adapter of model\.layers\.0\.self_attn\.q_proj\.weight .*no DoRA"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), r"adapter of model\.embed_tokens\.weight .*leave embeddings out"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "adapter of type PREFIX_TUNING cannot be merged"),
    ],
    ids=["dora", "embedding", "prefix"],
)
def test_an_adapter_that_is_no_sum_is_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(WeightSyncFailed, match=words):
        policy_tensors(get_peft_model(tiny_model(tied=False), config))


@given(sizes=st.lists(st.integers(1, 10_000), max_size=60), ranks=st.integers(1, 8))
def test_shares_are_disjoint_complete_and_balanced(sizes: list[int], ranks: int) -> None:
    layout = Layout.of([(f"t{i}", (size,)) for i, size in enumerate(sizes)], torch.float32)
    result = shares(layout.tensors, ranks=ranks)
    assert sorted(name for share in result for name in share) == sorted(entry.name for entry in layout.tensors)
    loads = [sum(4 * sizes[int(name[1:])] for name in share) for share in result]
    assert max(loads) - min(loads) <= 4 * max(sizes, default=0)
