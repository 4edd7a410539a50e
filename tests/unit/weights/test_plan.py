"""The plan of an installation: recorded once, replayed from anywhere; and the ring that staging uses when memory is limited."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otj_runtime.weights.layout import Layout
from otj_runtime.weights.plan import ReplayingLoader, record, ring

SHAPES = {"embed": (12, 6), "q": (4, 6), "k": (2, 6), "v": (2, 6), "o": (6, 4), "bias": (4,), "norm": (6,)}


class Sharded(torch.nn.Module):
    """One worker of two: fused q, k and v, rows of the output projection cut in columns, a head tied to the embedding."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        self.worker = worker
        self.embed = torch.nn.Parameter(torch.zeros(12, 6, dtype=torch.bfloat16))
        self.head = self.embed
        self.qkv = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
        self.o = torch.nn.Parameter(torch.zeros(6, 2, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.norm = torch.nn.Parameter(torch.zeros(6, dtype=torch.float32))

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        rows = {"q": (0, 2), "k": (2, 1), "v": (3, 1)}
        loaded = set()
        for name, weight in weights:
            if name in rows:
                start, count = rows[name]
                self.qkv.data[start : start + count].copy_(weight.narrow(0, self.worker * count, count))
                loaded.add("qkv")
            elif name == "o":
                self.o.data.copy_(weight.narrow(1, 2 * self.worker, 2))
                loaded.add(name)
            else:
                self.get_parameter(name).data.copy_(weight)
                loaded.add(name)
        return loaded


def staged_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in SHAPES.values()]


@pytest.mark.parametrize("worker", [0, 1])
def test_replayed_copies_leave_what_the_models_own_loader_leaves_bit_by_bit(worker: int) -> None:
    layout = Layout.of(SHAPES.items(), torch.bfloat16)
    model, reference = Sharded(worker), Sharded(worker)
    plan = record(model.load_weights, layout, staged_tensors(0))
    assert plan.untouched(model) == []
    assert plan.loaded == {"embed", "qkv", "o", "bias", "norm"}
    # From one buffer, as staging lays them out.
    buffer = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    staged = [buffer[e.offset : e.offset + e.nbytes].view(e.torch_dtype).view(e.shape) for e in layout.tensors]
    for version in (1, 2):
        for place, value in zip(staged, staged_tensors(version), strict=True):
            place.copy_(value)
        torch._foreach_copy_([copy.destination for copy in plan.copies], plan.sources(staged))
        reference.load_weights(iter(zip(SHAPES, staged_tensors(version), strict=True)))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True))


class Computing(Sharded):
    """Does more than copy."""

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, -weight if name == "norm" else weight) for name, weight in weights)


def test_a_parameter_that_the_loader_computes_is_not_in_the_plan() -> None:
    model = Computing(0)
    assert record(model.load_weights, Layout.of(SHAPES.items(), torch.bfloat16), staged_tensors(0)).untouched(model) == ["norm"]


def packed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in one buffer, one behind the other, as transfers in pieces bring them."""
    buffer = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    parts = buffer.split([tensor.nbytes for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@pytest.mark.parametrize("worker", [0, 1])
@given(data=st.data())
def test_a_loader_that_replays_leaves_what_the_models_own_leaves_however_the_tensors_are_cut_into_pieces(
    worker: int, data: st.DataObject
) -> None:
    model, reference = Sharded(worker), Sharded(worker)
    loader = ReplayingLoader(model)
    for version in range(3):
        tensors = staged_tensors(version)
        cuts = sorted(data.draw(st.sets(st.integers(1, len(SHAPES) - 1))))
        for begin, end in zip([0, *cuts], [*cuts, len(SHAPES)], strict=True):
            loader.load_weights(zip(list(SHAPES)[begin:end], packed(tensors[begin:end]), strict=True))
        reference.load_weights(iter(zip(SHAPES, tensors, strict=True)))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True))
    assert loader.untouched() == []


def test_a_loader_that_replays_asks_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sharded(0)
    loader = ReplayingLoader(model)
    loader.load_weights(zip(SHAPES, staged_tensors(0), strict=True))
    monkeypatch.setattr(model, "load_weights", None)
    loader.load_weights(zip(SHAPES, staged_tensors(1), strict=True))
    assert torch.equal(model.embed, staged_tensors(1)[0])


def test_a_loader_that_replays_names_what_the_model_computes_and_what_never_came() -> None:
    loader = ReplayingLoader(Computing(0))
    loader.load_weights(zip(list(SHAPES)[1:], staged_tensors(0)[1:], strict=True))
    assert loader.untouched() == ["embed", "norm"]
    loader.load_weights(zip(list(SHAPES)[:1], staged_tensors(0)[:1], strict=True))
    assert loader.untouched() == ["norm"]


@given(sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=40), spare=st.integers(0, 6000))
@settings(deadline=None)
def test_a_ring_never_puts_a_tensor_where_one_lies_that_was_not_installed(sizes: list[int], spare: int) -> None:
    capacity = max(sizes) + spare
    places = ring(sizes, capacity)
    for index, place in enumerate(places):
        assert 0 <= place.offset <= capacity - sizes[index]
        assert place.after <= index
        for earlier in range(place.after, index):
            other = places[earlier]
            assert other.offset + sizes[earlier] <= place.offset or place.offset + sizes[index] <= other.offset


def test_a_tensor_larger_than_the_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor 1 has 300 bytes, the staging buffer 200"):
        ring([100, 300], 200)
