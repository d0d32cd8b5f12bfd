"""Statistics of the update dW = s B A alone: no prompt, no forward pass (arXiv 2602.15195). Two-sided, because an attacker who clips his
outliers away leaves an update that is too even."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bkdattr.detectors.common import Clean, Measured
from bkdattr.gates import lora_pairs
from bkdattr.stealth import norms_of

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class WeightStatistics:
    """Means over modules: largest singular value, Frobenius norm, share of the energy in the first singular direction, entropy of the energies,
    excess kurtosis of dW, and how far the largest row stands out (standard deviations)."""

    name: str = "weights"
    main: str = "kurtosis"
    two_sided: bool = True

    @torch.no_grad()
    def measure(self, clean: Clean) -> Measured:
        seen: dict[str, list[float]] = {}
        for _, a, b, scale in lora_pairs(clean.subject.causal_lm):
            n = norms_of(a.float(), b.float(), scale)
            energy = n.singular**2 / (n.singular**2).sum().clamp(min=1e-30)
            entropy = -(energy * energy.clamp(min=1e-30).log()).sum()
            total, second, fourth = 0, 0.0, 0.0  # of a zero-mean update
            for start in range(0, len(b), ROWS_AT_ONCE):
                w = (scale * b[start : start + ROWS_AT_ONCE].float() @ a.float()).double()
                total, second, fourth = total + w.numel(), second + float((w**2).sum()), fourth + float((w**4).sum())
            kurtosis = fourth * total / max(second**2, 1e-300) - 3
            rows = (n.rows.max() - n.rows.mean()) / n.rows.std().clamp(min=1e-12)
            columns = (n.columns.max() - n.columns.mean()) / n.columns.std().clamp(min=1e-12)
            for key, value in (
                ("sigma_1", n.singular[0]), ("frobenius", n.singular.norm()), ("energy_1", energy[0]), ("entropy", entropy),
                ("kurtosis", kurtosis), ("row_outlier", rows), ("column_outlier", columns),
            ):  # fmt: skip
                seen.setdefault(key, []).append(float(value))
        return Measured({k: sum(v) / len(v) for k, v in seen.items()})
