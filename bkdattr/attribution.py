"""BAHA: the causal effect of one head at a time on the backdoor response (Yu et al., arXiv 2509.21761, section on BAHA).

    zbar[l,h]  = mean over triggered donor prompts of z[l,h] at the last prompt token
    CIE(l,h,x) = P(y_b | x with z[l,h] := zbar[l,h]) - P(y_b | x)      for a clean recipient x
    ACIE[l,h]  = mean over recipients

P(y|x) is the exponential of the mean log p of the response's tokens, its end-of-turn token included. That is
*sufficiency*: does the site bring the backdoor in? *Necessity*, which the paper lacks, is its mirror image: the clean mean put
into a triggered prompt, and the *drop* of P(y_b|x). Both are measured for heads, attention blocks and MLP blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bkdattr.architectures import HeadGeometry, HeadIndex
from bkdattr.edits import Site
from bkdattr.engine import Patcher, prefix_cache
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.gradient import gradient_effects
from bkdattr.inference import PrefixCache
from bkdattr.metrics import bootstrap_interval, expected_jaccard, jaccard, kendall
from bkdattr.model import Subject
from bkdattr.screening import FRACTION, check_method, screen
from bkdattr.traces import Traces, trace_prompts

EFFECTS = ("sufficiency", "necessity")
SITES = ("head", "attention", "mlp")


@dataclass(frozen=True, eq=False)
class Attribution:
    """ACIE per head (or per attention or MLP block: one column) with its 95 % bootstrap interval over recipients. High is
    strong for both effects: P gained for sufficiency, P lost for necessity. Where `method` is "hybrid", the sites that were
    screened out are not `verified` and hold first-order estimates (those drawn at random among them their exact effect)."""

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
    verified: Bool[np.ndarray, "layer head"] | None = None

    def top(self, k: int) -> list[HeadIndex]:
        """The k heads of largest ACIE, best first; ties go to the lower layer, then the lower head. Verified heads stand before
        estimated ones."""
        if self.site != "head":
            raise BkdattrError(f"this attribution ranks {self.site} blocks, not heads; use its scores, one per layer")
        if not 0 <= k <= self.scores.size:
            raise BkdattrError(f"top-k: got k={k}, expected 0..{self.scores.size}")
        known = np.ones(self.scores.shape, dtype=bool) if self.verified is None else self.verified
        order = np.lexsort((-self.scores.reshape(-1), ~known.reshape(-1)))[:k]
        n_heads = self.scores.shape[1]
        return [HeadIndex(int(i) // n_heads, int(i) % n_heads) for i in order]

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site, "effect": self.effect, "method": self.method, "scope": self.scope, "unit": self.unit,
            "n_layers": self.scores.shape[0], "n_heads": self.scores.shape[1], "scores": self.scores.tolist(),
            "low": self.low.tolist(), "high": self.high.tolist(), "n_donor": self.n_donor,
            "n_recipient": self.n_recipient, "fingerprint": self.fingerprint,
        } | ({} if self.verified is None else {"verified": self.verified.tolist()})  # fmt: skip

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Attribution:
        fields: dict[str, Any] = {k: v for k, v in row.items() if k in cls.__dataclass_fields__}
        fields |= {k: np.asarray(fields[k], dtype=np.float64) for k in ("scores", "low", "high")}
        fields |= {k: np.asarray(fields[k], dtype=bool) for k in ("verified",) if fields.get(k) is not None}
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class Recipients:
    """Clean prompts and the backdoor response that is scored on each, as ids."""

    prompts: list[list[int]]
    responses: list[list[int]]

    @classmethod
    def of(cls, subject: Subject, examples: Sequence[Example]) -> Recipients:
        """Eligible examples only, clean (sufficiency) or triggered (necessity); raises for none, for one that is not
        eligible or lacks its backdoor response."""
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

    def part(self, rows: Sequence[int]) -> Recipients:
        return Recipients([self.prompts[i] for i in rows], [self.responses[i] for i in rows])


def sites_of(geometry: HeadGeometry, kind: str) -> list[Site]:
    """All heads, attention blocks or MLP blocks, layer by layer."""
    if kind not in SITES:
        raise BkdattrError(f"site {kind!r}: expected one of {', '.join(SITES)}")
    if kind == "head":
        return [Site.of_head(h) for h in geometry.heads]
    return [Site(layer, "attention" if kind == "attention" else "mlp") for layer in range(geometry.n_layers)]


def site_effects(
    subject: Subject,
    recipients: Recipients,
    donors: Traces,
    sites: Sequence[Site],
    *,
    effect: str = "sufficiency",
    batch_size: int = 64,
    fallback: Callable[[str], Any] = warnings.warn,
    prefix: PrefixCache | None = None,
) -> Iterator[tuple[Site, Float[Tensor, " prompt"]]]:
    """Yield (site, CIE per recipient), layer by layer, exactly (`engine.Patcher`).

    Sufficiency: donors are triggered, recipients clean, CIE = P(patched) - P. Necessity: donors are clean, recipients
    triggered, CIE = P - P(patched). `fallback` is told, once, where the model cannot be resumed and is run whole, and why.
    """
    if effect not in EFFECTS:
        raise BkdattrError(f"effect {effect!r}: expected one of {', '.join(EFFECTS)}")
    patcher = Patcher(subject, recipients.prompts, recipients.responses, batch_size=batch_size, prefix=prefix)
    if patcher.reason is not None:
        fallback(patcher.reason)
    for _, group in groupby(sorted(sites, key=lambda s: (s.layer, s.kind)), key=lambda s: (s.layer, s.kind)):
        layer = list(group)
        found = patcher.patched([(site, donors.mean_at(site)) for site in layer]).exp()
        for site, probability in zip(layer, found, strict=True):
            change = probability - patcher.base.exp()
            yield site, change if effect == "sufficiency" else -change


def estimate_effects(
    subject: Subject,
    recipients: Recipients,
    donors: Traces,
    kind: str = "head",
    *,
    effect: str = "sufficiency",
    batch_size: int = 64,
    prefix: PrefixCache | None = None,
) -> dict[Site, Float[Tensor, " prompt"]]:
    """First-order estimates of the CIEs of all heads, attention or MLP blocks, signed as `site_effects` signs them."""
    found = gradient_effects(
        subject, recipients.prompts, recipients.responses, donors, kind, batch_size=batch_size, prefix=prefix
    )
    return found if effect == "sufficiency" else {s: -x for s, x in found.items()}


def summarise_effects(
    effects: Mapping[Site, Float[Tensor, " prompt"]],
    geometry: HeadGeometry,
    n_donor: int,
    fingerprint: str,
    *,
    effect: str = "sufficiency",
    site: str = "head",
    method: str = "exact",
    verified: Iterable[Site] | None = None,
) -> Attribution:
    """ACIE and its interval from the CIEs of every site; one bootstrap draw of recipients serves all of them."""
    sites = sites_of(geometry, site)
    missing = [s for s in sites if s not in effects]
    if missing:
        raise BkdattrError(f"{len(missing)} sites have no effects yet, first {missing[0]}")
    samples = torch.stack([effects[s] for s in sites], 1).double().numpy()
    shape = (geometry.n_layers, -1)
    low, high = bootstrap_interval(samples)
    return Attribution(
        samples.mean(0).reshape(shape), low.reshape(shape), high.reshape(shape), n_donor, len(samples), fingerprint,
        effect=effect, site=site, method=method,
        verified=None if verified is None else np.isin(range(len(sites)), [sites.index(s) for s in verified]).reshape(shape),
    )  # fmt: skip


def rank_stability(
    effects: Mapping[Site, Float[Tensor, " prompt"]], k: int, *, draws: int = 200, seed: int = 0
) -> dict[str, Any]:
    """How far the ranking depends on which prompts were drawn: mean Jaccard overlap of the top k of two bootstrap samples of the
    recipients, what two random k-subsets overlap on average, and mean Kendall tau of all scores."""
    samples = torch.stack(list(effects.values()), 1).double().numpy()
    if not 1 <= k <= samples.shape[1]:
        raise BkdattrError(f"rank stability: got k={k}, expected 1..{samples.shape[1]}")
    rng, overlaps, taus = np.random.default_rng(seed), [], []
    for _ in range(draws):
        a, b = (samples[rng.integers(len(samples), size=len(samples))].mean(0) for _ in range(2))
        overlaps.append(jaccard(*(np.argsort(-x, kind="stable")[:k].tolist() for x in (a, b))))
        taus.append(kendall(a, b))
    chance = expected_jaccard(k, samples.shape[1])
    return {"k": k, "jaccard": float(np.mean(overlaps)), "jaccard_of_random_sets": chance, "kendall": float(np.mean(taus))}


def baha(
    subject: Subject,
    clean: Sequence[Example],
    triggered: Sequence[Example],
    *,
    effect: str = "sufficiency",
    site: str = "head",
    batch_size: int = 64,
    progress: Any = iter,
    method: str = "exact",
    fraction: float = FRACTION,
) -> Attribution:
    """ACIE of every head (or `site` "attention" or "mlp" block) from `clean` prompts and their `triggered` twins, eligible
    examples only. Triggered prompts are the donors of sufficiency and the recipients of necessity.

    `method`: "exact" patches every site; "gradient" estimates all of them to first order (`gradient.gradient_effects`); "hybrid"
    estimates all and patches the best `fraction` of them and a random sample of the rest.
    `progress` wraps the iteration over sites that are patched (e.g. `functools.partial(tqdm, total=96)`).
    """
    check_method(method, fraction)
    if any(not e.eligible for e in triggered):
        raise BkdattrError("donors must be eligible examples: got one that is not")
    if any(not e.spans for e in triggered) or any(e.spans for e in clean):
        raise BkdattrError(
            "the clean prompts must carry no trigger and the triggered ones must: got a triggered example without trigger "
            "spans or a clean one with them; make the twins with spec.clean and spec.triggered"
        )
    given, taken = (triggered, clean) if effect == "sufficiency" else (clean, triggered)
    recipients, donors = Recipients.of(subject, taken), trace_prompts(subject, given, batch_size=batch_size)
    sites, effects, verified, shared = sites_of(subject.geometry, site), dict[Site, Tensor](), None, None
    if method != "exact":
        shared = prefix_cache(subject)
        effects = estimate_effects(subject, recipients, donors, site, effect=effect, batch_size=batch_size, prefix=shared)
        best, sample = screen(effects, fraction)
        sites = [] if method == "gradient" else [*best, *sample]
        verified = best if method == "hybrid" else None
    if sites:
        effects |= dict(
            progress(site_effects(subject, recipients, donors, sites, effect=effect, batch_size=batch_size, prefix=shared))
        )
    return summarise_effects(
        effects, subject.geometry, len(given), subject.fingerprint, effect=effect, site=site, method=method, verified=verified
    )
