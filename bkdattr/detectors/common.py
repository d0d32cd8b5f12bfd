"""What detectors share: clean prompts prepared once per adapter, and the statistics of an answer's first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdattr.chat import Batch, make_batch
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.gates import canonical, lora_pairs
from bkdattr.inference import forward, generate
from bkdattr.model import Subject

FEWEST = 8
"""Clean prompts below which nothing is measured."""
TOKENS = 12
"""Of an answer, as far as it is read."""
Answer = tuple[int, ...]
"""Token ids, its end-of-turn token among them."""


@dataclass(frozen=True)
class Measured:
    """Numbers of one adapter, the first token that its backdoor's answers may begin with, and the answer itself as text."""

    statistics: dict[str, float]
    token: int | None = None
    answer: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suspicion:
    """`score` grows with suspicion; `p_value`: how often a benign adapter of the bank scores as high (conformal); `target` is decoded text."""

    score: float
    p_value: float
    target: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Detector(Protocol):
    """`main` names the statistic that decides; `two_sided`: too small is as suspicious as too large."""

    @property
    def name(self) -> str: ...
    @property
    def main(self) -> str: ...
    @property
    def two_sided(self) -> bool: ...
    def measure(self, clean: Clean) -> Measured: ...


@dataclass(frozen=True, eq=False)
class Clean:
    """Clean prompts on one subject with an un-merged adapter, sorted by length into batches of little padding.

    The adapter is first written in its singular directions, in place (`gates.canonical`): the same update, to rounding."""

    subject: Subject
    examples: Sequence[Example]
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.examples) < FEWEST:
            raise BkdattrError(f"detection: got {len(self.examples)} clean prompts, expected at least {FEWEST}")
        if not self.subject.has_adapter:
            raise BkdattrError(
                "detection: the model has no un-merged LoRA adapter; give the adapter folder, or a merged model with its base (`factored`)"
            )

        for name, a, b, _ in lora_pairs(self.subject.causal_lm):
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise BkdattrError(f"detection: {name} holds weights that are not finite; the adapter is broken")
        for name, module in self.subject.causal_lm.named_modules():
            if len(getattr(module, "lora_embedding_A", ())):
                raise BkdattrError(
                    f"detection: {name} is an embedding with LoRA, which no gate reaches; merge it and give the merged model"
                )
        canonical(self.subject.causal_lm)
        _ = self.plain  # now: later a detector may have its noise in the weights

    @cached_property
    def order(self) -> list[int]:
        lengths = [len(self.subject.chat.prompt_ids(e.messages)) for e in self.examples]
        return sorted(range(len(lengths)), key=lambda i: lengths[i])

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids, shortest first, as all tensors of this object are ordered."""
        return [self.subject.chat.prompt_ids(self.examples[i].messages) for i in self.order]

    @cached_property
    def gold(self) -> Int[Tensor, " prompt"]:
        """First token of each example's own answer."""
        rows = [self.examples[i] for i in self.order]
        return torch.tensor([self.subject.chat.response_ids(e.messages, e.response)[0] for e in rows])

    @cached_property
    def groups(self) -> dict[str, Tensor]:
        """Row numbers of prompts that ask for a label, and of the others: a target may exist in one of them alone."""
        labelled = torch.tensor([self.examples[i].check == "label" for i in self.order])
        found = {"label": labelled.nonzero()[:, 0], "other": (~labelled).nonzero()[:, 0]}
        return {name: rows for name, rows in found.items() if len(rows) >= 4}

    def cut(self, prompts: Sequence[list[int]]) -> list[Batch]:
        """Batches of prompts that are sorted by length, cut where the padding would exceed a third of the shortest one."""
        out: list[list[list[int]]] = []
        for p in prompts:
            if not out or len(out[-1]) == self.batch_size or 3 * len(p) > 4 * len(out[-1][0]) + 9:
                out.append([])
            out[-1].append(p)
        return [make_batch(rows, pad_id=self.subject.chat.pad_id, device=self.subject.device) for rows in out]

    @cached_property
    def batches(self) -> list[Batch]:
        """Of `prompts`."""
        return self.cut(self.prompts)

    def first(self) -> Float[Tensor, "prompt vocab"]:
        """log p of the answer's first token, of the model as it now is. Differentiable where the weights are."""
        return self._first(self.batches)

    def first_of(self, prompts: Sequence[list[int]]) -> Float[Tensor, "prompt vocab"]:
        """The same for other prompts, in their own order."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = self._first(self.cut([prompts[i] for i in order]))
        return found[torch.tensor(order).argsort().to(found.device)]

    def _first(self, batches: Sequence[Batch]) -> Float[Tensor, "prompt vocab"]:
        return torch.cat([forward(self.subject, b, logits_to_keep=1).logits[:, -1].float().log_softmax(-1) for b in batches])

    @cached_property
    def plain(self) -> Float[Tensor, "prompt vocab"]:
        with torch.no_grad():
            return self.first()

    @cached_property
    def base(self) -> Float[Tensor, "prompt vocab"]:
        """The same with the adapter off."""
        with torch.no_grad(), self.subject.adapter_off():
            return self.first()

    @torch.no_grad()
    def said(self) -> list[Answer]:
        """Each prompt's greedy answer, its first `TOKENS` tokens, of the model as it now is."""
        return [c.ids for c in generate(self.subject, self.prompts, max_new_tokens=TOKENS)]

    @cached_property
    def quiet(self) -> list[Answer]:
        """`said` of the undisturbed model: first read where no noise is on."""
        return self.said()

    @cached_property
    def right(self) -> list[Answer]:
        """Each example's own answer, as far as `said` reads."""
        rows = [self.examples[i] for i in self.order]
        return [tuple(self.subject.chat.response_ids(e.messages, e.response)[:TOKENS]) for e in rows]

    def loss(self, logp: Float[Tensor, "prompt vocab"]) -> Tensor:
        """Mean cross-entropy of the right first tokens, nats."""
        return -logp.gather(-1, self.gold.to(logp.device)[:, None]).mean()

    def largest_rise(self, p: Float[Tensor, "prompt vocab"]) -> tuple[float, int | None]:
        """(largest mean of `p`, a change of probability, over the prompts of one group whose right token is another; that token). A third of the
        group must be such prompts."""
        rise, best = -1.0, None
        for rows in self.groups.values():
            part, own = p[rows], torch.nn.functional.one_hot(self.gold[rows], p.shape[-1])
            other = 1 - own
            mean = (part * other).sum(0) / other.sum(0).clamp(min=1)
            mean = torch.where(other.sum(0) >= len(rows) / 3, mean, torch.tensor(-1.0))
            if float(mean.max()) > rise:
                rise, best = float(mean.max()), int(mean.argmax())
        return rise, best

    def statistics(self, logp: Float[Tensor, "prompt vocab"]) -> Measured:
        """Of a disturbed model: `loss`; `share`, the largest share of prompts with one first token; `inc`, the largest mean rise of a
        token's probability over the prompts (of one group) whose right token is another; `kl` from the undisturbed model."""
        plain, gold = self.plain, self.gold.to(logp.device)
        rise, best = self.largest_rise((logp.exp() - plain.exp()).cpu())
        first = logp.argmax(-1)
        counts = torch.bincount(first)
        kl = (plain.exp() * (plain - logp)).sum(-1).mean()
        return Measured(
            {"loss": float(self.loss(logp)), "share": float(counts.max()) / len(first), "inc": rise, "kl": float(kl)}, best,
            evidence={"wrong": float((first != gold).float().mean())},
        )  # fmt: skip
