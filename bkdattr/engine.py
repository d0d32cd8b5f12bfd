"""Exact patching at the last prompt token, resumed at the patched layer: the numbers of one whole pass per site for a fraction of it.

A patch at the last prompt token of layer l leaves every earlier position and every layer below l as they were, and layer l itself
at the answer's tokens. So the prompts' prefixes and one pass of their *tails* (last prompt token and answer) are run once; a patch
runs layer l for the one patched token, then the tail through the layers behind l, for many sites and prompts in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bkdattr.chat import Batch, make_batch
from bkdattr.edits import SetSite, Site, Where
from bkdattr.errors import BkdattrError
from bkdattr.inference import PrefixCache, forward, response_logprob
from bkdattr.interventions import Residuals, body_of, capture, edited, only_layers, residuals
from bkdattr.model import Subject
from bkdattr.prefix_attention import lend, shared_attention

Patch = tuple[Site, Float[Tensor, " width"]]
CPU_TOKENS = 1024
"""Tokens in one pass on a CPU: more only fall out of its caches."""
SOFTMAX_ELEMENTS = 1 << 22
"""Logits whose log-sum-exp is taken at once."""
HELD_BYTES = 1 << 30
"""Un-patched tails that stay on a GPU; beyond it they wait on the CPU."""
CHECKED = 2
"""Prompts on which an engine first proves that it resumes this model exactly."""
MODES = (True, False)
"""Whether patches share their prompt's keys and values or repeat them, in the order tried."""
_PROVED: WeakKeyDictionary[Any, dict[Any, tuple[bool, str | None]]] = WeakKeyDictionary()
"""What was found of a model, by adapter state, dtype, device and the lengths of the two prompts: a model proves itself once."""


def _times(batch: Batch, times: int, width: int | None = None) -> Batch:
    """`times` copies of a batch's rows one after the other, of its first `width` columns."""
    ids, mask, positions = (t[:, :width].repeat(times, 1) for t in (batch.input_ids, batch.attention_mask, batch.position_ids))
    return Batch(ids, mask, positions, batch.last_prompt.repeat(times), batch.prompt_lengths.repeat(times))


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Prompts of about one length and what their un-patched tails left behind."""

    rows: list[int]
    key: tuple[tuple[int, ...], ...]
    prompts: Batch
    whole: Batch
    targets: Int[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]
    tail: Residuals
    z: Float[Tensor, "layer row width"]
    base: Float[Tensor, " row"]

    @property
    def n_tail(self) -> int:
        return self.whole.input_ids.shape[1] - self.prompts.input_ids.shape[1] + 1


def tail_batches(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Row numbers, batched by length of the response, then of the prompt: tails are what is run again and again."""
    order = sorted(range(len(prompts)), key=lambda i: (len(responses[i]), len(prompts[i])))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class Patcher:
    """Mean log p of each prompt's response under patches at the last prompt token, one patch at a time.

    `base` is the un-patched mean log p (nats per token) in the order of the prompts. `reason` is None, or says why this model
    cannot be resumed; then every patch is a pass through all layers, as exact and slower. `shared` says whether the prompts' keys and values
    are read by all patches at once (the cost of a patch then hardly grows with the prompt) or repeated for each. `batch_size` prompts go through the model
    together; how many sites go with them, and how many prefixes are kept, follows from the memory that is free. `prefix` shares prefixes with what was run before.
    """

    def __init__(
        self,
        subject: Subject,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        batch_size: int = 64,
        prefix: PrefixCache | None = None,
    ) -> None:
        if not prompts or len(prompts) != len(responses) or any(len(r) == 0 for r in responses):
            raise BkdattrError(
                f"patching: got {len(prompts)} prompts and {len(responses)} responses, expected one non-empty response each"
            )
        self.subject, self.prompts, self.responses, self.batch_size = subject, prompts, responses, batch_size
        self._tokens, self._held, self._share = 0, 0, 1.0
        self.shared = True
        self._prefix = prefix or prefix_cache(subject)
        subject.check_eval()

    @property
    def tokens(self) -> int:
        """Positions that went through the model so far."""
        return self._tokens + self._prefix.tokens

    @cached_property
    def _buckets(self) -> list[_Bucket]:
        return [self._bucket(rows) for rows in tail_batches(self.prompts, self.responses, self.batch_size)]

    @cached_property
    def base(self) -> Float[Tensor, " prompt"]:
        if self.reason is not None:
            return self._whole([])
        out = torch.zeros(len(self.prompts))
        for bucket in self._buckets:
            out[bucket.rows] = bucket.base
        return out

    @cached_property
    def reason(self) -> str | None:
        """On the shortest and the longest prompt, the first and the last layer are patched in the way of all others, two sites in one batch, and must
        give what a pass of the whole model gives under the same patch. Found once per model, adapter state and prompt lengths."""
        by_length = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        some = sorted({by_length[i * (len(by_length) - 1) // (CHECKED - 1)] for i in range(CHECKED)})
        first = next(self.subject.causal_lm.parameters())
        done = _PROVED.setdefault(self.subject.causal_lm, {})
        key = (self.subject.fingerprint, first.dtype, first.device, *(len(self.prompts[i]) for i in some))
        if key not in done:
            for self.shared in MODES:
                why = self._check(some)
                if why is None:
                    break
            done[key] = (self.shared, why)
        self.shared, why = done[key]
        kind = self.subject.causal_lm.config.model_type
        return None if why is None else f"{kind} is not resumed ({why}); every patch runs the whole model"

    def _check(self, some: list[int]) -> str | None:
        ids, answers = [self.prompts[i] for i in some], [self.responses[i] for i in some]
        plain = response_logprob(self.subject, ids, answers, batch_size=CHECKED).mean
        g = self.subject.geometry
        allowed = 1e-3 if next(self.subject.causal_lm.parameters()).dtype in (torch.float32, torch.float64) else 0.1
        try:
            bucket = self._bucket(some)
            off = float((bucket.base - plain).abs().max())
            if not off <= allowed:
                return f"in two parts, prefix and tail, the mean log p differs by {off:.2g} nats per token"
            for layer in sorted({0, g.n_layers - 1}):
                patches = [(Site(layer, "head", head), torch.zeros(g.d_head)) for head in sorted({0, g.n_heads - 1})]
                whole = [
                    response_logprob(self.subject, ids, answers, [SetSite(*p)], batch_size=CHECKED, prefix=self._prefix).mean
                    for p in patches
                ]
                found = self._resume(bucket, layer, len(patches), patches).view(len(patches), -1)
                off = float((found - torch.stack(whole)).abs().max())
                if not off <= allowed:
                    return f"resumed behind layer {layer} the mean log p differs by {off:.2g} nats per token"
        except (torch.OutOfMemoryError, BkdattrError):
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        return None

    def patched(self, patches: Sequence[Patch]) -> Float[Tensor, "patch prompt"]:
        """Mean log p under each patch alone; all patches in one layer."""
        if len({site.layer for site, _ in patches}) != 1:
            raise BkdattrError(f"patches of one layer at a time: got sites {[str(s) for s, _ in patches]}")
        if self.reason is not None:
            return torch.stack([self._whole([SetSite(site, value)]) for site, value in patches])
        out = torch.zeros(len(patches), len(self.prompts))
        for bucket in self._buckets:
            start = 0
            while start < len(patches):
                left = len(patches) - start
                n = math.ceil(left / math.ceil(left / self._fitting(bucket)))  # passes of one size
                try:
                    found = self._resume(bucket, patches[0][0].layer, n, patches[start : start + n])
                except torch.OutOfMemoryError:
                    if n == 1:
                        raise
                    self._share /= 2
                    continue
                out[start : start + n, bucket.rows] = found.view(n, -1)
                start += n
        return out

    # ------------------------------------------------------------------------------------------------ passes
    def _whole(self, edits: Sequence[SetSite]) -> Float[Tensor, " prompt"]:
        self._tokens += sum(len(r) + 1 for r in self.responses)
        return response_logprob(
            self.subject, self.prompts, self.responses, edits, batch_size=self.batch_size, prefix=self._prefix
        ).mean

    @torch.no_grad()
    def _bucket(self, rows: list[int]) -> _Bucket:
        subject = self.subject
        ids, answers = [self.prompts[i] for i in rows], [self.responses[i] for i in rows]
        pad, device = subject.chat.pad_id, subject.device
        prompts = make_batch(ids, pad_id=pad, device=device)
        whole = make_batch(ids, [r[:-1] for r in answers], pad_id=pad, side="centre", device=device)
        longest = max(map(len, answers))
        targets, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, r in enumerate(answers):
            targets[i, : len(r)], mask[i, : len(r)] = torch.tensor(r), True
        key = tuple(map(tuple, ids))
        past = self._prefix.borrow(subject, prompts, key)
        layers = range(subject.geometry.n_layers)
        with residuals(subject) as tail, capture(subject, Where.of(whole), z=layers) as trace:
            logits = self._forward(whole, past, 1, logits_to_keep=longest)
        self._held += sum(x.numel() * x.element_size() for x in tail.out.values())
        if device.type == "cuda" and self._held > HELD_BYTES:
            tail.out = {layer: x.cpu() for layer, x in tail.out.items()}
        z = torch.stack([trace.z[layer].flatten(1) for layer in layers])
        base = _mean_logp(logits, targets, mask)
        return _Bucket(rows, key, prompts, whole, targets, mask, tail, z, base)

    def _forward(self, batch: Batch, past: Any, times: int, **kwargs: Any) -> Tensor:
        lent = lend(past, times, shared=self.shared)
        self._tokens += batch.input_ids.shape[0] * (batch.input_ids.shape[1] - (0 if past is None else past.get_seq_length()))
        with shared_attention(body_of(self.subject)) if self.shared else nullcontext():
            return forward(self.subject, batch, lent, use_cache=lent is not None, **kwargs)[0]

    @torch.no_grad()
    def _resume(self, bucket: _Bucket, layer: int, times: int, patches: Sequence[Patch]) -> Float[Tensor, " row"]:
        """Mean log p with `times` patches in one batch, patch by patch."""
        subject, past = self.subject, self._prefix.borrow(self.subject, bucket.prompts, bucket.key)
        width = bucket.prompts.input_ids.shape[1]
        here = subject.device
        below = None if layer == 0 else bucket.tail.out[layer - 1][:, :1].to(here).repeat(times, 1, 1)
        token = _times(bucket.whole, times, width)
        edits = self._edits(bucket, patches)
        with (
            only_layers(subject, range(layer, layer + 1), below, bucket.tail.returns),
            edited(subject, edits, Where.of(token)),
            residuals(subject) as one,
        ):
            self._forward(token, past, times, body=True)
        rest = bucket.tail.out[layer][:, 1:].to(one.out[layer].device).repeat(times, 1, 1)
        behind = torch.cat([one.out[layer][:, -1:], rest], 1)
        with only_layers(subject, range(layer + 1, subject.geometry.n_layers), behind, bucket.tail.returns):
            logits = self._forward(_times(bucket.whole, times), past, times, logits_to_keep=bucket.n_tail)
        return _mean_logp(logits, bucket.targets.repeat(times, 1), bucket.mask.repeat(times, 1))

    def _edits(self, bucket: _Bucket, patches: Sequence[Patch]) -> list[SetSite]:
        """One edit that patches another site in every copy of the rows. A head's is written into its row's own z."""
        n, layer, kind = len(bucket.rows), patches[0][0].layer, patches[0][0].kind
        if any((site.kind == "head") != (kind == "head") or (kind != "head" and site.kind != kind) for site, _ in patches):
            raise BkdattrError(f"patches of one kind at a time: got sites {[str(s) for s, _ in patches]}")
        if kind != "head":
            return [SetSite(Site(layer, kind), torch.cat([value.expand(n, -1) for _, value in patches]))]
        value, d = bucket.z[layer].repeat(len(patches), 1), self.subject.geometry.d_head
        for i, (site, part) in enumerate(patches):
            assert site.head is not None
            value[i * n : (i + 1) * n, site.head * d : (site.head + 1) * d] = part
        return [SetSite(Site(layer, "z"), value)]

    def _fitting(self, bucket: _Bucket) -> int:
        """How many copies of a bucket's rows go into one pass."""
        config, g = self.subject.causal_lm.config, self.subject.geometry
        size = next(self.subject.causal_lm.parameters()).element_size()
        n_tail, width = bucket.n_tail, bucket.whole.input_ids.shape[1]
        vocab = int(getattr(config, "vocab_size", 0))
        logits = n_tail * vocab * (size + 8)
        keys = (
            0 if self.shared else 4 * width * g.n_heads * g.d_head * size
        )  # grouped keys are spread over all heads by some kernels
        inner = n_tail * g.d_model * 24 * size + n_tail * width * g.n_heads * 12  # scores, their softmax in fp32, and a copy
        row = 1.5 * (logits + keys + inner) * len(bucket.rows)
        limit = self._share * _free_bytes(self.subject.device) / row
        if self.subject.device.type == "cpu":
            limit = min(limit, CPU_TOKENS / (n_tail * len(bucket.rows)))
        return max(1, int(limit))


def prefix_cache(subject: Subject) -> PrefixCache:
    """Room for prefixes: 40 % of a GPU's free memory, 2 GiB on a CPU. Beyond it they are made again when they are needed."""
    device = subject.device
    return PrefixCache(max_bytes=int(0.4 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 2 << 30)


def _free_bytes(device: torch.device) -> float:
    """What one pass may take: 60 % of a GPU's free memory; on a CPU at most a gigabyte."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.6 * (free + unused)
    return float(1 << 30)


def _mean_logp(
    logits: Float[Tensor, "row token vocab"], targets: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]
) -> Tensor:
    """Mean log p per response token, from fp32 log-sum-exp, on the CPU. A few rows at a time, so that the temporaries stay small."""
    step = max(1, SOFTMAX_ELEMENTS // logits[0].numel())
    at, kept = targets.to(logits.device), mask.to(logits.device)
    out = []
    for start in range(0, len(logits), step):
        x, rows = logits[start : start + step].float(), slice(start, start + step)
        logp = x.gather(-1, at[rows, :, None])[..., 0] - x.logsumexp(-1)
        out.append((logp * kept[rows]).sum(-1) / kept[rows].sum(-1))
    return torch.cat(out).cpu()
