"""From numbers to suspicion: conformal p-values against benign adapters of the same recipe, and an ensemble over detectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bkdattr.detectors.common import Clean, Detector, Suspicion
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.model import Subject

FEWEST = 19
"""Benign adapters below which no p-value reaches 0.05."""


def conformal(score: float, benign: Sequence[float]) -> float:
    """P(a benign adapter scores at least as high): (1 + number of benign scores >= score) / (1 + number of benign scores)."""
    return (1 + sum(b >= score for b in benign)) / (1 + len(benign))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(positive > negative) + half of the ties."""
    a, b = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


@dataclass(frozen=True)
class Calibrated:
    """One statistic against the bank's: a robust z (median and MAD), its absolute value where both sides are suspicious."""

    median: float
    spread: float
    two_sided: bool
    benign: tuple[float, ...]

    @classmethod
    def fit(cls, values: Sequence[float], two_sided: bool) -> Calibrated:
        if len(values) < FEWEST:
            raise BkdattrError(
                f"calibration: got {len(values)} benign adapters, expected at least {FEWEST}: with fewer no p-value reaches 0.05; make more with `bkdattr bank`"
            )
        x = np.asarray(values, dtype=float)
        if not np.isfinite(x).all():
            raise BkdattrError(
                f"calibration: {int((~np.isfinite(x)).sum())} of {len(x)} benign values are not finite; make the bank again"
            )
        median = float(np.median(x))
        spread = 1.4826 * float(np.median(np.abs(x - median)))
        spread = max(spread, 0.1 * float(x.std()), 1e-9)
        fitted = cls(median, spread, two_sided, ())
        return cls(median, spread, two_sided, tuple(fitted.score(v) for v in values))

    def score(self, value: float) -> float:
        z = (value - self.median) / self.spread
        z = math.copysign(math.log1p(abs(z)), z)  # a bank of forty says little about how far out is far out
        return abs(z) if self.two_sided else z

    def p_value(self, value: float) -> float:
        return conformal(self.score(value), self.benign)


@dataclass(frozen=True)
class Fitted:
    """One detector fitted to benign adapters: `fit(...)`, then `score(subject, clean prompts)`. The prompts must be the bank's."""

    detector: Detector
    calibrated: Calibrated

    @classmethod
    def fit(cls, detector: Detector, bank: Sequence[Mapping[str, float]]) -> Fitted:
        """`bank`: statistics of each benign adapter, as "detector.statistic" (`Bank.adapters` holds them)."""
        name = f"{detector.name}.{detector.main}"
        lacking = [i for i, row in enumerate(bank) if name not in row]
        if lacking:
            raise BkdattrError(
                f"calibration: adapter {lacking[0]} of the bank has no {name}; make the bank again with `bkdattr bank`"
            )
        return cls(detector, Calibrated.fit([row[name] for row in bank], detector.two_sided))

    def score(self, subject: Subject, prompts: Sequence[Example]) -> Suspicion:
        """Measure the subject's adapter on clean prompts and judge its main statistic alone."""
        clean = Clean(subject, prompts)
        found = self.detector.measure(clean)
        value = found.statistics[self.detector.main]
        if not math.isfinite(value):
            raise BkdattrError(
                f"detection: {self.detector.name}.{self.detector.main} is not finite: the model overflows; try a wider dtype"
            )
        target = found.answer or (None if found.token is None else subject.chat.decode([found.token]).strip())
        evidence = {"statistics": found.statistics, "benign_median": self.calibrated.median, **found.evidence}
        return Suspicion(self.calibrated.score(value), self.calibrated.p_value(value), target, evidence)


@dataclass(frozen=True)
class Ensemble:
    """Several statistics, `parts` as "detector.statistic"; the score is the mean of the `top` largest of their calibrated scores."""

    parts: Mapping[str, Calibrated]
    benign: tuple[float, ...]
    top: int = 2

    @classmethod
    def fit(cls, bank: Sequence[Mapping[str, float]], sides: Mapping[str, bool], top: int = 2) -> Ensemble:
        """`bank`: statistics of each benign adapter. Each is scored by a fit without it, so that its score is that of a stranger."""
        parts = {k: Calibrated.fit([row[k] for row in bank], two) for k, two in sides.items()}
        alone = []
        for i, row in enumerate(bank):
            rest = [r for j, r in enumerate(bank) if j != i]
            left = cls({k: Calibrated.fit([r[k] for r in [*rest, rest[0]]], two) for k, two in sides.items()}, (), top)
            alone.append(left.score(row))
        return cls(parts, tuple(alone), top)

    def scores(self, row: Mapping[str, float]) -> dict[str, float]:
        return {k: c.score(row[k]) for k, c in self.parts.items()}

    def score(self, row: Mapping[str, float]) -> float:
        return float(np.mean(sorted(self.scores(row).values(), reverse=True)[: self.top]))

    def p_value(self, row: Mapping[str, float]) -> float:
        return conformal(self.score(row), self.benign)

    def evidence(self, row: Mapping[str, float]) -> list[dict[str, Any]]:
        """Every part: value, benign median, score, p-value; most suspicious first."""
        rows = [
            {"statistic": k, "value": row[k], "benign_median": c.median, "score": c.score(row[k]), "p_value": c.p_value(row[k])}
            for k, c in self.parts.items()
        ]
        return sorted(rows, key=lambda r: -r["score"])
