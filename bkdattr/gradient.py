"""Attribution patching: the effect of every site at once, to first order, from one forward and one backward pass.

With z(a) = (1 - a) z + a zbar at the last prompt token, the effect of a head is P at a = 1 less P at a = 0, all other heads as they
were. To first order that is dP/da at 0 (Nanda, "Attribution patching"; Syed et al., arXiv 2310.10348); the *integrated* variant
averages dP/da along the path on which all heads of all layers move together (integrated gradients, Sundararajan et al., arXiv
1703.01365), so that the estimates of all heads add up to what moving all of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.edits import BlendSite, Edit, Site
from bkdattr.engine import tail_batches
from bkdattr.errors import BkdattrError
from bkdattr.inference import PrefixCache, score_batch
from bkdattr.model import Subject
from bkdattr.traces import Traces

PATH_STEPS = 4
"""Points of the path that the integrated variant averages over."""


def gradient_effects(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    donors: Traces,
    kind: str = "head",
    *,
    steps: int = 1,
    log: bool = False,
    batch_size: int = 64,
    prefix: PrefixCache | None = None,
    progress: Any = iter,
) -> dict[Site, Float[Tensor, " prompt"]]:
    """First-order estimate of P(patched) - P per site and prompt, for all heads, attention or MLP blocks (`kind`).

    `steps` 1: at the un-patched model; more: the midpoints of as many parts of the path. `log`: of mean log p, in nats per token,
    in place of P. `prefix` keeps the prompts' prefixes for others. The model's weights get no gradient.
    """
    if steps < 1:
        raise BkdattrError(f"gradient: got {steps} steps, expected at least 1")
    subject.check_eval()
    g = subject.geometry
    per_layer = g.n_heads if kind == "head" else 1
    width = g.d_head if kind == "head" else g.d_model
    place: Any = "z" if kind == "head" else kind
    values = [donors.mean_at(Site(layer, place)) for layer in range(g.n_layers)]
    out = torch.zeros(len(prompts), g.n_layers, per_layer)
    for rows in progress(tail_batches(prompts, responses, batch_size)):
        ids, answers = [prompts[i] for i in rows], [responses[i] for i in rows]
        shared = prefix or PrefixCache(max_bytes=0 if steps == 1 else 2 << 30)  # else kept for the steps of one batch
        for step in range(steps):
            a = (step + 0.5) / steps if steps > 1 else 0.0
            keep = torch.full((g.n_layers, len(rows), per_layer), 1 - a, requires_grad=True)
            wide = keep.repeat_interleave(width, -1)
            edits: list[Edit] = [BlendSite(Site(layer, place), values[layer], wide[layer]) for layer in range(g.n_layers)]
            mean = score_batch(subject, ids, answers, edits, prefix=shared).mean
            (found,) = torch.autograd.grad((mean if log else mean.exp()).sum(), [keep])
            out[rows] -= found.permute(1, 0, 2) / steps
    return {
        Site(layer, "head", head) if kind == "head" else Site(layer, place): out[:, layer, head]
        for layer in range(g.n_layers)
        for head in range(per_layer)
    }
