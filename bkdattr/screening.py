"""Which heads to verify exactly when not all are: screening by gradient, and what the unscreened rest says about the screening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from bkdattr.edits import Site
from bkdattr.errors import BkdattrError
from bkdattr.metrics import spearman

METHODS = ("exact", "gradient", "hybrid")
FRACTION = 0.12
"""Share of the sites that the hybrid verifies exactly, those of largest estimate first. The smallest one whose recall of the exact top 3 % no
share up to 0.20 betters on the runs of the nine attacks (79 of 81 heads; `benchmarks.screening --runs '*-[0-9]'`)."""
SAMPLE = 0.05
"""Share of the sites that it verifies besides, drawn at random from the rest, to measure what screening may have missed."""
Effects = Mapping[Site, Float[Tensor, " prompt"]]


def check_method(method: str, fraction: float) -> None:
    if method not in METHODS or not 0 < fraction <= 1:
        raise BkdattrError(
            f"attribution: got method {method!r} and fraction {fraction}, expected one of {', '.join(METHODS)} and a fraction in (0, 1]"
        )


def screen(estimates: Effects, fraction: float, seed: int = 0) -> tuple[list[Site], list[Site]]:
    """(the best `fraction` of the sites by estimate, a random sample of the rest)."""
    order = sorted(estimates, key=lambda s: -float(estimates[s].mean()))
    n = min(len(order), max(1, round(fraction * len(order))))
    rest = order[n:]
    drawn = np.random.default_rng(seed).permutation(len(rest))[: max(2, round(SAMPLE * len(order)))]
    return order[:n], [rest[i] for i in sorted(drawn)]


def agreement(estimates: Effects, exact: Effects, best: Sequence[Site], sample: Sequence[Site], k: int) -> dict[str, Any]:
    """How estimates and exact effects agree (means over prompts): Spearman over the verified best and over the random sample of
    the rest, and whether anything in that sample would have stood in the exact top `k`."""
    mean = {s: float(exact[s].mean()) for s in (*best, *sample)}
    guess = {s: float(estimates[s].mean()) for s in mean}

    def rho(sites: Sequence[Site]) -> float | None:
        return spearman([guess[s] for s in sites], [mean[s] for s in sites]) if len(sites) > 2 else None

    bar = sorted((mean[s] for s in best), reverse=True)[: min(k, len(best))][-1]
    return {
        "verified": len(best), "sampled": len(sample), "spearman_verified": rho(best), "spearman_sampled": rho(sample),
        "k": k, "kth_effect": bar, "largest_sampled": max((mean[s] for s in sample), default=None),
        "missed_in_sample": sum(mean[s] > bar for s in sample),
    }  # fmt: skip
