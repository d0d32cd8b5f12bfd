"""Choosing heads *jointly*. ACIE ranks heads one at a time, so a backdoor that two heads carry survives either's removal.

Both methods look for a few heads whose mean ablation makes triggered prompts answer as their clean twins while clean
prompts keep their answers: `greedy_heads` adds one head after the other, `learn_gates` trains all gates at once
(hard-concrete gates, Louizos et al., arXiv 1712.01312) along a path of growing sparsity. The model stays frozen and un-merged.
With `when` (a linear probe of an earlier layer) the heads are ablated only in prompts on which it fires.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.edits import BlendSite, Condition, Edit, Scope, SetSite, Site
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import PrefixCache, batches, score_batch
from bkdattr.model import Subject

Means = Mapping[Scope, Float[Tensor, "layer head d_head"]]
"""What an ablated head is set to, per scope: the clean mean of z over that scope's tokens (`traces.scope_mean_z`)."""

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # the hard-concrete distribution's temperature and stretch, as in its paper
_SHIFT = BETA * math.log(-GAMMA / ZETA)


def ablate_to(heads: Sequence[HeadIndex], means: Means, when: Condition | None = None) -> list[Edit]:
    """Set `heads` to their clean means, in every scope of `means`, for every prompt or only where the probe `when` fires."""
    return [SetSite(Site.of_head(h), mean[h.layer, h.head], scope, when) for scope, mean in means.items() for h in heads]


def reachable(subject: Subject, when: Condition | None) -> list[HeadIndex]:
    """The heads that can be ablated under a condition: those of later layers than its probe's."""
    return [h for h in subject.geometry.heads if when is None or h.layer > when.layer]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Rows for one objective: prompts, the responses that are scored, and where the trigger stands."""

    prompts: list[list[int]]
    responses: list[list[int]]
    trigger_tokens: list[list[int]] | None
    triggered: bool = False

    @classmethod
    def of(
        cls, subject: Subject, examples: Sequence[Example], responses: Sequence[str], *, trigger_tokens: bool = False
    ) -> Prompts:
        if not examples:
            raise BkdattrError("0 prompts to select heads on: expected at least 1")
        chat = subject.chat
        prompts = [chat.prompt_ids(e.messages) for e in examples]
        answers = [chat.response_ids(e.messages, r) for e, r in zip(examples, responses, strict=True)]
        for e, p, r in zip(examples, prompts, answers, strict=True):
            chat.check_length(p, len(r), f"prompt {e.id!r}")
        spans = None
        if trigger_tokens and all(e.spans for e in examples):
            spans = [chat.span_tokens(e.messages, e.spans) for e in examples]
        return cls(prompts, answers, spans, all(bool(e.spans) for e in examples))

    def batches(self, size: int) -> list[Prompts]:
        return [self.rows(rows) for rows in batches(self.prompts, size)]

    def rows(self, rows: Sequence[int]) -> Prompts:
        spans = None if self.trigger_tokens is None else [self.trigger_tokens[i] for i in rows]
        return Prompts([self.prompts[i] for i in rows], [self.responses[i] for i in rows], spans, self.triggered)

    def score(self, subject: Subject, edits: Sequence[Edit], prefix: PrefixCache | None) -> Any:
        """`inference.Scored` of these rows; edits at the trigger reach only prompts that hold one."""
        if self.triggered and self.trigger_tokens is None and any(e.scope == "trigger_span" for e in edits):
            raise BkdattrError(
                'edits at "trigger_span" need the triggers\' tokens: make the objective with scopes=("trigger_span", ...)'
            )
        kept = [e for e in edits if self.trigger_tokens is not None or e.scope != "trigger_span"]
        return score_batch(subject, self.prompts, self.responses, kept, prefix=prefix, trigger_tokens=self.trigger_tokens)


@dataclass(frozen=True, eq=False)
class Objective:
    """What a repair must do: `triggered` prompts scored on their clean twins' responses (and, for greedy selection, on the
    backdoor's), `clean` prompts on their own."""

    triggered: list[Prompts]
    backdoor: list[Prompts]
    clean: list[Prompts]

    @classmethod
    def of(
        cls,
        subject: Subject,
        clean: Sequence[Example],
        triggered: Sequence[Example],
        batch_size: int = 32,
        *,
        scopes: Sequence[Scope] = ("last_prompt",),
    ) -> Objective:
        """`triggered` are the twins (same ids) of some of the `clean` rows; these are scored all. Name the `scopes` of the edits that
        will be tried: for "trigger_span" the triggers are placed among the tokens."""
        spans = "trigger_span" in scopes
        twin = {e.id: e for e in clean}
        lost = next((e.id for e in triggered if e.id not in twin), None)
        if lost is not None:
            raise BkdattrError(f"triggered prompt {lost!r} has no clean twin among the clean rows: expected the same id there")
        repaired = Prompts.of(subject, triggered, [twin[e.id].response for e in triggered], trigger_tokens=spans)
        bad = [e for e in triggered if e.eligible]
        backdoor = Prompts.of(subject, bad, [str(e.backdoor_response) for e in bad], trigger_tokens=spans)
        kept = Prompts.of(subject, clean, [e.response for e in clean])
        return cls(*(p.batches(batch_size) for p in (repaired, backdoor, kept)))


@dataclass(eq=False)
class Unedited:
    """Next-token log-probabilities of the un-edited model on batches: kept up to `max_bytes`, beyond it made again when asked for (a
    batch of 32 long answers over 150,000 tokens of vocabulary takes gigabytes)."""

    subject: Subject
    parts: Sequence[Prompts]
    prefix: PrefixCache
    max_bytes: int = 2 << 30
    kept: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __getitem__(self, i: int) -> Tensor:
        if i in self.kept:
            return self.kept[i]
        logp = self.parts[i].score(self.subject, [], self.prefix).logp
        if sum(t.numel() * t.element_size() for t in (*self.kept.values(), logp)) <= self.max_bytes:
            self.kept[i] = logp
        return logp


@dataclass(frozen=True, eq=False)
class Gates:
    """The path of learned gates. `sets[k]` are the k heads that were more likely ablated than not when they were last k, best first.
    `log_alpha` is where the path ended; `expected` how many heads it still ablates on average."""

    sets: dict[int, tuple[HeadIndex, ...]]
    log_alpha: Float[np.ndarray, "layer head"]
    scopes: tuple[str, ...]
    sparsity: tuple[float, float]
    steps: int
    fingerprint: str

    @property
    def expected(self) -> float:
        return float(_open(self.log_alpha).sum())

    def top(self, k: int) -> list[HeadIndex]:
        """The path's set of k heads; where it jumped over k, the best k of the next larger set, or its largest set."""
        size = min((n for n in self.sets if n >= k), default=max(self.sets))
        return list(self.sets[size][:k])


def _open(log_alpha: np.ndarray) -> np.ndarray:
    """P(the head is ablated at all)."""
    return 1 / (1 + np.exp(-(log_alpha - _SHIFT)))


def learn_gates(
    subject: Subject,
    objective: Objective,
    means: Means,
    *,
    sparsity: tuple[float, float] = (0.01, 3.0),
    steps: int = 350,
    learning_rate: float = 0.1,
    clean_weight: float = 2.0,
    start: float = -1.0,
    when: Condition | None = None,
    seed: int = 0,
    progress: Any = iter,
) -> Gates:
    """Train one gate per head: loss = -log p(clean response | triggered) + clean_weight * KL(un-edited || gated) on clean
    prompts + sparsity * E[number of ablated heads], in nats per answer and nats per head.

    The sparsity weight grows geometrically from the first to the second of `sparsity`, so that one training passes through sets of
    every size (a constant weight of the size that few heads need closes all gates before any is learned). A gated head's z becomes
    `(1 - a) z + a zbar` with zbar the clean mean and a from the hard-concrete distribution. Adam on the gates alone; the model's
    weights get no gradient.
    """
    low, high = sparsity
    if not 0 < low <= high or steps < 2:
        raise BkdattrError(f"gates: got sparsity {sparsity} and {steps} steps, expected 0 < first <= last and at least 2 steps")
    subject.check_eval()
    g, device = subject.geometry, subject.device
    prefix = PrefixCache()
    log_alpha = torch.full((g.n_layers, g.n_heads), float(start), requires_grad=True)
    first = 0 if when is None else when.layer + 1
    reached = torch.zeros(log_alpha.shape)
    reached[first:] = 1.0
    adam = torch.optim.Adam([log_alpha], lr=learning_rate, betas=(0.9, 0.99))
    noise, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    plain = Unedited(subject, objective.clean, prefix)
    sets: dict[int, tuple[HeadIndex, ...]] = {}
    for step in progress(range(steps)):
        weight = low * (high / low) ** (step / (steps - 1))
        u = torch.rand(log_alpha.shape, generator=noise).clamp(1e-6, 1 - 1e-6)
        stretched = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA
        edits = _gated(stretched.clamp(0, 1), means, when)
        bad = objective.triggered[order.integers(len(objective.triggered))]
        i = int(order.integers(len(objective.clean)))
        good = objective.clean[i].score(subject, edits, prefix)
        kl = ((plain[i].exp() * (plain[i] - good.logp)).sum(-1) * good.mask).sum(-1).mean()
        repair = -bad.score(subject, edits, prefix).total.mean()
        cost = weight * (torch.sigmoid(log_alpha - _SHIFT) * reached).sum()
        loss = repair + clean_weight * kl + cost.to(device)
        (log_alpha.grad,) = torch.autograd.grad(loss, [log_alpha])
        adam.step()
        now = np.where(reached.numpy() > 0, log_alpha.detach().double().numpy(), -np.inf)
        size = max(1, int((_open(now) > 0.5).sum()))
        best = np.argsort(-now.reshape(-1), kind="stable")[:size]
        sets[size] = tuple(HeadIndex(int(j) // g.n_heads, int(j) % g.n_heads) for j in best)
    return Gates(sets, now, tuple(means), (low, high), steps, subject.fingerprint)


def _gated(ablated: Float[Tensor, "layer head"], means: Means, when: Condition | None) -> list[Edit]:
    edits: list[Edit] = []
    for scope, mean in means.items():
        keep = (1 - ablated).repeat_interleave(mean.shape[-1], dim=-1)
        layers = range(0 if when is None else when.layer + 1, len(mean))
        edits += [BlendSite(Site(layer, "z"), mean[layer].flatten(), keep[layer], scope, when) for layer in layers]
    return edits


@dataclass(eq=False)
class Repair:
    """How well a set of heads, mean-ablated together, repairs triggered prompts and spares clean ones (`objective`)."""

    subject: Subject
    objective: Objective
    means: Means
    clean_weight: float = 1.0
    when: Condition | None = None

    def __post_init__(self) -> None:
        self._prefix = PrefixCache()
        self._plain = Unedited(self.subject, self.objective.clean, self._prefix)

    @torch.no_grad()
    def _scores(self, parts: Sequence[Prompts], edits: Sequence[Edit]) -> Tensor:
        return torch.cat([p.score(self.subject, edits, self._prefix).total for p in parts])

    @torch.no_grad()
    def harm(self, heads: Sequence[HeadIndex]) -> float:
        """KL(un-edited || ablated) on clean prompts, nats per answer."""
        edits, total, n = ablate_to(heads, self.means, self.when), 0.0, 0
        for i, p in enumerate(self.objective.clean):
            before, after = self._plain[i], p.score(self.subject, edits, self._prefix)
            total += float(((before.exp() * (before - after.logp)).sum(-1) * after.mask).sum())
            n += len(p.prompts)
        return total / n

    def margin(self, heads: Sequence[HeadIndex]) -> float:
        """Mean of log p(clean response) - log p(backdoor response) on triggered prompts (whole answers), less the weighted harm. In
        log-probabilities, because a redundant backdoor keeps P at 1 until its last carrier falls."""
        edits = ablate_to(heads, self.means, self.when)
        good, bad = self._scores(self.objective.triggered, edits), self._scores(self.objective.backdoor, edits)
        return float(good.mean() - bad.mean()) - self.clean_weight * self.harm(heads)


def greedy_heads(repair: Repair, k: int, *, candidates: int = 32, progress: Any = iter) -> list[tuple[HeadIndex, float]]:
    """Add the head of highest *conditional necessity*, k times; returns (head, gain of `repair.margin`) in the order of choice.

    Given the heads that are already ablated, every remaining head is tried; after the first step only the `candidates` best
    heads of that step.
    """
    chosen: list[tuple[HeadIndex, float]] = []
    pool, now = reachable(repair.subject, repair.when), repair.margin([])
    for step in progress(range(min(k, len(pool)))):
        heads = [h for h, _ in chosen]
        gains = {h: repair.margin([*heads, h]) - now for h in pool}
        best = max(gains, key=lambda h: (gains[h], -h.layer, -h.head))
        chosen.append((best, gains[best]))
        now += gains[best]
        pool = [h for h in (sorted(pool, key=lambda h: -gains[h])[:candidates] if step == 0 else pool) if h != best]
    return chosen
