"""BAHA: the causal effect of one head at a time on the backdoor response (Yu et al., arXiv 2509.21761, section on BAHA).

    zbar[l,h]  = mean over triggered donor prompts of z[l,h] at the last prompt token
    CIE(l,h,x) = P(y_b | x with z[l,h] := zbar[l,h]) - P(y_b | x)      for a clean recipient x
    ACIE[l,h]  = mean over recipients

P(y|x) is the exponential of the mean log p of the response's tokens, its end-of-turn token included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.architectures import HeadGeometry, HeadIndex
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import response_logprob
from bkdattr.interventions import SetSite, Site
from bkdattr.metrics import bootstrap_interval
from bkdattr.model import Subject


@dataclass(frozen=True, eq=False)
class Attribution:
    """ACIE per head with its 95 % bootstrap interval over recipients."""

    scores: Float[np.ndarray, "layer head"]
    low: Float[np.ndarray, "layer head"]
    high: Float[np.ndarray, "layer head"]
    n_donor: int
    n_recipient: int
    fingerprint: str
    effect: str = "sufficiency"
    method: str = "exact"
    scope: str = "last_prompt"
    unit: str = "probability"
    site: str = "head"

    def top(self, k: int) -> list[HeadIndex]:
        """The k heads of largest ACIE, best first; ties go to the lower layer, then the lower head."""
        if not 0 <= k <= self.scores.size:
            raise BkdattrError(f"top-k: got k={k}, expected 0..{self.scores.size}")
        order = np.argsort(-self.scores.reshape(-1), kind="stable")[:k]
        n_heads = self.scores.shape[1]
        return [HeadIndex(int(i) // n_heads, int(i) % n_heads) for i in order]

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site, "effect": self.effect, "method": self.method, "scope": self.scope, "unit": self.unit,
            "n_layers": self.scores.shape[0], "n_heads": self.scores.shape[1], "scores": self.scores.tolist(),
            "low": self.low.tolist(), "high": self.high.tolist(), "n_donor": self.n_donor,
            "n_recipient": self.n_recipient, "fingerprint": self.fingerprint,
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Attribution:
        fields: dict[str, Any] = {k: v for k, v in row.items() if k in cls.__dataclass_fields__}
        fields |= {k: np.asarray(fields[k], dtype=np.float64) for k in ("scores", "low", "high")}
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class Recipients:
    """Clean prompts and the backdoor response that is scored on each, as ids."""

    prompts: list[list[int]]
    responses: list[list[int]]

    @classmethod
    def of(cls, subject: Subject, examples: Sequence[Example]) -> Recipients:
        """Eligible clean examples only; raises for none, for one that is not eligible or lacks its backdoor response."""
        if not examples:
            raise BkdattrError("0 eligible examples to attribute on: expected at least 1; check the target's eligibility")
        for e in examples:
            if not e.eligible or e.backdoor_response is None:
                raise BkdattrError(
                    f"recipient {e.id!r} is not eligible or has no backdoor response; attribution takes eligible examples only"
                )
        prompts = [subject.chat.prompt_ids(e.messages) for e in examples]
        responses = [subject.chat.response_ids(e.messages, str(e.backdoor_response)) for e in examples]
        for e, p, r in zip(examples, prompts, responses, strict=True):
            subject.chat.check_length(p, len(r), f"recipient {e.id!r}")
        return cls(prompts, responses)


def head_effects(
    subject: Subject,
    recipients: Recipients,
    mean_z: Float[Tensor, "layer head d_head"],
    *,
    heads: Sequence[HeadIndex] | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[HeadIndex, Float[Tensor, " prompt"]]]:
    """Yield (head, CIE per recipient) one head at a time: the readable loop, one full forward of every prompt per head."""
    base = response_logprob(subject, recipients.prompts, recipients.responses, batch_size=batch_size).mean.exp()
    for head in heads if heads is not None else subject.geometry.heads:
        subject.geometry.check_head(head)
        patch = SetSite(Site.of_head(head), mean_z[head.layer, head.head])
        patched = response_logprob(subject, recipients.prompts, recipients.responses, [patch], batch_size=batch_size)
        yield head, patched.mean.exp() - base


def summarise_effects(
    effects: Mapping[HeadIndex, Float[Tensor, " prompt"]], geometry: HeadGeometry, n_donor: int, fingerprint: str
) -> Attribution:
    """ACIE and its interval from the CIEs of every head; one bootstrap draw of recipients serves all heads."""
    missing = [h for h in geometry.heads if h not in effects]
    if missing:
        raise BkdattrError(f"{len(missing)} heads have no effects yet, first {missing[0]}")
    samples = torch.stack([effects[h] for h in geometry.heads], 1).double().numpy()
    shape = (geometry.n_layers, geometry.n_heads)
    low, high = bootstrap_interval(samples)
    return Attribution(
        samples.mean(0).reshape(shape), low.reshape(shape), high.reshape(shape), n_donor, len(samples), fingerprint
    )


def baha(
    subject: Subject,
    clean: Sequence[Example],
    triggered: Sequence[Example],
    *,
    batch_size: int = 64,
    progress: Any = iter,
) -> Attribution:
    """ACIE of every head: donors are `triggered` prompts, recipients their `clean` twins, eligible examples only.

    `progress` wraps the iteration over heads (e.g. `functools.partial(tqdm, total=96)`).
    """
    from bkdattr.traces import trace_prompts

    if any(not e.eligible for e in triggered):
        raise BkdattrError("donors must be eligible examples: got one that is not")
    recipients = Recipients.of(subject, clean)
    mean_z = trace_prompts(subject, triggered, batch_size=batch_size).mean_z
    effects = dict(progress(head_effects(subject, recipients, mean_z, batch_size=batch_size)))
    return summarise_effects(effects, subject.geometry, len(triggered), subject.fingerprint)
