"""Multiplicative gates (1 + delta) on an adapter's rank directions, or on a model's MLP channels, heads' z and norm gains.

A gate on the output of `lora_A` is the same as its rows scaled, one on a channel the same as a column of the projection that reads it. So
gates are written into the weights inside a `with` block and taken out behind it: no hook, and what a gate's gradient is follows from the
weight's: dL/d delta_k = sum over row k of W * dL/dW, at delta = 0 and, with W the original, at any delta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bkdattr.errors import BkdattrError

PLACES = ("ranks", "channels", "heads", "norms")


def lora_pairs(model: Any) -> list[tuple[str, nn.Parameter, nn.Parameter, float]]:
    """(module, A [rank, in], B [out, rank], scale) of every LoRA layer of the active adapter; dW = scale * B A."""
    out = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            key = module.active_adapters[0]
            short = name.removeprefix("base_model.model.")
            out.append((short, module.lora_A[key].weight, module.lora_B[key].weight, float(module.scaling[key])))
    if not out:
        raise BkdattrError(
            "gates on rank directions: the model has no LoRA layers; give an un-merged adapter, or the base to factor against"
        )
    return out


def thin_svd(
    a: Float[Tensor, "rank into"], b: Float[Tensor, "out rank"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank into"]]:
    """SVD of B A through two QR decompositions, without forming it: U [out, rank], S [rank], V^T [rank, into]."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    return qb @ u, s, vh @ qa.T


@torch.no_grad()
def canonical(model: Any) -> None:
    """Write every LoRA pair in the singular directions of its own update, in place: B A stays what it is, to rounding.

    (B R^-1)(R A) is the same update for every invertible R, so a "rank direction" is the trainer's choice, and an attacker's. Here a row of A is a right
    singular vector and a column of B the left one, each times the root of the singular value, largest first: what is measured on them
    depends on the update alone, and is the same for a merged model that was factored again.
    """
    for _, a, b, _ in lora_pairs(model):
        u, s, vh = thin_svd(a.double(), b.double())
        b.zero_()
        a.zero_()
        b[:, : len(s)], a[: len(s)] = (u * s.sqrt()).to(b), (s.sqrt()[:, None] * vh).to(a)


@dataclass(frozen=True)
class _Gate:
    """One vector of gates: the weights that it scales, each along a dimension, `width` entries per gate."""

    weights: tuple[tuple[nn.Parameter, int], ...]
    n: int
    width: int = 1
    offset: float = 0.0
    """What the module adds to its weight before it scales by it (Gemma's norms: 1)."""


@dataclass(frozen=True, eq=False)
class NeuronGates:
    """All gates of one kind in a model; a setting is one vector per module, in the order of `gates`."""

    gates: tuple[_Gate, ...]

    @classmethod
    def on_ranks(cls, model: Any) -> NeuronGates:
        """On the rank directions of the adapter: only what it learned is amplified."""
        return cls(tuple(_Gate(((a, 0),), len(a)) for _, a, _, _ in lora_pairs(model)))

    @classmethod
    def of(cls, subject: Any, place: str = "ranks") -> NeuronGates:
        """On "ranks", MLP "channels", "heads" (z) or "norms" (gains, and biases where there are) of a `Subject`."""
        if place not in PLACES:
            raise BkdattrError(f"gates: got place {place!r}, expected one of {', '.join(PLACES)}")
        if place == "ranks":
            return cls.on_ranks(subject.causal_lm)
        g, out = subject.geometry, []
        for sites in subject.sites:
            if place == "norms":
                for module in sites.layer.modules():
                    if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                        out.append(_Gate(((module.weight, 0),), len(module.weight), offset=_offset(module)))
                        if getattr(module, "bias", None) is not None:
                            out.append(_Gate(((module.bias, 0),), len(module.bias)))
                continue
            proj = sites.out_proj if place == "heads" else _last_linear(sites.mlp)
            read = _inputs(proj)
            weight, dim = read[0]
            n, width = (g.n_heads, g.d_head) if place == "heads" else (weight.shape[dim], 1)
            out.append(_Gate(read, n, width))
        return cls(tuple(out))

    @property
    def sizes(self) -> list[int]:
        return [g.n for g in self.gates]

    @property
    def device(self) -> torch.device:
        return self.gates[0].weights[0][0].device

    @contextmanager
    def set(self, deltas: Sequence[Float[Tensor, " gate"]]) -> Iterator[None]:
        """Scale every gated weight by 1 + delta inside; the weights are then what they were, bit for bit."""
        kept = [[w.data for w, _ in g.weights] for g in self.gates]
        try:
            for gate, delta in zip(self.gates, deltas, strict=True):
                for weight, dim in gate.weights:
                    scaled = weight.data * _wide(delta, gate, weight, dim)
                    weight.data = scaled + gate.offset * (_wide(delta, gate, weight, dim) - 1) if gate.offset else scaled
            yield
        finally:
            for gate, before in zip(self.gates, kept, strict=True):
                for (weight, _), data in zip(gate.weights, before, strict=True):
                    weight.data = data

    def backward(self, loss: Callable[[], Tensor], deltas: Sequence[Tensor]) -> float:
        """Add d loss / d weight at `deltas` to the gradients of all weights that want one, the scaled ones by the chain rule; the loss."""
        weights = [w for g in self.gates for w, _ in g.weights]
        before = [w.grad for w in weights]
        for w in weights:
            w.grad = None
        with self.set(deltas), torch.enable_grad():
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
        held = iter(before)
        for gate, delta in zip(self.gates, deltas, strict=True):
            for w, dim in gate.weights:
                old = next(held)
                if w.grad is not None:
                    w.grad = w.grad * _wide(delta, gate, w, dim)
                    w.grad = w.grad if old is None else old + w.grad
                else:
                    w.grad = old
        return float(value.detach())

    def gradient(self, loss: Callable[[], Tensor], deltas: Sequence[Tensor] | None = None) -> list[Float[Tensor, " gate"]]:
        """d loss / d delta at `deltas` (default 0). `loss()` is called once, with the gates set."""
        weights = [w for g in self.gates for w, _ in g.weights]
        original = {id(w): w.data for w in weights}
        needed = [w.requires_grad for w in weights]
        for w in weights:
            w.requires_grad_(True)
        try:
            with self.set(deltas if deltas is not None else [torch.zeros(n) for n in self.sizes]), torch.enable_grad():
                grads = dict(zip(map(id, weights), torch.autograd.grad(loss(), weights), strict=True))
        finally:
            for w, before in zip(weights, needed, strict=True):
                w.requires_grad_(before)
        out = []
        for gate in self.gates:
            total = torch.zeros(gate.n, device=gate.weights[0][0].device)
            for weight, dim in gate.weights:
                product = (original[id(weight)].float() + gate.offset) * grads[id(weight)].float()
                per = product.movedim(dim, 0).flatten(1).sum(-1) if product.ndim > 1 else product
                total += per.view(gate.n, gate.width).sum(-1).to(total)
            out.append(total.to(self.device))
        return out


def _wide(delta: Tensor, gate: _Gate, weight: Tensor, dim: int) -> Tensor:
    """1 + delta, spread over a gate's entries and shaped to multiply the weight."""
    return (1 + delta).repeat_interleave(gate.width).to(weight).view([-1 if i == dim else 1 for i in range(weight.ndim)])


@torch.no_grad()
def _offset(norm: Any) -> float:
    """1 where a norm scales by 1 + weight, as Gemma's do, 0 where by its weight: what is left of it at weight 0."""
    kept, x = norm.weight.data, torch.linspace(-1, 1, len(norm.weight)).to(norm.weight)[None]
    norm.weight.data = torch.zeros_like(kept)
    try:
        left = norm(x) - (0 if getattr(norm, "bias", None) is None else norm.bias)
    finally:
        norm.weight.data = kept
    return float(left.abs().max() > 1e-3)


def _last_linear(mlp: nn.Module) -> nn.Module:
    """The projection of an MLP block that writes to the residual stream: the last one of it."""
    found = [
        m
        for n, m in mlp.named_modules()
        if hasattr(m, "base_layer") or (hasattr(m, "weight") and "lora_" not in n and "base_layer" not in n)
    ]
    wide = [m for m in found if getattr(m, "base_layer", m).weight.ndim == 2]
    return wide[-1]


def _inputs(module: Any) -> tuple[tuple[nn.Parameter, int], ...]:
    """Weights that read a projection's input, and the dimension of it: Linear [out, in], Conv1D [in, out], LoRA's A [rank, in]."""
    base = getattr(module, "base_layer", module)
    read = [(base.weight, 1 if isinstance(base, nn.Linear) else 0)]
    if hasattr(module, "lora_A"):
        read += [(layer.weight, 1) for layer in module.lora_A.values()]
    return tuple(read)
