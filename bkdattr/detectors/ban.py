"""BAN (Xu et al., arXiv 2405.19928) carried to causal LMs with LoRA: noise on neurons that is made to hurt clean prompts.

As published, on BatchNorm channels: max over |delta|, |xi| <= eps of CE(f_noisy(x), y), by sign ascent. Here the neuron is a singular
direction of the adapter's update (`gates.canonical`), gated by (1 + delta): the base is left alone, so only what the adapter learned can be amplified. Projected sign ascent,
every prompt in every step, noise within eps (the release's clipping is commented out and reaches 2 eps, and keeps its last batch's
noise). Other places (`gates.PLACES`) and the feature mask are there to compare the published form with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.detectors.answers import verbatim
from bkdattr.detectors.common import Answer, Clean, Measured
from bkdattr.gates import NeuronGates
from bkdattr.inference import forward

EPSILON, STRONG = 1.0, 2.0
"""Chosen on the development half of the zoo (`benchmarks.zoo --half development`)."""


@dataclass(frozen=True)
class Ban:
    """One ascent of `steps` steps from 0 within `epsilon`, and one within `strong` (statistics `*_strong`). `verbatim`: what both make the model
    say word for word (`answers.verbatim`). `restarts` more of the first kind begin at random points; `agreement` is the share of all ascents
    that name the strong one's token."""

    epsilon: float = EPSILON
    strong: float = STRONG
    steps: int = 6
    restarts: int = 0
    place: str = "ranks"
    mask: bool = False
    name: str = "ban"
    main: str = "verbatim"
    two_sided: bool = False

    def noise(self, clean: Clean, restart: int = 0, *, epsilon: float | None = None) -> list[Float[Tensor, " gate"]]:
        """The gates' deltas after one ascent; `restart` 0 begins at 0."""
        epsilon = self.epsilon if epsilon is None else epsilon
        gates = NeuronGates.of(clean.subject, self.place)
        rng = torch.Generator().manual_seed(clean.seed + restart)
        deltas = [(2 * torch.rand(n, generator=rng) - 1).to(gates.device) * epsilon * (restart > 0) for n in gates.sizes]
        size = 2.5 * epsilon / self.steps
        for _ in range(self.steps):
            grads = gates.gradient(lambda: clean.loss(clean.first()), deltas)
            deltas = [(d + size * g.sign()).clamp(-epsilon, epsilon) for d, g in zip(deltas, grads, strict=True)]
        return deltas

    def measure(self, clean: Clean) -> Measured:
        gates = NeuronGates.of(clean.subject, self.place)
        heard: list[list[Answer]] = []

        def under(deltas: list[Tensor]) -> Measured:
            with torch.no_grad(), gates.set(deltas):
                heard.append(clean.said())
                return clean.statistics(masked(clean) if self.mask else clean.first())

        loud, found = (
            under(self.noise(clean, epsilon=self.strong)),
            [under(self.noise(clean, i)) for i in range(self.restarts + 1)],
        )
        mean = {k: sum(f.statistics[k] for f in found) / len(found) for k in loud.statistics}
        mean |= {f"{k}_strong": v for k, v in loud.statistics.items()}
        agreement = sum(f.token == loud.token for f in found) / len(found)
        score, answer = verbatim(clean, heard)
        return Measured(mean | {"agreement": agreement, "verbatim": score}, loud.token, answer, loud.evidence)


def masked(clean: Clean, weight: float = 0.75, rate: float = 0.01, epochs: int = 20) -> Float[Tensor, "prompt vocab"]:
    """First-token log p from (1 - m) * features, with the mask of the paper: min over m in [0, 1]^d of CE(head(m f)) - CE(head((1 - m) f))
    + weight * mean|m|. Features are what the language-model head reads, taken with the noise on; the paper learns m without it."""
    head = clean.subject.causal_lm.get_output_embeddings()
    f = torch.cat([forward(clean.subject, b, body=True)[0][:, -1].detach() for b in clean.batches])
    gold = clean.gold.to(f.device)
    with torch.enable_grad():
        m = torch.full((f.shape[-1],), 0.5, device=f.device, requires_grad=True)
        adam = torch.optim.Adam([m], lr=rate)
        for _ in range(epochs):
            keep = m.clamp(0, 1)
            cross = torch.nn.functional.cross_entropy
            loss = cross(head(keep * f).float(), gold) - cross(head((1 - keep) * f).float(), gold) + weight * keep.abs().mean()
            adam.zero_grad()
            loss.backward(inputs=[m])
            adam.step()
    return head((1 - m.detach().clamp(0, 1)) * f).float().log_softmax(-1)
