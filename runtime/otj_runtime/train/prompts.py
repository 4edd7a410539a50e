"""Which prompts a rank trains on, and when: an order that the seed fixes and that a resumed run continues.

transformers counts micro-batches and skips as many when it resumes, so the loader has one item per micro-batch. All micro-batches
of one generation carry the same prompts. The loader only counts: which prompts to sample is asked by the number of the generation,
because that may be ahead of what transformers has reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Sampler

from otj_runtime.data.load import Prompts, Stream, prompts_of
from otj_runtime.data.prepare import LengthRule, StreamedPrompts, TokenizedPrompts, prepare
from otj_runtime.data.tokenize import PromptEncoder
from otj_runtime.pod.errors import DatasetInvalid, InvalidSpec
from otj_runtime.train.config import OnlineConfig


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
        self.size = size
        self._per_rank = per_rank
        self._repeats = repeats
        self._rank = rank
        self._ranks = ranks
        self._seed = seed
        self._epoch = 0
        self._shuffled: tuple[int, Sequence[int] | torch.Tensor] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that pass over the dataset."""
        self._epoch = epoch

    @property
    def generations(self) -> int:
        """Generations in one pass. A dataset smaller than one generation is repeated within it; a rest is left out."""
        return max(1, self.size // (self._per_rank * self._ranks))

    def __len__(self) -> int:
        return self.generations * self._repeats

    def __iter__(self) -> Iterator[list[int]]:
        for generation in range(self.generations):
            indices = self.of_generation(self._epoch * self.generations + generation)
            for _ in range(self._repeats):
                yield indices

    def of_generation(self, number: int) -> list[int]:
        """The prompts of this rank in generation `number`, counted from 0 through all epochs. It depends on nothing else, so it can be
        asked ahead of time, and again after a restart."""
        epoch, generation = divmod(number, self.generations)
        order = self._order(epoch)
        first = generation * self._per_rank * self._ranks + self._rank * self._per_rank
        return [int(order[(first + i) % self.size]) for i in range(self._per_rank)]

    def _order(self, epoch: int) -> Sequence[int] | torch.Tensor:
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._shuffle(epoch))
        return self._shuffled[1]

    def _shuffle(self, epoch: int) -> Sequence[int] | torch.Tensor:
        if self._seed is None:
            return range(self.size)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator)  # a list of as many numbers would take four times the memory


class PromptLoader(DataLoader[list[int]]):
    """The loader over a `PromptOrder`; items are indices, because nobody reads them: transformers counts."""

    def __init__(self, order: PromptOrder) -> None:
        super().__init__(range(order.size), batch_sampler=order, collate_fn=list)  # type: ignore[arg-type]  # a range is a dataset
        self._prompt_order = order

    def set_epoch(self, epoch: int) -> None:
        """transformers calls this before each pass."""
        self._prompt_order.set_epoch(epoch)


def prepare_prompts(
    dataset: Any, encoder: PromptEncoder, *, args: OnlineConfig, max_tokens: int | None
) -> TokenizedPrompts | StreamedPrompts:
    """`dataset` encoded once for all ranks of the node, and rows of more than `max_tokens` refused or dropped. Collective.

    Args:
        dataset: what `load_prompts` returned, or what a script gives: a dataset of `datasets`, streaming or not, or a list of rows.

    Raises:
        DatasetInvalid: see `prepare`.
        InvalidSpec: if the dataset is a stream and nothing says how long to train.
    """
    prompts = dataset if isinstance(dataset, Prompts | Stream) else prompts_of(dataset, seed=args.seed)
    if isinstance(prompts, Stream) and args.max_steps <= 0:
        raise InvalidSpec("training.max_steps: a streaming dataset has no length; say how many steps to train")
    if args.overlong_prompts not in ("refuse", "drop"):
        raise InvalidSpec(f"training.overlong_prompts: {args.overlong_prompts!r} is unknown; use refuse or drop")
    state = PartialState()
    return prepare(
        prompts,
        encoder,
        LengthRule(max_tokens=max_tokens, overlong="drop" if args.overlong_prompts == "drop" else "refuse"),
        folder=Path(str(args.output_dir)) / ".cache" / "prompts" if state.num_processes > 1 else None,
        writes=state.is_local_main_process,
        wait=state.wait_for_everyone,
    )


def prepare_eval_prompts(dataset: Any, encoder: PromptEncoder, *, args: OnlineConfig, max_tokens: int | None) -> Any:
    """The same for what is evaluated: a dataset, several by name, or None; prepared ones stay as they are. Collective.

    Raises:
        DatasetInvalid: as `prepare_prompts`, and for a stream, whose end nobody knows.
    """
    if dataset is None or isinstance(dataset, TokenizedPrompts):
        return dataset
    if isinstance(dataset, dict):
        return {name: prepare_eval_prompts(part, encoder, args=args, max_tokens=max_tokens) for name, part in dataset.items()}
    if isinstance(dataset, Stream) or not hasattr(dataset, "__len__"):
        raise DatasetInvalid("eval_dataset: a streaming dataset has no end; take some rows of it, as a list")
    return prepare_prompts(dataset, encoder, args=args, max_tokens=max_tokens)


def prompt_order(prompts: Any, *, args: OnlineConfig, rank: int, ranks: int) -> PromptOrder:
    """The order of one rank's prompts. A stream is shuffled where it is read, and its order is its own."""
    shuffled = args.shuffle_dataset and not isinstance(prompts, StreamedPrompts)
    return PromptOrder(
        size=len(prompts),
        per_rank=args.prompts_per_rank,
        repeats=args.micro_batches_per_generation,
        rank=rank,
        ranks=ranks,
        seed=args.seed if shuffled else None,
    )
