"""Log-probabilities of completions under a model, without ever holding a number per token *and* vocabulary entry.

    model forward (trunk) -> hidden states of the completion columns -> output layer, a chunk of tokens at a time:
        logits of the chunk / temperature -> log-probability of the token that follows, entropy -> forget the logits
    backward: logits of the chunk again -> gradient of hidden states and of the output layer -> forget them

With a vocabulary of 150,000, the float32 logits of 16 x 256 tokens take 2.4 GB, and a plain backward holds them three times; a chunk
takes `CHUNK_TOKENS` rows of that. The price is the output layer's matrix product twice in the backward.

The model's own forward runs, whatever wraps it (DDP, FSDP, adapters, checkpointing, Liger's layers): only its output layer is
replaced for the duration of the call, and what that returns passes through the model as if it were logits. A model that does
something to logits afterwards (a soft cap, a scale) would do it to log-probabilities instead; so the first call compares what came
out with what went in, and such a model is scored from its full logits from then on. So is one whose output layer is no plain linear
layer.

Completions that share a prompt are scored with it read once (`shared_prompts`), if a trial on a few tokens, before the first micro-batch,
gives what the rows give one by one. On every rank, whatever its rows are: sharded models count forward passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from otj_runtime.train.batch import MicroBatch
from otj_runtime.train.shared_prompts import SharedPrompts, longest_row
from otj_runtime.train.trial import Trial
from otj_runtime.weights.forwards import computing_by

log = logging.getLogger(__name__)

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at the same time: enough rows for a full-speed matrix product, 0.6 GB at 150,000 entries."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of sampled completions; meaningless where `completion_mask` is 0.

    Attributes:
        logprobs: [B, C] float32, of each completion token at the sampling temperature, in nats.
        entropy: [B, C] float32, of the distribution that each token was drawn from, in nats; without gradient.
        tokens: [] int64, tokens that the model read for them.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a model reads a micro-batch.

    Attributes:
        arguments: of the model's forward.
        predictions: [.., H] of the columns that the model was told to keep -> [B, C, H]: those that predict the completions' tokens.
        tokens: [] int64.
    """

    arguments: dict[str, Any]
    predictions: Callable[[torch.Tensor], torch.Tensor]
    tokens: torch.Tensor


class Scorer:
    """Scores completions under one model.

    Args:
        model: the unwrapped causal language model.
        temperature: logits are divided by it, as the sampler did.
    """

    def __init__(self, model: Any, *, temperature: float) -> None:
        self._temperature = temperature
        # Padding on the left makes positions that attend to nothing, and for these cuDNN's attention, PyTorch's first choice on an H100,
        # returns gradients of NaN in 16 bits (torch 2.11). A context around the forward would not reach recomputed checkpoints.
        torch.backends.cuda.enable_cudnn_sdp(False)
        head = model.get_output_embeddings()
        self._head = head if isinstance(head, torch.nn.Linear) and head.weight.is_floating_point() else None
        self._trusted = False
        self._longest_shared = longest_row(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._tried = False

    @property
    def chunked(self) -> bool:
        """Whether log-probabilities are computed in chunks; False also once a model turned out to change its logits afterwards."""
        return self._head is not None

    @property
    def shares(self) -> bool:
        """Whether prompts are read once for all their completions; False also once a model turned out not to bear it."""
        return self._longest_shared is not None

    def __call__(self, model: Any, batch: MicroBatch) -> Scores:
        """Run `model` (the scorer's own, or a wrapper of it) on a micro-batch."""
        if self.shares and not self._tried:
            self._tried = True
            self._try(model, batch.input_ids.device)
        shared = batch.shared
        if shared is None or self._longest_shared is None or shared.longest > self._longest_shared:
            return self._read(model, _row_by_row(batch), batch.completion_ids)
        return self._read(model, _prompts_once(shared), batch.completion_ids)

    def _read(self, model: Any, reading: _Reading, targets: torch.Tensor) -> Scores:
        if self._head is None:
            return _from_logits(reading.predictions(model(**reading.arguments).logits), targets, self._temperature, tokens=reading.tokens)
        with _scoring_head(self._head, targets, self._temperature, predictions=reading.predictions) as returned:
            output = model(**reading.arguments).logits
        if not self._trusted:
            if len(returned) != 1 or output.dtype != returned[0].dtype or not torch.equal(output, returned[0]):
                log.warning("the model changes its logits after the output layer: log-probabilities take the memory of all logits")
                self._head = None
                return self._read(model, reading, targets)
            self._trusted = True
        return Scores(output[..., 0], output[..., 1].detach(), reading.tokens)

    @torch.no_grad()
    def _try(self, model: Any, device: torch.device) -> None:
        """Find out whether `model` bears `shared_prompts`."""
        trial = Trial(vocabulary=self._vocabulary, device=device)
        rows = trial.rows_and_others
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a run that resumes draws what it would have drawn
            plain = self._read(model, _row_by_row(rows), rows.completion_ids).logprobs
            try:
                found = self._read(model, _prompts_once(trial.shared), trial.completion_ids).logprobs
                problem = trial.problem(plain, found)
            except Exception as error:  # whatever the model's own code makes of a keyword and a mask that it does not know
                problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            log.warning("prompts are read anew for each of their completions: %s", problem)
            self._longest_shared = None


def _row_by_row(batch: MicroBatch) -> _Reading:
    """Every row with its prompt. The logits of a column predict the next, and those of the last nothing that was sampled."""
    arguments = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
        "logits_to_keep": batch.completion_columns + 1,
    }
    return _Reading(arguments, lambda kept: kept[:, :-1], batch.attention_mask.sum())


def _prompts_once(shared: SharedPrompts) -> _Reading:
    """Every prompt once. The mask only keeps the model from making one of its own: `shared` has them."""
    arguments = {
        "input_ids": shared.input_ids,
        "attention_mask": torch.zeros(1, 1, 1, 1, device=shared.input_ids.device),
        "position_ids": shared.position_ids,
        "use_cache": False,
        "logits_to_keep": shared.predicting,
        "shared_prompts": shared,
    }
    return _Reading(arguments, shared.rows, shared.tokens)


@contextmanager
def _scoring_head(
    head: torch.nn.Linear, targets: torch.Tensor, temperature: float, *, predictions: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Let `head` return [B, C, 2], log-probability and entropy, instead of logits; what it returned is noted in the list.

    Args:
        targets: [B, C] int64, the tokens to score.
        predictions: see `_Reading`.
    """
    returned: list[torch.Tensor] = []

    def score(hidden: torch.Tensor) -> torch.Tensor:
        rows = predictions(hidden).reshape(-1, hidden.shape[-1])
        both = _ChunkedScores.apply(rows, head.weight, head.bias, targets.reshape(-1), temperature)  # type: ignore[no-untyped-call]
        returned.append(torch.stack(both, dim=-1).view(*targets.shape, 2))
        return returned[-1]

    with computing_by(head, score):
        yield returned


def _from_logits(logits: torch.Tensor, targets: torch.Tensor, temperature: float, *, tokens: torch.Tensor) -> Scores:
    """The plain way: [B, C, vocabulary] logits."""
    logits = logits.float() / temperature
    logprobs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    with torch.no_grad():
        entropy = logits.logsumexp(dim=-1) - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return Scores(logprobs, entropy, tokens)


class _ChunkedScores(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias [V] or None, targets [N], temperature) -> log-probabilities [N], entropies [N].

    d log p(t) / d logits = (onehot(t) - softmax(logits)) / temperature, so the backward needs the logits again and nothing else.
    Products run in the type that autocast asks for, sums over the vocabulary and gradients of the weight in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.temperature = temperature
        logprobs, entropies, normalizers = [], [], []
        matrix = weight.to(ctx.dtype)
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = _logits(hidden[part], matrix, bias, temperature)
            # Each pass over the vocabulary counts, so the exponentials serve both sums, and nothing is copied that can be overwritten.
            largest = logits.amax(dim=-1)
            shifted = logits.sub_(largest[:, None])
            chosen = shifted.gather(1, targets[part, None])[:, 0]
            exponentials = shifted.exp()
            total = exponentials.sum(dim=-1)
            log_total = total.log()
            logprobs.append(chosen - log_total)
            normalizers.append(largest + log_total)
            entropies.append(log_total - exponentials.mul_(shifted).sum(dim=-1) / total)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalizers))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            grad = grads[0][part].float() / ctx.temperature
            logits = _logits(hidden[part], matrix, bias, ctx.temperature)
            slopes = logits.sub_(normalizers[part, None]).exp_().mul_(-grad[:, None])
            slopes.scatter_add_(1, targets[part, None], grad[:, None])
            if grad_bias is not None:
                grad_bias += slopes.sum(dim=0)
            narrow = slopes.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ matrix
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden[part].to(ctx.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _logits(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """[rows, V] float32, divided by `temperature`; products in the type of `matrix`."""
    logits = torch.nn.functional.linear(rows.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype)).float()
    return logits.div_(temperature) if temperature != 1.0 else logits
