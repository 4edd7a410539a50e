"""Whether a model gives the same when prompts are read once for all their completions: tried on a few tokens, before it is relied on.

Three kinds of models do not: those that do not hand the keyword down to their attention, those with layers besides attention that look across
tokens (Mamba, convolutions), and those that count positions by themselves. How far numbers may differ by rounding depends on model and
type, so the measure is what the prompt does to them: a mistake in who sees what, or where, is of that size.
"""

from __future__ import annotations

import torch

from otj_runtime.rollout.types import Completion
from otj_runtime.train.batch import Row, collate
from otj_runtime.train.shared_prompts import SharedPrompts

TOLERANCE, NARROW_TOLERANCE = 1e-3, 0.2
"""Largest mean difference, in units of the one that another prompt makes; computing in float32, and in 16 bits, whose rounding makes about a
twentieth of it."""

TOKENS = 32


class Trial:
    """Four completions of two prompts, all over the vocabulary, of different lengths, so that every kind of padding is in it.

    Args:
        vocabulary: tokens that the model knows.
        device: of the model.

    Attributes:
        rows_and_others: the four rows, then their completions behind the other prompt each.
        shared: the four rows with each prompt once.
    """

    def __init__(self, *, vocabulary: int, device: torch.device) -> None:
        ids = [(i * 7 % TOKENS) * vocabulary // TOKENS for i in range(TOKENS)]
        prompts = [ids[:12], ids[12:19]]
        completions = [ids[20:28], ids[3:9], ids[24:32], ids[10:17]]
        which = [0, 0, 1, 1]
        rows = [(prompts[w], tokens) for w, tokens in zip(which, completions, strict=True)]
        rows += [(prompts[1 - w], tokens) for w, tokens in zip(which, completions, strict=True)]
        unscored = [Row(prompt, Completion(tokens, [0.0] * len(tokens), finished=True, policy_version=0)) for prompt, tokens in rows]
        self.rows_and_others = collate(unscored, pad_id=ids[0], mask_truncated=False).to(device)
        self.shared = SharedPrompts(prompts, which, completions, pad_id=ids[0]).to(device)
        self._rows = len(which)

    @property
    def completion_ids(self) -> torch.Tensor:
        """[4, C] int64, of the four rows."""
        return self.rows_and_others.completion_ids[: self._rows]

    def problem(self, plain: torch.Tensor, found: torch.Tensor) -> str | None:
        """What speaks against reading prompts once; None if nothing does.

        Args:
            plain: [8, C] float32, log-probabilities of `rows_and_others`, in nats.
            found: [4, C] float32, those of `shared`.
        """
        if self.shared.computed_in is None:
            return "the model does not hand shared_prompts to its attention"
        counted = self.rows_and_others.completion_mask[: self._rows] > 0
        difference = float((found - plain[: self._rows])[counted].abs().mean())
        another = float((plain[self._rows :] - plain[: self._rows])[counted].abs().mean())
        # Whether it computes in 16 bits is only known within the model: accelerate switches autocast on there.
        tolerance = TOLERANCE if self.shared.computed_in.itemsize >= 4 else NARROW_TOLERANCE
        if not difference <= another * tolerance:  # so that NaN is a problem, too
            return f"log-probabilities would differ by {difference:.1e} nats, where another prompt makes {another:.1e}"
        return None
