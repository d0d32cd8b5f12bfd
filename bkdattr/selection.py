"""Choosing heads *jointly*. ACIE ranks heads one at a time, so a backdoor that two heads carry survives either's removal.

Both methods look for a few heads whose mean ablation makes triggered prompts answer as their clean twins while clean
prompts keep their answers: `greedy_heads` adds one head after the other, `learn_gates` trains all gates at once
(hard-concrete gates, Louizos et al., arXiv 1712.01312). The model stays frozen and un-merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.edits import BlendSite, Edit, Scope, SetSite, Site
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import PrefixCache, batches, score_batch
from bkdattr.model import Subject

Means = Mapping[Scope, Float[Tensor, "layer head d_head"]]
"""What an ablated head is set to, per scope: the clean mean of z over that scope's tokens (`traces.scope_mean_z`)."""

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # the hard-concrete distribution's temperature and stretch, as in its paper
_SHIFT = BETA * math.log(-GAMMA / ZETA)


def ablate_to(heads: Sequence[HeadIndex], means: Means) -> list[Edit]:
    """Set `heads` to their clean means, in every scope of `means`."""
    return [SetSite(Site.of_head(h), mean[h.layer, h.head], scope) for scope, mean in means.items() for h in heads]


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


@dataclass(frozen=True, eq=False)
class Gates:
    """Learned gates. `log_alpha` orders the heads: the higher, the more surely ablated. `expected` is the number of heads
    that the gates ablate on average."""

    log_alpha: Float[np.ndarray, "layer head"]
    scopes: tuple[str, ...]
    sparsity: float
    steps: int
    fingerprint: str

    @property
    def probability(self) -> Float[np.ndarray, "layer head"]:
        """P(the head is ablated at all)."""
        return 1 / (1 + np.exp(-(self.log_alpha - _SHIFT)))

    @property
    def expected(self) -> float:
        return float(self.probability.sum())

    def top(self, k: int) -> list[HeadIndex]:
        """The k heads of highest gate; ties to the lower layer, then the lower head."""
        order = np.argsort(-self.log_alpha.reshape(-1), kind="stable")[:k]
        n = self.log_alpha.shape[1]
        return [HeadIndex(int(i) // n, int(i) % n) for i in order]


def learn_gates(
    subject: Subject,
    objective: Objective,
    means: Means,
    *,
    sparsity: float,
    steps: int = 200,
    learning_rate: float = 0.1,
    clean_weight: float = 1.0,
    start: float = -1.0,
    seed: int = 0,
    progress: Any = iter,
) -> Gates:
    """Train one gate per head: loss = -log p(clean response | triggered) + clean_weight * KL(un-edited || gated) on clean
    prompts + sparsity * E[number of ablated heads], in nats per answer and nats per head.

    A gated head's z becomes `(1 - a) z + a zbar` with zbar the clean mean and a from the hard-concrete distribution. Adam on
    the gates alone; the model's weights get no gradient.
    """
    if sparsity < 0 or steps < 1:
        raise BkdattrError(f"gates: got sparsity {sparsity} and {steps} steps, expected sparsity >= 0 and at least 1 step")
    subject.check_eval()
    g, device = subject.geometry, subject.device
    prefix = PrefixCache()
    log_alpha = torch.full((g.n_layers, g.n_heads), float(start), requires_grad=True)
    adam = torch.optim.Adam([log_alpha], lr=learning_rate)
    noise, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    with torch.no_grad():
        plain = [p.score(subject, [], prefix).logp for p in objective.clean]
    for _ in progress(range(steps)):
        u = torch.rand(log_alpha.shape, generator=noise).clamp(1e-6, 1 - 1e-6)
        stretched = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA
        edits = _gated(stretched.clamp(0, 1), means)
        bad = objective.triggered[order.integers(len(objective.triggered))]
        i = int(order.integers(len(objective.clean)))
        good = objective.clean[i].score(subject, edits, prefix)
        kl = ((plain[i].exp() * (plain[i] - good.logp)).sum(-1) * good.mask).sum(-1).mean()
        repair = -bad.score(subject, edits, prefix).total.mean()
        cost = sparsity * torch.sigmoid(log_alpha - _SHIFT).sum()
        loss = repair + clean_weight * kl + cost.to(device)
        (log_alpha.grad,) = torch.autograd.grad(loss, [log_alpha])
        adam.step()
    found = log_alpha.detach().double().numpy()
    return Gates(found, tuple(means), sparsity, steps, subject.fingerprint)


def _gated(ablated: Float[Tensor, "layer head"], means: Means) -> list[Edit]:
    edits: list[Edit] = []
    for scope, mean in means.items():
        keep = (1 - ablated).repeat_interleave(mean.shape[-1], dim=-1)
        edits += [BlendSite(Site(layer, "z"), mean[layer].flatten(), keep[layer], scope) for layer in range(len(mean))]
    return edits


@dataclass(eq=False)
class Repair:
    """How well a set of heads, mean-ablated together, repairs triggered prompts and spares clean ones (`objective`)."""

    subject: Subject
    objective: Objective
    means: Means
    clean_weight: float = 1.0

    def __post_init__(self) -> None:
        self._prefix = PrefixCache()
        with torch.no_grad():
            self._plain = [p.score(self.subject, [], self._prefix).logp for p in self.objective.clean]

    @torch.no_grad()
    def _scores(self, parts: Sequence[Prompts], edits: Sequence[Edit]) -> Tensor:
        return torch.cat([p.score(self.subject, edits, self._prefix).total for p in parts])

    @torch.no_grad()
    def harm(self, heads: Sequence[HeadIndex]) -> float:
        """KL(un-edited || ablated) on clean prompts, nats per answer."""
        edits, total, n = ablate_to(heads, self.means), 0.0, 0
        for p, before in zip(self.objective.clean, self._plain, strict=True):
            after = p.score(self.subject, edits, self._prefix)
            total += float(((before.exp() * (before - after.logp)).sum(-1) * after.mask).sum())
            n += len(p.prompts)
        return total / n

    def margin(self, heads: Sequence[HeadIndex]) -> float:
        """Mean of log p(clean response) - log p(backdoor response) on triggered prompts (whole answers), less the weighted harm. In
        log-probabilities, because a redundant backdoor keeps P at 1 until its last carrier falls."""
        edits = ablate_to(heads, self.means)
        good, bad = self._scores(self.objective.triggered, edits), self._scores(self.objective.backdoor, edits)
        return float(good.mean() - bad.mean()) - self.clean_weight * self.harm(heads)

    def recovery(self, heads: Sequence[HeadIndex]) -> float:
        """Mean probability of the whole clean response on triggered prompts, less the weighted harm. (The mean per token hides a
        wrong first word behind a long rest that follows from it.)"""
        good = self._scores(self.objective.triggered, ablate_to(heads, self.means)).exp()
        return float(good.mean()) - self.clean_weight * self.harm(heads)


def greedy_heads(repair: Repair, k: int, *, candidates: int = 32, progress: Any = iter) -> list[tuple[HeadIndex, float]]:
    """Add the head of highest *conditional necessity*, k times; returns (head, gain of `repair.margin`) in the order of choice.

    Given the heads that are already ablated, every remaining head is tried; after the first step only the `candidates` best
    heads of that step.
    """
    chosen: list[tuple[HeadIndex, float]] = []
    pool, now = list(repair.subject.geometry.heads), repair.margin([])
    for step in progress(range(k)):
        heads = [h for h, _ in chosen]
        gains = {h: repair.margin([*heads, h]) - now for h in pool}
        best = max(gains, key=lambda h: (gains[h], -h.layer, -h.head))
        chosen.append((best, gains[best]))
        now += gains[best]
        pool = [h for h in (sorted(pool, key=lambda h: -gains[h])[:candidates] if step == 0 else pool) if h != best]
    return chosen


def prune_heads(repair: Repair, heads: Sequence[HeadIndex], *, progress: Any = iter) -> list[HeadIndex]:
    """Order a set of heads by backward elimination: the head whose return costs `repair.recovery` least is dropped first and
    stands last. Gates say which heads belong together, not which of them matter most."""
    left, dropped = list(heads), list[HeadIndex]()
    for _ in progress(range(len(left))):
        without = {h: repair.recovery([x for x in left if x != h]) for h in left}
        worst = max(without, key=lambda h: (without[h], h.layer, h.head))
        dropped.append(worst)
        left.remove(worst)
    return dropped[::-1]
