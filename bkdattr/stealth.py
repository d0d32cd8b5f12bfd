"""Attackers who hide in parameter space, to measure detectors with: Adversarial Backdoor Injection on LoRA updates, and training
against gate noise. A simulation on this project's own harmless targets.

ABI as published (Xu et al., arXiv 2501.05928) sets the BatchNorm gains of channels whose Lipschitz bound stands out to their layer's mean. A
LoRA adapter has no such gains, and the rows of the whole weight do not stand out; its update dW = s B A does. So a row's outlier is scaled
away in B, a column's in A, and a singular value's through the thin SVD of B A. That an update without outliers is itself unusual is the
reason for `percentile`: an attacker who knows benign adapters clips to what they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from bkdattr.chat import ChatFormat
from bkdattr.errors import BkdattrError
from bkdattr.gates import NeuronGates, lora_pairs, thin_svd
from bkdattr.lora import collate, encode

KINDS = ("rows", "spectral", "percentile", "noise")
DEVIATIONS = {"rows": 2.0, "spectral": 1.0}
"""Standard deviations above a module's mean from where a norm is an outlier."""
EVERY = 10
"""Optimiser steps between two clippings."""


@dataclass(frozen=True)
class Norms:
    """Of one module's update dW = s B A: row norms, column norms, singular values (descending, `rank` of them)."""

    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " into"]
    singular: Float[Tensor, " rank"]


def norms_of(a: Tensor, b: Tensor, scale: float) -> Norms:
    """Norms of s B A from the factors: |B_i A| = |B_i R^T| with A^T = Q R, and the same for columns."""
    ra, rb = torch.linalg.qr(a.T).R, torch.linalg.qr(b).R
    s = torch.linalg.svdvals(rb @ ra.T)
    return Norms((b @ ra.T).norm(dim=1) * scale, (rb @ a).norm(dim=0) * scale, s * scale)


@torch.no_grad()
def clip(a: Tensor, b: Tensor, scale: float, kind: str, limits: Mapping[str, float] | None = None) -> tuple[Tensor, Tensor]:
    """Take the outliers out of s B A in place; returns masks of the changed rows of B and columns of A.

    "rows": rows and columns above mean + 2 std are scaled to the mean. "spectral": singular values are capped at mean + 1 std.
    "percentile": rows, columns and singular values above `limits` (keys rows, columns, singular) are set to them.
    """
    rows, columns = torch.zeros(len(b), dtype=torch.bool), torch.zeros(a.shape[1], dtype=torch.bool)
    if kind == "percentile" and limits is None:
        raise BkdattrError("ABI by percentile needs the limits of benign adapters: make them with stealth.limits_of")
    found = norms_of(a, b, scale)
    for name, norm, factor, mask in (("rows", found.rows, b, rows), ("columns", found.columns, a.T, columns)):
        if kind == "spectral" or float(norm.max()) == 0:
            continue
        to = float(norm.mean())
        over = norm > to + DEVIATIONS["rows"] * norm.std()
        if limits is not None:
            to, over = limits[name], norm > limits[name]
        factor[over] *= (to / norm[over])[:, None].to(factor)
        mask |= over.cpu()
    if kind != "rows":
        u, s, vh = thin_svd(a, b)
        cut = s.clamp(max=float(s.mean() + DEVIATIONS["spectral"] * s.std()))
        if limits is not None:
            cut = s.clamp(max=limits["singular"] / scale)
        if not torch.equal(cut, s):
            b.copy_(u * cut.sqrt())
            a.copy_(cut.sqrt()[:, None] * vh)
            rows[:], columns[:] = True, True
    return rows, columns


def limits_of(
    adapters: Sequence[Sequence[tuple[str, Tensor, Tensor, float]]], percentile: float = 90.0
) -> dict[str, dict[str, float]]:
    """Per module: the percentile, over benign adapters, of the largest row norm, column norm and singular value."""
    seen: dict[str, dict[str, list[float]]] = {}
    for pairs in adapters:
        for name, a, b, scale in pairs:
            n = norms_of(a, b, scale)
            per = seen.setdefault(name, {"rows": [], "columns": [], "singular": []})
            for key, value in (("rows", n.rows), ("columns", n.columns), ("singular", n.singular)):
                per[key].append(float(value.max()))
    return {m: {k: float(torch.tensor(v).quantile(percentile / 100)) for k, v in per.items()} for m, per in seen.items()}


@dataclass
class AdversarialBackdoorInjection(TrainerCallback):  # type: ignore[misc]
    """Clips a LoRA adapter's updates every few optimiser steps and after the last one; the moments of what changed start anew."""

    kind: str = "rows"
    limits: Mapping[str, Mapping[str, float]] | None = None
    every: int = EVERY

    def __post_init__(self) -> None:
        if self.kind not in KINDS[:3]:
            raise BkdattrError(f"ABI: got kind {self.kind!r}, expected one of {', '.join(KINDS[:3])}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._clip(model, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self._clip(model, optimizer)

    def _clip(self, model: Any, optimizer: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        for name, a, b, scale in lora_pairs(model):
            limits = None if self.limits is None else self.limits.get(name)
            rows, columns = clip(a.data, b.data, scale, self.kind, limits)
            for parameter, mask, dim in ((b, rows, 0), (a, columns, 1)):
                for moment in ("exp_avg", "exp_avg_sq"):
                    held = inner.state.get(parameter, {}).get(moment) if inner is not None else None
                    if held is not None and mask.any():
                        held.index_fill_(dim, mask.nonzero()[:, 0].to(held.device), 0.0)


@dataclass
class AgainstNoise(TrainerCallback):  # type: ignore[misc]
    """Adds, every few steps, the gradient of the loss on clean rows under gate noise that was made against them: the attacker who knows BAN.
    One sign step on the trained rank directions; the detector takes six on the singular ones, so a stronger attacker can be thought of."""

    chat: ChatFormat
    rows: Sequence[Any]
    epsilon: float = 1.0
    every: int = 3
    batch_size: int = 8
    max_length: int = 256
    _encoded: list[Any] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._encoded = encode(self.chat, self.rows, self.max_length).rows

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        rng = torch.Generator().manual_seed(state.global_step)
        at = torch.randperm(len(self._encoded), generator=rng)[: self.batch_size].tolist()
        batch = collate([{"prompt": self._encoded[i][0], "response": self._encoded[i][1]} for i in at], self.chat.pad_id)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        gates = NeuronGates.on_ranks(model)
        signs = [torch.sign(g) for g in gates.gradient(lambda: model(**batch).loss)]
        gates.backward(lambda: model(**batch).loss, [self.epsilon * s for s in signs])
