"""What the model's sites held at the last prompt token, per prompt, and what a head adds to the residual stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.chat import make_batch
from bkdattr.edits import Scope, Site, Where
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import batches, forward
from bkdattr.interventions import capture
from bkdattr.model import Subject, device_of

READS = ("z", "resid_post", "attention", "mlp")


@dataclass(frozen=True, eq=False)
class Traces:
    """Reads at the last prompt token of n prompts: every head's z, and the residual stream, the attention and the MLP
    output of every layer (fp32, on the CPU). What was not asked for is empty: no prompts long."""

    ids: tuple[str, ...]
    z: Float[Tensor, "_ layer head d_head"]
    resid_post: Float[Tensor, "_ layer d_model"]
    attention: Float[Tensor, "_ layer d_model"]
    mlp: Float[Tensor, "_ layer d_model"]
    fingerprint: str

    @property
    def mean_z(self) -> Float[Tensor, "layer head d_head"]:
        return self._known("z").mean(0)

    def mean_at(self, site: Site) -> Float[Tensor, " width"]:
        """The site's mean over the prompts; "z" is all heads side by side."""
        if site.kind in ("head", "z"):
            layer = self._known("z")[:, site.layer].mean(0)
            return layer.flatten() if site.head is None else layer[site.head]
        return self._known(site.kind)[:, site.layer].mean(0)

    def _known(self, name: str) -> Tensor:
        found: Tensor = getattr(self, name)
        if len(found) == 0:
            raise BkdattrError(f"these traces hold no {name}: trace with read=({name!r}, ...)")
        return found


@torch.no_grad()
def trace_prompts(subject: Subject, examples: Sequence[Example], *, batch_size: int = 64, read: Sequence[str] = READS) -> Traces:
    """Run the prompts once and read sites and the residual stream at each one's last prompt token.

    What is kept is n x layers x width numbers per read (fp32), however long the prompts are: `read=("z",)` keeps heads alone.
    """
    unknown = [x for x in read if x not in READS]
    if not examples or unknown or not read:
        raise BkdattrError(
            f"tracing: got {len(examples)} examples and read={list(read)}, expected at least 1 example and some of {', '.join(READS)}"
        )
    g, n = subject.geometry, len(examples)
    layers, prompts = range(g.n_layers), [subject.chat.prompt_ids(e.messages) for e in examples]
    shapes = {name: (g.n_heads, g.d_head) if name == "z" else (g.d_model,) for name in READS}
    whole = {name: torch.empty(n if name in read else 0, g.n_layers, *shape) for name, shape in shapes.items()}
    asked: dict[str, Any] = dict.fromkeys(read, layers)
    for rows in batches(prompts, batch_size):
        batch = make_batch([prompts[i] for i in rows], pad_id=subject.chat.pad_id, device=subject.device)
        with capture(subject, Where.of(batch), **asked) as trace:
            forward(subject, batch, use_cache=False, body=True)
        for name in read:
            for layer in layers:
                whole[name][rows, layer] = getattr(trace, name)[layer]
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
    weight, device = next(module.parameters()), device_of(module)
    n_heads, d_head = subject.geometry.n_heads, subject.geometry.d_head
    blocks = torch.zeros(*z.shape[:-2], n_heads, n_heads, d_head, dtype=weight.dtype, device=device)
    for head in range(n_heads):
        blocks[..., head, head, :] = z[..., head, :].to(device, weight.dtype)
    flat = blocks.reshape(1, -1, n_heads * d_head)  # projections see [batch, pos, width]
    bias = module(torch.zeros_like(flat[:, :1]))
    return (module(flat) - bias).reshape(*z.shape[:-1], -1).float()


def head_contribution(subject: Subject, head: HeadIndex, z: Float[Tensor, " d_head"]) -> Float[Tensor, " d_model"]:
    """One head's contribution, W_O[l][:, h] @ z with the adapter's share."""
    subject.geometry.check_head(head)
    full = torch.zeros(subject.geometry.n_heads, subject.geometry.d_head)
    full[head.head] = z
    return contributions(subject, head.layer, full)[head.head]
