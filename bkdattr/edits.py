"""What is written, and where: sites, scopes, edits and the columns that a scope covers. Plain values; `interventions.py` acts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.chat import Batch
from bkdattr.errors import BkdattrError

Scope = Literal["last_prompt", "trigger_span", "answer", "all"]
SCOPES: tuple[str, ...] = ("last_prompt", "trigger_span", "answer", "all")


# ------------------------------------------------------------------------------------------------ edits are values
@dataclass(frozen=True)
class Site:
    """A place in one layer: a head's z (`head` given), "z" of all heads side by side, or the output of "attention" or "mlp"."""

    layer: int
    kind: Literal["head", "z", "attention", "mlp"]
    head: int | None = None

    @classmethod
    def of_head(cls, head: HeadIndex) -> Site:
        return cls(head.layer, "head", head.head)

    def __str__(self) -> str:
        return str(HeadIndex(self.layer, self.head)) if self.head is not None else f"L{self.layer} {self.kind}"


@dataclass(frozen=True, eq=False)
class Condition:
    """Fires for a prompt where `weight @ resid_post[layer] + bias > 0` at its last prompt token: a linear probe. An edit
    with `when` acts on those prompts alone; its site must lie in a later layer."""

    layer: int
    weight: Float[Tensor, " d_model"]
    bias: float

    def fires(self, resid: Float[Tensor, "row d_model"]) -> Bool[Tensor, " row"]:
        return resid.float() @ self.weight.to(resid.device).float() + self.bias > 0


@dataclass(frozen=True, eq=False)
class SetSite:
    """Patch: the site becomes `value`, [width] for every row or [batch, width] row by row."""

    site: Site
    value: Float[Tensor, "*batch width"]
    scope: Scope = "last_prompt"
    when: Condition | None = None

    def apply(self, x: Tensor) -> Tensor:
        value = self.value.to(x.device, x.dtype)
        return value.expand_as(x) if value.ndim == 1 else value[:, None].expand_as(x)


@dataclass(frozen=True)
class ScaleSite:
    """The site is multiplied by `factor`; 0 is zero ablation."""

    site: Site
    factor: float = 0.0
    scope: Scope = "last_prompt"
    when: Condition | None = None

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclass(frozen=True, eq=False)
class BlendSite:
    """The site becomes `keep * x + (1 - keep) * value`: a soft ablation, differentiable in `keep` (and `value`). `keep` is
    [width] for every row or [batch, width] row by row."""

    site: Site
    value: Float[Tensor, " width"]
    keep: Float[Tensor, "*batch width"]
    scope: Scope = "last_prompt"
    when: Condition | None = None

    def apply(self, x: Tensor) -> Tensor:
        keep, value = self.keep.to(x.device, x.dtype), self.value.to(x.device, x.dtype)
        keep = keep if keep.ndim == 1 else keep[:, None]
        return keep * x + (1 - keep) * value


@dataclass(frozen=True, eq=False)
class AddVector:
    """`strength * vector` is added to an attention or MLP output."""

    site: Site
    vector: Float[Tensor, " d_model"]
    strength: float = 1.0
    scope: Scope = "last_prompt"
    when: Condition | None = None

    def apply(self, x: Tensor) -> Tensor:
        return x + (self.strength * self.vector).to(x.device, x.dtype)


Edit = SetSite | ScaleSite | BlendSite | AddVector


def edits_key(edits: Sequence[Edit]) -> str:
    """Equal for equal edits: the key under which an evaluation is cached."""
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(f"{type(edit).__name__}{edit.site}{edit.scope}".encode())
        when = edit.when
        parts = [getattr(edit, name, None) for name in ("value", "keep", "vector", "factor", "strength")]
        for part in parts + ([when.layer, when.weight, when.bias] if when else []):
            if isinstance(part, Tensor):
                digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
            else:
                digest.update(repr(part).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ positions
@dataclass(frozen=True, eq=False)
class Where:
    """Columns of a padded batch: the last prompt token, the first real token and, where needed, the trigger's tokens."""

    last_prompt: Int[Tensor, " batch"]
    starts: Int[Tensor, " batch"]
    trigger: Bool[Tensor, "batch pos"] | None = None
    ends: Int[Tensor, " batch"] | None = None

    @classmethod
    def of(cls, batch: Batch, trigger_tokens: Sequence[Sequence[int]] | None = None, *, closed: bool = False) -> Where:
        """`trigger_tokens` are indices into each row's prompt ids (`ChatFormat.span_tokens`). `closed`: the batch holds
        whole answers, so that "answer" and "all" stop at each row's last real token (padding is not read)."""
        mask = None
        if trigger_tokens is not None:
            mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            for row, tokens in enumerate(trigger_tokens):
                mask[row, [int(batch.starts[row]) + t for t in tokens]] = True
        ends = batch.starts.cpu() + batch.attention_mask.cpu().sum(-1) - 1 if closed else None
        return cls(batch.last_prompt.cpu(), batch.starts.cpu(), mask, ends)

    @classmethod
    def of_inputs(cls, rows: int, width: int, attention_mask: Tensor | None) -> Where:
        """From what a caller passed: the mask's first and last real token, or the full length."""
        if attention_mask is None or attention_mask.ndim != 2:
            return cls(torch.full((rows,), width - 1), torch.zeros(rows, dtype=torch.long))
        mask = attention_mask.detach().cpu().bool()
        columns = torch.arange(mask.shape[1]).expand_as(mask)
        last = columns.masked_fill(~mask, -1).amax(-1)
        return cls(last, columns.masked_fill(~mask, mask.shape[1]).amin(-1))

    def select(self, scope: Scope, offset: int, width: int) -> Bool[Tensor, "batch width"]:
        """Which of the columns `offset .. offset + width` a scope covers."""
        columns = torch.arange(offset, offset + width)[None]
        if scope == "last_prompt":
            return columns == self.last_prompt[:, None]
        open_end = True if self.ends is None else columns <= self.ends[:, None]
        if scope == "answer":
            return (columns > self.last_prompt[:, None]) & open_end
        if scope == "all":
            return (columns >= self.starts[:, None]) & open_end
        if self.trigger is None:
            raise BkdattrError("scope 'trigger_span' needs the trigger's tokens, and these prompts carry none")
        out = torch.zeros((len(self.trigger), width), dtype=torch.bool)
        part = self.trigger[:, offset : offset + width]
        out[:, : part.shape[1]] = part
        return out

    def repeated(self, rows: int) -> Where:
        """For beams and returned sequences: each prompt's row stands `rows / batch` times in a row."""
        n = len(self.last_prompt)
        if rows == n:
            return self
        if rows % n:
            raise BkdattrError(f"a forward pass of {rows} rows does not match the {n} prompts passed to generate")
        times = rows // n
        more = [None if t is None else t.repeat_interleave(times, 0) for t in (self.trigger, self.ends)]
        return Where(self.last_prompt.repeat_interleave(times), self.starts.repeat_interleave(times), *more)
