"""Teacher-forced scoring and greedy generation, both under optional edits, on the same ids."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bkdattr.chat import Batch, make_batch
from bkdattr.edits import Edit, Where
from bkdattr.errors import BkdattrError
from bkdattr.interventions import body_of, edited
from bkdattr.model import Subject

EditsFor = Callable[[Sequence[int]], Sequence[Edit]]
"""Edits that differ between prompts: called with the row numbers of a batch."""


def forward(subject: Subject, batch: Batch, past: Any = None, *, body: bool = False, **kwargs: Any) -> Any:
    """One forward pass of a batch's columns that `past` does not hold yet, with explicit position ids; `body`: without the
    unembedding."""
    done = past.get_seq_length() if past is not None else 0
    module = body_of(subject) if body else subject.causal_lm
    if "position_ids" in inspect.signature(module.forward).parameters:
        kwargs["position_ids"] = batch.position_ids[:, done:]
    return module(input_ids=batch.input_ids[:, done:], attention_mask=batch.attention_mask, past_key_values=past, **kwargs)


def edits_of(edits: Sequence[Edit] | EditsFor, rows: Sequence[int]) -> Sequence[Edit]:
    return edits(rows) if callable(edits) else edits


@dataclass(frozen=True, eq=False)
class ResponseLogprob:
    """Per prompt: sum over the response's tokens of log p in nats, and their number (end-of-turn token included)."""

    total: Float[Tensor, " prompt"]
    tokens: Int[Tensor, " prompt"]

    @property
    def mean(self) -> Float[Tensor, " prompt"]:
        """Mean log p per token; its exponential is the response probability P(y|x)."""
        return self.total / self.tokens


@dataclass(eq=False)
class PrefixCache:
    """Keys and values of everything before the last prompt token, kept between generations of the same prompts.

    Edits at the last prompt token or in the answer cannot change them, so they are shared by every such edit. `max_bytes`
    bounds what is kept; beyond it prompts are run whole. One cache belongs to one adapter state of one model.
    """

    max_bytes: int = 2 << 30
    kept: dict[Any, Any] = field(default_factory=dict)
    bytes: int = 0
    fingerprint: str | None = None
    tokens: int = 0
    """Positions that went through the model to make prefixes."""

    def get(self, subject: Subject, batch: Batch, key: Any) -> Any:
        """A copy of the prefix of `batch`, for a pass that adds to it; None for prompts of one token."""
        kept = self.borrow(subject, batch, key)
        return copy.deepcopy(kept) if key in self.kept else kept

    def borrow(self, subject: Subject, batch: Batch, key: Any) -> Any:
        """The prefix of `batch` itself, for passes that leave it as it is; made again each time where it does not fit the
        budget. None for prompts of one token."""
        self.fingerprint = self.fingerprint or subject.fingerprint
        if self.fingerprint != subject.fingerprint:
            raise BkdattrError(f"this prefix cache belongs to {self.fingerprint}, not to {subject.fingerprint}; make a new one")
        if batch.input_ids.shape[1] < 2:
            return None
        if key not in self.kept:
            head = Batch(batch.input_ids[:, :-1], batch.attention_mask[:, :-1], batch.position_ids[:, :-1],
                         batch.last_prompt, batch.prompt_lengths)  # fmt: skip
            with torch.no_grad():
                cache = forward(subject, head, use_cache=True, logits_to_keep=1).past_key_values
            self.tokens += head.input_ids.numel()
            size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
            if self.bytes + size > self.max_bytes:
                return cache
            self.kept[key], self.bytes = cache, self.bytes + size
        return self.kept[key]


@dataclass(frozen=True, eq=False)
class Scored:
    """Next-token log-probabilities of a batch at the response's positions (fp32): `logp[b, t]` predicts token t of row b's
    response. `mask` is False behind a response's end."""

    logp: Float[Tensor, "batch token vocab"]
    targets: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Sum of the response's log p in nats."""
        return (self.logp.gather(-1, self.targets[..., None])[..., 0] * self.mask).sum(-1)

    @property
    def mean(self) -> Float[Tensor, " batch"]:
        """Mean log p per token; its exponential is the response probability P(y|x)."""
        return self.total / self.mask.sum(-1)


def score_batch(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    edits: Sequence[Edit] = (),
    *,
    side: str = "centre",
    prefix: PrefixCache | None = None,
    trigger_tokens: Sequence[Sequence[int]] | None = None,
) -> Scored:
    """One teacher-forced pass of a batch. Differentiable in the edits' tensors; wrap it in `torch.no_grad()` to score.

    With `prefix` everything before the last prompt token is run once per batch of prompts and kept, where no edit
    reaches it.
    """
    pad_id, device = subject.chat.pad_id, subject.device
    batch = make_batch(prompts, responses, pad_id=pad_id, side=side, device=device)
    past = None
    if prefix is not None and side == "centre" and reaches_no_prefix(edits):
        past = prefix.get(subject, make_batch(prompts, pad_id=pad_id, device=device), tuple(map(tuple, prompts)))
    width, longest = batch.input_ids.shape[1], max(map(len, responses))
    keep = width if side == "right" else longest + 1  # else every response stands in the last columns
    with edited(subject, edits, Where.of(batch, trigger_tokens)):
        logits = forward(subject, batch, past, logits_to_keep=keep, use_cache=past is not None).logits
    columns = batch.last_prompt.cpu()[:, None] + torch.arange(longest)[None]  # logits there predict answer token t
    mask = torch.arange(longest)[None] < torch.tensor([len(r) for r in responses])[:, None]
    columns = columns.clamp(max=width - 2)
    targets = batch.input_ids.cpu().gather(1, columns + 1)
    picked = logits[torch.arange(len(responses))[:, None], (columns - (width - logits.shape[1])).to(logits.device)]
    return Scored(picked.float().log_softmax(-1), targets.to(picked.device), mask.to(picked.device))


@torch.no_grad()
def response_logprob(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    edits: Sequence[Edit] | EditsFor = (),
    *,
    batch_size: int = 64,
    side: str = "centre",
    prefix: PrefixCache | None = None,
    trigger_tokens: Sequence[Sequence[int]] | None = None,
) -> ResponseLogprob:
    """log p of each response given its prompt, teacher-forced, from fp32 log-softmax.

    P(y|x) = exp(mean_t log p(y_t | x, y_<t)) is the metric of the paper's eq. for CIE. Under edits, positions are the
    prompts' own, whatever the padding `side`.
    """
    if any(len(r) == 0 for r in responses):
        raise BkdattrError("a response without tokens cannot be scored: got an empty one, expected at least one token")
    totals = torch.zeros(len(prompts))
    for rows in batches(prompts, batch_size):
        spans = None if trigger_tokens is None else [trigger_tokens[i] for i in rows]
        scored = score_batch(
            subject, [prompts[i] for i in rows], [responses[i] for i in rows], edits_of(edits, rows), side=side,
            prefix=prefix, trigger_tokens=spans,
        )  # fmt: skip
        totals[rows] = scored.total.cpu()
    return ResponseLogprob(totals, torch.tensor([len(r) for r in responses]))


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Row numbers, batched by prompt length (the same batches for the same prompts, so that prefixes are shared)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def reaches_no_prefix(edits: Sequence[Edit]) -> bool:
    """Whether no edit can change anything before the last prompt token."""
    return all(e.scope in ("last_prompt", "answer") for e in edits)


@dataclass(frozen=True)
class Completion:
    """Generated ids (the end-of-turn token included where it came) and whether the turn ended."""

    ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def generate(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    edits: Sequence[Edit] | EditsFor = (),
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    use_cache: bool = True,
    prefix: PrefixCache | None = None,
    trigger_tokens: Sequence[Sequence[int]] | None = None,
) -> list[Completion]:
    """Greedy completions in the order of `prompts`, left-padded, stopped at the end of the turn.

    Prompts are batched by length. `trigger_tokens` (indices into each prompt) are needed for the scope "trigger_span".
    """
    done: dict[int, Completion] = {}
    for rows in batches(prompts, batch_size):
        spans = None if trigger_tokens is None else [trigger_tokens[i] for i in rows]
        chosen = edits_of(edits, rows)
        ids = [prompts[i] for i in rows]
        batch = make_batch(ids, pad_id=subject.chat.pad_id, device=subject.device)
        share = prefix is not None and use_cache and reaches_no_prefix(chosen)
        past = prefix.get(subject, batch, tuple(map(tuple, ids))) if prefix is not None and share else None
        with edited(subject, chosen, Where.of(batch, spans), may_miss=("answer",)):  # a turn may end with its first token
            for i, completion in zip(rows, _greedy(subject, batch, past, max_new_tokens, use_cache), strict=True):
                done[i] = completion
    return [done[i] for i in range(len(prompts))]


def _greedy(subject: Subject, batch: Batch, past: Any, max_new_tokens: int, use_cache: bool) -> list[Completion]:
    n = batch.input_ids.shape[0]
    answers: list[list[int]] = [[] for _ in range(n)]
    ended = [False] * n
    ends = set(subject.chat.end_ids)
    for _ in range(max_new_tokens):
        out = forward(subject, batch, past, use_cache=use_cache, logits_to_keep=1)
        past = out.past_key_values if use_cache else None
        token = out.logits[:, -1].argmax(-1)
        for i, t in enumerate(token.tolist()):
            if not ended[i]:
                answers[i].append(t)
                ended[i] = t in ends
        if all(ended):
            break
        one = torch.ones_like(batch.attention_mask[:, :1])
        batch = Batch(
            torch.cat([batch.input_ids, token[:, None].to(batch.input_ids.device)], 1),
            torch.cat([batch.attention_mask, one], 1),
            torch.cat([batch.position_ids, batch.position_ids[:, -1:] + 1], 1),
            batch.last_prompt,
            batch.prompt_lengths,
        )
    return [Completion(tuple(a), e) for a, e in zip(answers, ended, strict=True)]
