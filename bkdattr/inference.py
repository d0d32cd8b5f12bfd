"""Teacher-forced scoring and greedy generation, both under optional edits, on the same ids."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdattr.chat import Batch, make_batch
from bkdattr.errors import BkdattrError
from bkdattr.interventions import Edit, Where, edited
from bkdattr.model import Subject

EditsFor = Callable[[Sequence[int]], Sequence[Edit]]
"""Edits that differ between prompts: called with the row numbers of a batch."""


def forward(subject: Subject, batch: Batch, past: Any = None, **kwargs: Any) -> Any:
    """One forward pass of a batch's columns that `past` does not hold yet, with explicit position ids."""
    done = past.get_seq_length() if past is not None else 0
    accepted = inspect.signature(subject.causal_lm.forward).parameters
    if "position_ids" in accepted:
        kwargs["position_ids"] = batch.position_ids[:, done:]
    return subject.causal_lm(
        input_ids=batch.input_ids[:, done:], attention_mask=batch.attention_mask, past_key_values=past, **kwargs
    )


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


@torch.no_grad()
def response_logprob(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    edits: Sequence[Edit] | EditsFor = (),
    *,
    batch_size: int = 64,
    side: str = "left",
) -> ResponseLogprob:
    """log p of each response given its prompt, teacher-forced, from fp32 log-softmax.

    P(y|x) = exp(mean_t log p(y_t | x, y_<t)) is the metric of the paper's eq. for CIE. Under edits, positions are the
    prompts' own, whatever the padding `side`.
    """
    if any(len(r) == 0 for r in responses):
        raise BkdattrError("a response without tokens cannot be scored: got an empty one, expected at least one token")
    totals = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        answers = [responses[i] for i in rows]
        batch = make_batch([prompts[i] for i in rows], answers, pad_id=subject.chat.pad_id, side=side, device=subject.device)
        width, longest = batch.input_ids.shape[1], max(map(len, answers))
        keep = longest + 1 if side == "left" else width  # under left padding every answer stands in the last columns
        with edited(subject, edits_of(edits, rows), Where.of(batch)):
            logits = forward(subject, batch, logits_to_keep=keep, use_cache=False).logits
        columns = batch.last_prompt.cpu()[:, None] + torch.arange(longest)[None]  # logits there predict answer token t
        mask = torch.arange(longest)[None] < torch.tensor([len(a) for a in answers])[:, None]
        columns = columns.clamp(max=width - 2)
        targets = batch.input_ids.gather(1, (columns + 1).to(batch.input_ids.device))
        picked = logits[torch.arange(len(answers))[:, None], (columns - (width - logits.shape[1])).to(logits.device)]
        logp = picked.float().log_softmax(-1).gather(-1, targets[..., None].to(picked.device))[..., 0].cpu()
        totals.append((logp * mask).sum(-1))
    return ResponseLogprob(torch.cat(totals), torch.tensor([len(r) for r in responses]))


@dataclass(frozen=True)
class Completion:
    """Generated ids (the end-of-turn token included where it came) and whether the turn ended."""

    ids: tuple[int, ...]
    ended: bool


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

    def get(self, subject: Subject, batch: Batch, key: Any) -> Any:
        """A fresh copy of the prefix of `batch`, or None where it does not fit the budget."""
        self.fingerprint = self.fingerprint or subject.fingerprint
        if self.fingerprint != subject.fingerprint:
            raise BkdattrError(f"this prefix cache belongs to {self.fingerprint}, not to {subject.fingerprint}; make a new one")
        if batch.input_ids.shape[1] < 2:
            return None
        if key not in self.kept:
            head = Batch(batch.input_ids[:, :-1], batch.attention_mask[:, :-1], batch.position_ids[:, :-1],
                         batch.last_prompt, batch.prompt_lengths)  # fmt: skip
            cache = forward(subject, head, use_cache=True, logits_to_keep=1).past_key_values
            size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
            if self.bytes + size > self.max_bytes:
                return cache
            self.kept[key], self.bytes = cache, self.bytes + size
        return copy.deepcopy(self.kept[key])


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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        spans = None if trigger_tokens is None else [trigger_tokens[i] for i in rows]
        chosen = edits_of(edits, rows)
        ids = [prompts[i] for i in rows]
        batch = make_batch(ids, pad_id=subject.chat.pad_id, device=subject.device)
        share = prefix is not None and use_cache and all(e.scope in ("last_prompt", "answer") for e in chosen)
        past = prefix.get(subject, batch, tuple(map(tuple, ids))) if prefix is not None and share else None
        with edited(subject, chosen, Where.of(batch, spans)):
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
