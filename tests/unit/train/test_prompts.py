"""The order of prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.train.prompts import PromptOrder


def orders(*, size: int, per_rank: int, repeats: int, ranks: int, seed: int | None = 0) -> list[PromptOrder]:
    return [PromptOrder(size=size, per_rank=per_rank, repeats=repeats, rank=rank, ranks=ranks, seed=seed) for rank in range(ranks)]


@given(size=st.integers(1, 60), per_rank=st.integers(1, 5), repeats=st.integers(1, 4), ranks=st.integers(1, 4), epoch=st.integers(0, 3))
def test_ranks_share_a_generation_without_overlap(size: int, per_rank: int, repeats: int, ranks: int, epoch: int) -> None:
    shares = []
    for order in orders(size=size, per_rank=per_rank, repeats=repeats, ranks=ranks):
        order.set_epoch(epoch)
        items = list(order)
        assert len(items) == len(order)
        assert all(len(item) == per_rank for item in items)
        shares.append(items)
    if size >= per_rank * ranks:
        for generation in range(0, len(shares[0]), repeats):
            seen = [index for items in shares for index in items[generation]]
            assert len(set(seen)) == len(seen)


def test_micro_batches_of_a_generation_carry_the_same_prompts() -> None:
    [order] = orders(size=8, per_rank=2, repeats=3, ranks=1)
    items = list(order)
    assert items[0] == items[1] == items[2] != items[3]


def test_the_seed_and_the_epoch_fix_the_order() -> None:
    first, same, other = (orders(size=50, per_rank=2, repeats=1, ranks=1, seed=seed)[0] for seed in (1, 1, 2))
    assert list(first) == list(same) != list(other)
    first.set_epoch(1)
    assert list(first) != list(same)


def test_without_a_seed_the_order_is_the_datasets() -> None:
    [order] = orders(size=6, per_rank=2, repeats=1, ranks=1, seed=None)
    assert list(order) == [[0, 1], [2, 3], [4, 5]]


def test_a_dataset_smaller_than_a_generation_is_repeated_within_it() -> None:
    [order] = orders(size=3, per_rank=5, repeats=1, ranks=1, seed=None)
    assert list(order) == [[0, 1, 2, 0, 1]]
