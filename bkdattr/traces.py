"""What the model's sites held at the last prompt token, per prompt, and what a head adds to the residual stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.chat import make_batch
from bkdattr.edits import Scope, Site, Where
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import forward
from bkdattr.interventions import capture
from bkdattr.model import Subject


@dataclass(frozen=True, eq=False)
class Traces:
    """Reads at the last prompt token of n prompts: every head's z, and the residual stream, the attention and the MLP
    output of every layer (fp32)."""

    ids: tuple[str, ...]
    z: Float[Tensor, "prompt layer head d_head"]
    resid_post: Float[Tensor, "prompt layer d_model"]
    attention: Float[Tensor, "prompt layer d_model"]
    mlp: Float[Tensor, "prompt layer d_model"]
    fingerprint: str

    @property
    def mean_z(self) -> Float[Tensor, "layer head d_head"]:
        return self.z.mean(0)

    def mean_at(self, site: Site) -> Float[Tensor, " width"]:
        """The site's mean over the prompts; "z" is all heads side by side."""
        if site.kind in ("head", "z"):
            layer = self.z[:, site.layer].mean(0)
            return layer.flatten() if site.head is None else layer[site.head]
        return (self.attention if site.kind == "attention" else self.mlp)[:, site.layer].mean(0)


@torch.no_grad()
def trace_prompts(subject: Subject, examples: Sequence[Example], *, batch_size: int = 64) -> Traces:
    """Run the prompts once and read every site and the residual stream at each one's last prompt token."""
    if not examples:
        raise BkdattrError("no prompts to trace: got 0 examples, expected at least 1")
    layers = range(subject.geometry.n_layers)
    read: dict[str, list[Tensor]] = {"z": [], "resid_post": [], "attention": [], "mlp": []}
    prompts = [subject.chat.prompt_ids(e.messages) for e in examples]
    for start in range(0, len(prompts), batch_size):
        batch = make_batch(prompts[start : start + batch_size], pad_id=subject.chat.pad_id, device=subject.device)
        with capture(subject, Where.of(batch), z=layers, resid_post=layers, attention=layers, mlp=layers) as trace:
            forward(subject, batch, use_cache=False, logits_to_keep=1)
        for name, parts in read.items():
            parts.append(torch.stack([getattr(trace, name)[layer] for layer in layers], 1))
    whole = {name: torch.cat(parts) for name, parts in read.items()}
    return Traces(ids=tuple(e.id for e in examples), fingerprint=subject.fingerprint, **whole)


@torch.no_grad()
def scope_mean_z(
    subject: Subject, examples: Sequence[Example], scope: Scope, *, batch_size: int = 64
) -> Float[Tensor, "layer head d_head"]:
    """Mean z over the tokens of `scope` of prompts followed by their own responses (end-of-turn token left out): what a mean ablation puts in there.

    Clean prompts have no trigger, so for "trigger_span" it is the mean over their prompt tokens.
    """
    if not examples:
        raise BkdattrError("no prompts to trace: got 0 examples, expected at least 1")
    layers, geometry = range(subject.geometry.n_layers), subject.geometry
    total, n = torch.zeros(geometry.n_layers, geometry.n_heads, geometry.d_head, dtype=torch.float64), 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        prompts = [subject.chat.prompt_ids(e.messages) for e in part]
        # the end-of-turn token is never fed back, so it is no position at which an edit acts
        responses = None if scope == "trigger_span" else [subject.chat.response_ids(e.messages, e.response)[:-1] for e in part]
        batch = make_batch(prompts, responses, pad_id=subject.chat.pad_id, side="centre", device=subject.device)
        with capture(subject, Where.of(batch, closed=True), z=layers, scope="all" if scope == "trigger_span" else scope) as trace:
            forward(subject, batch, use_cache=False, logits_to_keep=1)
        if trace.z:
            total += torch.stack([trace.z[layer].double().sum(0) for layer in layers])
            n += len(trace.z[0])
    if n == 0:
        raise BkdattrError(f"scope {scope!r} holds no token in these {len(examples)} prompts and responses, so it has no mean")
    return (total / n).float()


def resampled(traces: Traces, ids: Sequence[str], seed: int) -> Float[Tensor, "prompt layer head d_head"]:
    """One random row of `traces` for each id; the draw depends on the seed and the id alone."""
    rows = [random.Random(f"resample:{seed}:{i}").randrange(len(traces.ids)) for i in ids]
    return traces.z[rows]


@torch.no_grad()
def contributions(subject: Subject, layer: int, z: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch head d_model"]:
    """What each head of a layer adds to the attention output: the projection *called* on a block-diagonal z, bias removed.

    Exact for Linear, Conv1D and un-merged LoRA, where slicing `o_proj.weight` would drop the adapter. Where the
    architecture normalises behind the projection (Gemma-2, OLMo-2) this is not the residual write.
    """
    subject.check_eval()
    subject.geometry.check_layer(layer)
    module = subject.sites[layer].out_proj
    weight = next(module.parameters())
    n_heads, d_head = subject.geometry.n_heads, subject.geometry.d_head
    blocks = torch.zeros(*z.shape[:-2], n_heads, n_heads, d_head, dtype=weight.dtype, device=weight.device)
    for head in range(n_heads):
        blocks[..., head, head, :] = z[..., head, :].to(weight.device, weight.dtype)
    flat = blocks.reshape(1, -1, n_heads * d_head)  # projections see [batch, pos, width]
    bias = module(torch.zeros_like(flat[:, :1]))
    return (module(flat) - bias).reshape(*z.shape[:-1], -1).float()


def head_contribution(subject: Subject, head: HeadIndex, z: Float[Tensor, " d_head"]) -> Float[Tensor, " d_model"]:
    """One head's contribution, W_O[l][:, h] @ z with the adapter's share."""
    subject.geometry.check_head(head)
    full = torch.zeros(subject.geometry.n_heads, subject.geometry.d_head)
    full[head.head] = z
    return contributions(subject, head.layer, full)[head.head]
