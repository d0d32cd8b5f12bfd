"""Removing heads at the last prompt token, in one pass with all k together: zero, clean mean, or a clean prompt's z."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bkdattr.architectures import HeadGeometry, HeadIndex
from bkdattr.edits import Edit, ScaleSite, SetSite, Site
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import ExampleEdits
from bkdattr.examples import Example
from bkdattr.traces import Traces, resampled

MODES = ("zero", "mean", "resample")
CURVE = (0, 1, 2, 4, 8, 16, 32)


def ablate(
    heads: Sequence[HeadIndex], mode: str = "zero", clean: Traces | None = None, seed: int = 0
) -> list[Edit] | ExampleEdits:
    """Edits that remove `heads` at the last prompt token.

    `zero` sets z to 0. `mean` sets it to its mean over the *clean* prompts of `clean` (the mean over triggered prompts
    would keep the backdoor). `resample` gives each example the z of one random clean prompt, drawn by `seed` and the
    example's id: that one is a function of the examples, as `evaluate` takes it.
    """
    if mode not in MODES:
        raise BkdattrError(f"ablation mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "zero" or not heads:
        return [ScaleSite(Site.of_head(h), 0.0) for h in heads]
    if clean is None:
        raise BkdattrError(f"ablation mode {mode!r} needs the traces of clean prompts: pass clean=trace_prompts(...)")
    if mode == "mean":
        return [SetSite(Site.of_head(h), clean.mean_z[h.layer, h.head]) for h in heads]

    def edits(examples: Sequence[Example]) -> list[Edit]:
        z = resampled(clean, [e.id for e in examples], seed)
        return [SetSite(Site.of_head(h), z[:, h.layer, h.head]) for h in heads]

    return edits


def curve_ks(geometry: HeadGeometry, ks: Sequence[int] = CURVE) -> list[int]:
    """The points of the ablation curve, capped at 25 % of the heads (the cap itself closes the curve)."""
    cap = len(geometry.heads) // 4
    return sorted({min(k, cap) for k in ks})


def random_heads(geometry: HeadGeometry, k: int, draw: int, seed: int) -> list[HeadIndex]:
    """`k` random heads; draws are nested in k (the first k of one shuffle), so a curve removes more of the same heads."""
    heads = list(geometry.heads)
    random.Random(f"heads:{seed}:{draw}").shuffle(heads)
    return heads[:k]
