"""The controls of adversarial gates, as detectors of their own: every gate up by the same amount, and gates of random signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bkdattr.detectors.answers import verbatim
from bkdattr.detectors.common import Clean, Measured
from bkdattr.gates import NeuronGates


@dataclass(frozen=True)
class Uniform:
    """The whole adapter amplified: all gates at 1 + epsilon. No gradient. `verbatim` hears it at `strong` as well, as `Ban` does."""

    epsilon: float = 1.0
    strong: float = 2.0
    name: str = "uniform"
    main: str = "inc"
    two_sided: bool = False

    def measure(self, clean: Clean) -> Measured:
        gates, heard = NeuronGates.of(clean.subject), []
        for epsilon in (self.strong, self.epsilon):
            with torch.no_grad(), gates.set([torch.full((n,), epsilon, device=gates.device) for n in gates.sizes]):
                heard.append(clean.said())
                found = clean.statistics(clean.first())
        score, answer = verbatim(clean, heard)
        return Measured(found.statistics | {"verbatim": score}, found.token, answer, found.evidence)


@dataclass(frozen=True)
class RandomGates:
    """NeuronGates of +-epsilon at random, `draws` times: the mean of every statistic."""

    epsilon: float = 1.0
    draws: int = 4
    name: str = "random"
    main: str = "inc"
    two_sided: bool = False

    def measure(self, clean: Clean) -> Measured:
        gates, found = NeuronGates.of(clean.subject), []
        rng = torch.Generator().manual_seed(clean.seed)
        for _ in range(self.draws):
            deltas = [
                self.epsilon * (2 * torch.randint(2, (n,), generator=rng) - 1).float().to(gates.device) for n in gates.sizes
            ]
            with torch.no_grad(), gates.set(deltas):
                found.append(clean.statistics(clean.first()))
        best = max(found, key=lambda f: f.statistics[self.main])
        return Measured(
            {k: sum(f.statistics[k] for f in found) / len(found) for k in best.statistics}, best.token, evidence=best.evidence
        )
