"""Which prompts a rank trains on, and when: an order that the seed fixes and that a resumed run continues.

transformers counts micro-batches and skips as many when it resumes, so the loader has one item per micro-batch. All micro-batches
of one generation carry the same prompts; the trainer takes the first and ignores the rest, and a run that resumes in the middle of
a generation finds its prompts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


class PromptOrder(Sampler[list[int]]):
    """Indices of the prompts of this rank's micro-batches.

    Args:
        size: prompts in the dataset.
        per_rank: prompts of one rank and generation.
        repeats: micro-batches trained on one generation.
        rank, ranks: which share of each generation is ours.
        seed: fixes the order, with the epoch; None keeps the dataset's.
    """

    def __init__(self, *, size: int, per_rank: int, repeats: int, rank: int, ranks: int, seed: int | None) -> None:
        self._size = size
        self._per_rank = per_rank
        self._repeats = repeats
        self._rank = rank
        self._ranks = ranks
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that pass over the dataset."""
        self._epoch = epoch

    @property
    def generations(self) -> int:
        """Generations in one pass. A dataset smaller than one generation is repeated within it; a rest is left out."""
        return max(1, self._size // (self._per_rank * self._ranks))

    def __len__(self) -> int:
        return self.generations * self._repeats

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        step = self._per_rank * self._ranks
        for generation in range(self.generations):
            first = generation * step + self._rank * self._per_rank
            indices = [order[(first + i) % self._size] for i in range(self._per_rank)]
            for _ in range(self._repeats):
                yield indices

    def _order(self) -> list[int]:
        if self._seed is None:
            return list(range(self._size))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return torch.randperm(self._size, generator=generator).tolist()


class PromptLoader(DataLoader[list[dict[str, Any]]]):
    """The loader over a `PromptOrder`; items are lists of dataset rows."""

    def __init__(self, dataset: Any, order: PromptOrder) -> None:
        super().__init__(dataset, batch_sampler=order, collate_fn=list)
        self._prompt_order = order

    def set_epoch(self, epoch: int) -> None:
        """transformers calls this before each pass."""
        self._prompt_order.set_epoch(epoch)
