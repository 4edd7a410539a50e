"""What was installed is compared with what was staged, copy by copy, and what differs is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.weights.installed import InstalledCheck, common_rows
from otj_runtime.weights.layout import Layout
from otj_runtime.weights.plan import Plan, record
from tests.unit.weights.test_plan import SHAPES, Sharded, staged_tensors

CORRUPTED = {
    "qkv": ("qkv", (1, 3), "q"),
    "the last row of a fused parameter": ("qkv", (3, 5), "v"),
    "columns of a cut one": ("o", (4, 1), "o"),
    "a vector": ("bias", (0,), "bias"),
    "a parameter in another dtype": ("norm", (5,), "norm"),
    "tied embeddings": ("embed", (11, 0), "embed"),
}


def _installed(worker: int) -> tuple[Sharded, Plan, list[torch.Tensor]]:
    """A worker's model, its plan and what was staged, after an installation by the plan."""
    layout = Layout.of(SHAPES.items(), torch.bfloat16)
    model = Sharded(worker)
    plan = record(model.load_weights, layout, staged_tensors(0))
    staged = staged_tensors(1)
    torch._foreach_copy_([copy.destination for copy in plan.copies], plan.sources(staged))
    return model, plan, staged


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize(("parameter", "place", "source"), CORRUPTED.values(), ids=CORRUPTED)
def test_one_element_that_is_not_what_was_staged_is_found_by_the_name_of_its_parameter(
    worker: int, parameter: str, place: tuple[int, ...], source: str
) -> None:
    model, plan, staged = _installed(worker)
    check = InstalledCheck(plan, model)
    assert check.differing(staged) == []
    with torch.no_grad():
        model.get_parameter(parameter)[place] *= -1
    assert check.differing(staged) == [f"{parameter} (from {source})"]


def test_rows_that_changed_places_are_found() -> None:
    model, plan, staged = _installed(0)
    with torch.no_grad():
        model.qkv[:2] = model.qkv[:2].flip(0).clone()
    assert InstalledCheck(plan, model).differing(staged) == ["qkv (from q)"]


def test_weights_of_another_version_differ_everywhere() -> None:
    model, plan, _ = _installed(0)
    assert len(InstalledCheck(plan, model).differing(staged_tensors(2))) == len(SHAPES)


def test_a_place_that_two_tensors_were_copied_to_must_hold_the_last() -> None:
    layout = Layout.of([("old", (3,)), ("new", (3,))], torch.bfloat16)
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    tensors = [torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]

    def load(weights: object) -> None:
        for _, weight in weights:  # type: ignore[attr-defined]
            model.weight.data[0].copy_(weight)

    assert InstalledCheck(record(load, layout, tensors), model).differing(tensors) == []


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    orders=st.tuples(st.randoms(), st.randoms()),
    spare=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_common_rows_pair_every_element_of_two_views_once(shape: list[int], orders: tuple[object, object], spare: tuple[int, int]) -> None:
    views = [_view(shape, order, extra) for order, extra in zip(orders, spare, strict=True)]
    pairs = []
    for rows in common_rows(shape, *(view.stride() for view in views)):
        for index in range(rows.count):
            row, column = divmod(index, rows.columns)
            pairs.append((rows.left + row * rows.left_stride + column, rows.right + row * rows.right_stride + column))
    memory = [torch.arange(view.untyped_storage().nbytes() // view.itemsize).as_strided(shape, view.stride()) for view in views]
    assert sorted(pairs) == sorted(zip(*(places.flatten().tolist() for places in memory), strict=True))


def _view(shape: list[int], order: object, spare: int) -> torch.Tensor:
    """A view of that shape whose dimensions lie in memory in a random order, the innermost with room to spare."""
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    sizes = [shape[dim] for dim in dims]
    wide = torch.zeros([*sizes[:-1], sizes[-1] + spare])
    return wide[..., : sizes[-1]].permute([dims.index(dim) for dim in range(len(shape))])
