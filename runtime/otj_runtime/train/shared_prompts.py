"""Completions of one prompt are scored with the prompt read once, not once for each of them (as in arXiv:2506.05433).

    rows of a micro-batch                     one sequence that the model reads
    prompt A, completion 1
    prompt A, completion 2         ->         A | B | 1 | 2 | 3         every prompt once, then the completions
    prompt B, completion 3

Everything in a decoder but attention looks at one token at a time, so only attention has to know: prompts attend to themselves; a completion
attends to its prompt's keys and values and to itself. Positions count on from the prompt for each completion. Values and gradients are those of
the rows one by one, up to rounding. Of G completions of C tokens behind P of a prompt, P + G C tokens are read instead of G (P + C).

`install` puts this into transformers' own registry of attention functions, under a name of its own; without a `shared_prompts` argument that is
what the model had before. The argument travels through the model's keywords, so it is there again when a checkpoint is recomputed.
Which models pass it on, and have nothing else that looks across tokens, cannot be known from outside: `trial` finds out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

PREFIX = "shared_prompts_"
"""Before the name of the attention that is used within."""

WORTH = 0.1
"""Share of the tokens that must be saved: attention in two parts, and copies of the prompts' keys, cost a few percent."""

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Of transformers' kinds of layers, those that look across tokens by attention alone."""

Attention = Callable[..., tuple[torch.Tensor, Any]]


class SharedPrompts:
    """A micro-batch as one sequence. n prompts padded to P columns on the left, B completions padded to C on the right; N = n P + B C.

    Attributes:
        input_ids, position_ids: [1, N] int64.
        predicting: [B C] int64, the columns whose logits predict the completions' tokens, row by row.
        tokens: [] int64, columns that are no padding.
        longest: P + C.
        computed_in: type of the values that attention met; None if it never looked at this.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], prompt_of: Sequence[int], completions: Sequence[Sequence[int]], *, pad_id: int
    ) -> None:
        """`prompt_of` says which of `prompts` each of `completions` follows."""
        self._width, self._columns = max(map(len, prompts)), max(map(len, completions))
        self._prompts, self._completions = len(prompts), len(completions)
        self._padded = any(len(prompt) < self._width for prompt in prompts)
        ids = [token for prompt in prompts for token in [pad_id] * (self._width - len(prompt)) + list(prompt)]
        ids += [token for row in completions for token in list(row) + [pad_id] * (self._columns - len(row))]
        self.input_ids = torch.tensor([ids])
        self._prompt_of = torch.tensor(prompt_of)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        columns = torch.arange(self._width)
        self._valid = columns >= self._width - lengths[:, None]
        following = lengths[self._prompt_of, None] + torch.arange(self._columns)
        own = (columns - (self._width - lengths[:, None])).clamp(min=0)
        self.position_ids = torch.cat([own.flatten(), following.flatten()])[None]
        first = len(prompts) * self._width
        rows = first + torch.arange(len(completions) * self._columns).view(len(completions), -1)
        last_of_prompt = (self._prompt_of + 1) * self._width - 1
        self.predicting = torch.cat([last_of_prompt[:, None], rows[:, :-1]], dim=1).flatten()
        self.tokens = lengths.sum() + sum(map(len, completions))
        self.longest = self._width + self._columns
        self.computed_in: torch.dtype | None = None
        self._masks: dict[torch.dtype | None, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def to(self, device: torch.device) -> SharedPrompts:
        """The same with its tensors on `device`."""
        moved = object.__new__(SharedPrompts)
        moved.__dict__ = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}
        moved._masks = {}
        return moved

    def rows(self, columns: torch.Tensor) -> torch.Tensor:
        """[1, B C, ...] of the columns that predict -> [B, C, ...]."""
        return columns[0].view(self._completions, self._columns, *columns.shape[2:])

    def attend(
        self, attention: Attention, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **keywords: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention of all columns, by two calls of `attention`.

        Args:
            query: [1, heads, N, D]; key and value may have fewer heads.
            keywords: of `attention`.

        Returns:
            [1, N, heads, D] and None, as transformers' attention functions do.
        """
        self.computed_in = value.dtype
        written_out = attention is not sdpa_attention_forward
        within, across = self._masks_for(query.dtype if written_out else None)
        prompts, rows = zip(*(self._parts(states) for states in (query, key, value)), strict=True)
        seen, _ = attention(module, *prompts, within, **keywords)
        joined = [torch.cat([self._for_each_row(p), c], dim=2) for p, c in zip(prompts[1:], rows[1:], strict=True)]
        answered, _ = attention(module, rows[0], *joined, across, **keywords)
        return torch.cat([seen.flatten(0, 1), answered.flatten(0, 1)])[None], None

    def _parts(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, heads, N, D] -> prompts [n, heads, P, D], completions [B, heads, C, D]."""
        prompts, rows = states[0].split([self._prompts * self._width, self._completions * self._columns], dim=1)
        prompts = prompts.unflatten(1, (self._prompts, self._width))
        rows = rows.unflatten(1, (self._completions, self._columns))
        return prompts.transpose(0, 1), rows.transpose(0, 1)

    def _for_each_row(self, prompts: torch.Tensor) -> torch.Tensor:
        """[n, ...] -> [B, ...]."""
        return prompts.expand(self._completions, -1, -1, -1) if self._prompts == 1 else prompts.index_select(0, self._prompt_of)

    def _masks_for(self, added: torch.dtype | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Who sees whom, among prompts [n or 1, 1, P, P] and from completions [B or 1, 1, C, P + C]: True where, or numbers of type `added` that
        are added to the scores. None is PyTorch's own causal mask, which has the faster kernels. Completions need none for their
        padding: it comes after all that counts."""
        if added not in self._masks:
            device = self._valid.device
            causal = torch.ones(self._width, self._width, dtype=torch.bool, device=device).tril()
            # Padding sees itself: a softmax over nothing would be NaN, and so would the gradients.
            own = torch.ones(self._columns, self._columns, dtype=torch.bool, device=device).tril()
            # Without padding one mask serves all.
            prompts, before = (self._valid, self._valid[self._prompt_of]) if self._padded else (self._valid[:1], self._valid[:1])
            within = causal & prompts[:, None] | torch.eye(self._width, dtype=torch.bool, device=device)
            across = torch.cat([before[:, None].expand(-1, self._columns, -1), own.expand(len(before), -1, -1)], dim=2)
            masks = within[:, None], across[:, None]
            if added is not None:
                self._masks[added] = _additive(masks[0], added), _additive(masks[1], added)
            else:
                self._masks[added] = masks[0] if self._padded else None, masks[1]
        return self._masks[added]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def share_prompts(prompts: Sequence[list[int]], completions: Sequence[list[int]], *, pad_id: int) -> SharedPrompts | None:
    """Rows, each a prompt and its completion, as one sequence; None if that saves too little. Only neighbours share."""
    distinct: list[list[int]] = []
    prompt_of = []
    for prompt in prompts:
        if not distinct or distinct[-1] != prompt:
            distinct.append(prompt)
        prompt_of.append(len(distinct) - 1)
    width, columns = max(map(len, prompts)), max(map(len, completions))
    saved = (len(prompts) - len(distinct)) * width
    if saved < WORTH * len(prompts) * (width + columns):
        return None
    return SharedPrompts(distinct, prompt_of, completions, pad_id=pad_id)


def install(model: Any) -> None:
    """Let the attention of `model`, a transformers model that nothing wraps yet, know `shared_prompts`.

    One stays as it is that is known to have other layers that look across tokens, or a kernel that wants its own kind of masks, as
    FlashAttention's.
    """
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if config._attn_implementation in ("sdpa", "eager") and not others and not getattr(model, "_is_stateful", False):
        model.set_attn_implementation(PREFIX + config._attn_implementation)


def longest_row(model: Any) -> int | None:
    """Most tokens, prompt and completion, that may be scored so under `model`: within its attention's window, if it has one, all see all. None if
    attention does not know `shared_prompts`."""
    config = model.config.get_text_config()
    if not str(config._attn_implementation).startswith(PREFIX):
        return None
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([window for window in windows if window], default=sys.maxsize)


def _written_out(module: Any) -> Attention:
    """Attention that is written out stands beside each model, with that model's peculiarities."""
    found: Attention = sys.modules[type(module).__module__].eager_attention_forward
    return found


def _knowing(attention_of: Callable[[Any], Attention]) -> Attention:
    """The attention that a module uses, which knows `shared_prompts`."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, *, shared_prompts: SharedPrompts | None = None, **keywords: Any
    ) -> tuple[torch.Tensor, Any]:
        attention = attention_of(module)
        if shared_prompts is None:
            return attention(module, query, key, value, mask, **keywords)
        return shared_prompts.attend(attention, module, query, key, value, **keywords)

    return attend


AttentionInterface.register(PREFIX + "sdpa", _knowing(lambda module: sdpa_attention_forward))
AttentionInterface.register(PREFIX + "eager", _knowing(_written_out))
AttentionMaskInterface.register(PREFIX + "sdpa", sdpa_mask)
AttentionMaskInterface.register(PREFIX + "eager", eager_mask)
