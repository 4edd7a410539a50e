"""Which tensors are sent, and who writes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from otj_runtime.weights.errors import WeightSyncFailed
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.tensors import policy_tensors, shares


def _model(*, tied: bool) -> Qwen3ForCausalLM:
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
    names = list(policy_tensors(_model(tied=tied)))
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


def test_zero3_is_refused_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(WeightSyncFailed, match="parameter bias is partitioned by DeepSpeed ZeRO-3"):
        policy_tensors(model)


@given(sizes=st.lists(st.integers(1, 10_000), max_size=60), ranks=st.integers(1, 8))
def test_shares_are_disjoint_complete_and_balanced(sizes: list[int], ranks: int) -> None:
    layout = Layout.of([(f"t{i}", (size,)) for i, size in enumerate(sizes)], torch.float32)
    result = shares(layout.tensors, ranks=ranks)
    assert sorted(name for share in result for name in share) == sorted(entry.name for entry in layout.tensors)
    loads = [sum(4 * sizes[int(name[1:])] for name in share) for share in result]
    assert max(loads) - min(loads) <= 4 * max(sizes, default=0)
