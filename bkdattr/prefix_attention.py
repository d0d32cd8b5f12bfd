"""Many tails behind one prefix: a cached prompt lent to copies of its rows, without copying it for each.

`lend` gives a cache whose layers keep nothing. `shared=True` needs the model to call its attention through transformers' registry
(`shared_attention` puts ours in its place): prefix scores are then one product per prompt for all copies, and what a pass copies does not
grow with the prompt. Otherwise keys and values are repeated for every copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

NAME = "bkdattr_shared_prefix"


def lend(cache: Any, times: int, *, shared: bool) -> Any:
    """A prefix for passes of `times` copies of its rows, one after the other."""
    if cache is None:
        return None

    def lent(layer: Any) -> Any:
        plain = type(layer) is DynamicLayer and layer.keys is not None

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if plain and shared:
                keys._prefix = (layer.keys, layer.values)  # type: ignore[attr-defined]  # read by `_attention`
                return keys, values
            if plain:  # repeated and joined in one copy
                return tuple(_joined(old, new, times) for old, new in ((layer.keys, keys), (layer.values, values)))
            whole = copy.copy(layer)
            whole.keys, whole.values = (x.repeat(times, 1, 1, 1) for x in (layer.keys, layer.values))
            return whole.update(keys, values, *args, **kwargs)

        out = copy.copy(layer)  # its own class, which some caches and masks look at
        out.update = update
        return out

    out = copy.copy(cache)
    out.layers = [lent(layer) for layer in cache.layers]
    return out


def _joined(prefix: Tensor, tail: Tensor, times: int) -> Tensor:
    """[row, head, pos, d] of a prefix, `times` over, with the tails behind."""
    own = tail.view(times, -1, *tail.shape[1:])
    return torch.cat([prefix.expand(times, *prefix.shape), own], -2).flatten(0, 1)


@contextmanager
def shared_attention(body: Any) -> Iterator[None]:
    """Inside, `body`'s attention reads a prefix lent with `shared=True`."""
    config, before = body.config, body.config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax over [prefix, tail] with the prefix's keys and values read once for all copies of a row.

    query [copies * row, head, tail, d], key and value [copies * row, kv head, tail, d], prefix [row, kv head, pos, d]; gives
    [copies * row, tail, head, d]. The scores are in the model's dtype, their softmax in fp32, as transformers' eager attention has them.
    """
    prefix = getattr(key, "_prefix", None)
    (b, h, t, d), n_kv = query.shape, key.shape[1]
    g, n = h // n_kv, b if prefix is None else prefix[0].shape[0]
    c = b // n
    q = (query * (d**-0.5 if scaling is None else scaling)).view(c, n, n_kv, g, t, d)
    own = q.flatten(0, 1).flatten(2, 3) @ key.transpose(-1, -2)
    scores = own.view(c, n, n_kv, g, t, -1).permute(1, 2, 0, 3, 4, 5)
    p = 0
    if prefix is not None:
        p = prefix[0].shape[2]
        far = q.permute(1, 2, 0, 3, 4, 5).reshape(n, n_kv, -1, d) @ prefix[0].transpose(-1, -2)
        scores = torch.cat([far.view(n, n_kv, c, g, t, p), scores], -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        mask = attention_mask.expand(b, -1, t, -1).view(c, n, attention_mask.shape[1], t, -1)
        heads = (1, 1) if mask.shape[2] == 1 else (n_kv, g)
        scores = scores + mask.unflatten(2, heads).permute(1, 2, 0, 3, 4, 5)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    near = weights[..., p:].permute(2, 0, 1, 3, 4, 5).reshape(b, n_kv, g * t, -1) @ value
    out = near.view(c, n, n_kv, g, t, -1)
    if prefix is not None:
        far = weights[..., :p].reshape(n, n_kv, -1, p) @ prefix[1]
        out = out + far.view(n, n_kv, c, g, t, -1).permute(2, 0, 1, 3, 4, 5)
    return out.reshape(b, h, t, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
