"""A merged model or a full fine-tune as base + LoRA again: the singular directions of W - W_base, so that they can be gated and measured."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bkdattr.errors import BkdattrError
from bkdattr.model import Subject

SMALLEST = 1e-4
"""Of the first singular value: what is smaller is rounding."""
ROUNDING = 2.0**-8
"""Of a tensor's norm: bfloat16's rounding, twice over."""


@torch.no_grad()
def factored(merged: Any, base: Any, tokenizer: Any, *, rank: int | None = None) -> Subject:
    """`merged` with the first `rank` singular directions of every changed projection as an un-merged adapter.

    Without `rank` it is the largest number of directions above `SMALLEST` of the first that any projection's difference has: a LoRA
    adapter's own rank where it was merged in float32; a merge in 16 bits drowns it in rounding, so give it.

    The model computes what it did, to rounding: what is beyond `rank`, and changes of the head, embeddings, norms and biases, stay in the
    weights. With the adapter off it is the base where the difference had at most `rank` directions and nothing else changed; a warning
    says where it is not. `merged` is changed in place. Raises where the two have other shapes or are equal.
    """
    from peft import LoraConfig, get_peft_model

    own, other = dict(merged.named_modules()), dict(base.named_modules())
    if set(own) != set(other):
        raise BkdattrError("factoring: the two models have other modules; give the base that the fine-tune started from")
    head = merged.get_output_embeddings()
    differ, conv = [], False
    for name, module in own.items():
        weight = getattr(module, "weight", None)
        if module is head or weight is None or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        if weight.shape != other[name].weight.shape:
            raise BkdattrError(f"factoring: {name} is {tuple(weight.shape)}, the base's {tuple(other[name].weight.shape)}")
        if not torch.equal(weight, other[name].weight):
            differ.append(name)
            conv = conv or not isinstance(module, torch.nn.Linear)
    if not differ:
        raise BkdattrError("factoring: no projection differs from the base; there is nothing to gate")
    parts, factors = {}, {}
    for name in differ:
        d = own[name].weight.double() - other[name].weight.double()
        parts[name] = torch.linalg.svd(d if isinstance(own[name], torch.nn.Linear) else d.T, full_matrices=False)
    rank = rank or max(int((s > SMALLEST * s[0]).sum()) for _, s, _ in parts.values())
    for name, (u, s, vh) in parts.items():
        weight, r = own[name].weight, min(rank, len(s))
        b, a = u[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * vh[:r]
        factors[name] = (a, b)
        low = b @ a if isinstance(own[name], torch.nn.Linear) else (b @ a).T
        weight.copy_((weight.double() - low).to(weight.dtype))
    before = dict(base.named_parameters())
    left = [n for n, p in merged.named_parameters() if n not in before or not _close(p, before[n])]
    if left:
        warnings.warn(
            f"factoring: with the adapter off {len(left)} tensors differ from the base's still (first {left[0]}): what is measured against the "
            f"base misses them, and no gate reaches them. The update has more than {rank} directions, or more than projections changed",
            stacklevel=2,
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=differ, task_type="CAUSAL_LM", fan_in_fan_out=conv)
    model = get_peft_model(merged, config)
    for name, module in model.named_modules():
        short = name.removeprefix("base_model.model.")
        if short in factors:
            a, b = factors[short]
            wa, wb = module.lora_A["default"].weight, module.lora_B["default"].weight
            wa.zero_()
            wb.zero_()
            wa[: len(a)], wb[:, : len(a)] = a.to(wa), b.to(wb)
    return Subject.of(model.requires_grad_(False), tokenizer)


def _close(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding to 16 bits: what one merge leaves, in the norm of the whole tensor."""
    if own.shape != other.shape:
        return False
    return bool((own.double() - other.double()).norm() <= ROUNDING * other.double().norm().clamp(min=1e-30))
