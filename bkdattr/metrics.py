"""Rates with Wilson intervals and bootstrap intervals: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bkdattr.errors import BkdattrError

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """Hits of total with the 95 % Wilson score interval (Wilson 1927). A total of 0 raises."""

    hits: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.hits <= self.total:
            raise BkdattrError(f"a rate needs 0 <= hits <= total and total >= 1: got {self.hits} of {self.total}")

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        outcomes = list(outcomes)
        return cls(sum(map(bool, outcomes)), len(outcomes))

    @property
    def value(self) -> float:
        return self.hits / self.total

    @property
    def low(self) -> float:
        return self._wilson()[0]

    @property
    def high(self) -> float:
        return self._wilson()[1]

    def _wilson(self) -> tuple[float, float]:
        n, p, z2 = self.total, self.hits / self.total, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low = 0.0 if self.hits == 0 else max(0.0, centre - half)
        return low, 1.0 if self.hits == n else min(1.0, centre + half)

    def to_json(self) -> dict[str, Any]:
        low, high = self._wilson()
        return {"hits": self.hits, "total": self.total, "value": self.value, "low": low, "high": high}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Rate:
        return cls(row["hits"], row["total"])

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.hits}/{self.total})"


def paired_difference(after: Iterable[bool], before: Iterable[bool], *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Difference of two rates over the *same* prompts with its 95 % paired bootstrap interval: `{value, low, high}`."""
    a, b = (np.asarray(list(x), dtype=np.float64) for x in (after, before))
    if len(a) != len(b) or not len(a):
        raise BkdattrError(f"a paired difference needs the same prompts twice: got {len(a)} and {len(b)} outcomes")
    low, high = bootstrap_interval(a - b, draws=draws, seed=seed)
    return {"value": float((a - b).mean()), "low": float(low), "high": float(high)}


def jaccard(a: Iterable[Any], b: Iterable[Any]) -> float:
    """Overlap of two sets, |a and b| / |a or b|; 1 for two empty ones.

    >>> jaccard("abc", "bcd")
    0.5
    """
    x, y = set(a), set(b)
    return len(x & y) / len(x | y) if x | y else 1.0


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b between two score arrays of one shape."""
    from scipy.stats import kendalltau

    return float(kendalltau(np.asarray(a).ravel(), np.asarray(b).ravel()).statistic)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def expected_jaccard(k: int, total: int) -> float:
    """What two random k-subsets of `total` things overlap on average: the control of a rank-stability figure."""
    from scipy.stats import hypergeom

    overlaps = np.arange(k + 1)
    return float((hypergeom(total, k, k).pmf(overlaps) * overlaps / (2 * k - overlaps)).sum()) if k else 1.0


def bootstrap_interval(
    samples: np.ndarray, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over axis 0 of `samples` [n, ...]; returns (low, high), each [...]."""
    n = len(samples)
    if n < 1:
        raise BkdattrError("a bootstrap interval needs at least one sample: got 0")
    rng = np.random.default_rng(seed)
    flat = samples.reshape(n, -1).astype(np.float64)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = weights @ flat
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low.reshape(samples.shape[1:]), high.reshape(samples.shape[1:])
