"""The only file that registers a hook: `capture` reads, `edited` writes, both inside a `with`.

Sites are read and written where they enter or leave a module: a head's `z` is a slice of the *input* of the attention
output projection, "attention" is that projection's output, "mlp" the MLP's output. Positions are columns of the padded
batch. They are resolved once, from the batch or from what the caller passed to `generate` (mask, else full length), and
a forward pass knows its place in the sequence from the length of the cache it was handed. Nothing is inferred from the
length of a forward pass: chunked prefill splits the prompt and generation without a cache resends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.chat import Batch
from bkdattr.errors import BkdattrError
from bkdattr.model import Subject

Scope = Literal["last_prompt", "trigger_span", "answer", "all"]
SCOPES: tuple[str, ...] = ("last_prompt", "trigger_span", "answer", "all")


# ------------------------------------------------------------------------------------------------ edits are values
@dataclass(frozen=True)
class Site:
    """A place in one layer: a head's z (`head` given), or the output of "attention" or "mlp"."""

    layer: int
    kind: Literal["head", "attention", "mlp"]
    head: int | None = None

    @classmethod
    def of_head(cls, head: HeadIndex) -> Site:
        return cls(head.layer, "head", head.head)

    def __str__(self) -> str:
        return str(HeadIndex(self.layer, self.head)) if self.head is not None else f"L{self.layer} {self.kind}"


@dataclass(frozen=True, eq=False)
class SetSite:
    """Patch: the site becomes `value`, [width] for every row or [batch, width] row by row."""

    site: Site
    value: Float[Tensor, "*batch width"]
    scope: Scope = "last_prompt"

    def apply(self, x: Tensor) -> Tensor:
        value = self.value.to(x.device, x.dtype)
        return value.expand_as(x) if value.ndim == 1 else value[:, None].expand_as(x)


@dataclass(frozen=True)
class ScaleSite:
    """The site is multiplied by `factor`; 0 is zero ablation."""

    site: Site
    factor: float = 0.0
    scope: Scope = "last_prompt"

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclass(frozen=True, eq=False)
class AddVector:
    """`strength * vector` is added to an attention or MLP output."""

    site: Site
    vector: Float[Tensor, " d_model"]
    strength: float = 1.0
    scope: Scope = "last_prompt"

    def apply(self, x: Tensor) -> Tensor:
        return x + (self.strength * self.vector).to(x.device, x.dtype)


Edit = SetSite | ScaleSite | AddVector


def edits_key(edits: Sequence[Edit]) -> str:
    """Equal for equal edits: the key under which an evaluation is cached."""
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(f"{type(edit).__name__}{edit.site}{edit.scope}".encode())
        for name in ("value", "vector", "factor", "strength"):
            part = getattr(edit, name, None)
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

    @classmethod
    def of(cls, batch: Batch, trigger_tokens: Sequence[Sequence[int]] | None = None) -> Where:
        """`trigger_tokens` are indices into each row's prompt ids (`ChatFormat.span_tokens`)."""
        mask = None
        if trigger_tokens is not None:
            mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            for row, tokens in enumerate(trigger_tokens):
                mask[row, [int(batch.starts[row]) + t for t in tokens]] = True
        return cls(batch.last_prompt.cpu(), batch.starts.cpu(), mask)

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
        if scope == "answer":
            return columns > self.last_prompt[:, None]
        if scope == "all":
            return columns >= self.starts[:, None]
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
        trigger = None if self.trigger is None else self.trigger.repeat_interleave(times, 0)
        return Where(self.last_prompt.repeat_interleave(times), self.starts.repeat_interleave(times), trigger)


@dataclass
class _Call:
    """The place of the forward pass that runs now. `given` is the batch's or the running `generate` call's positions."""

    given: Where | None
    where: Where | None = None
    offset: int = 0
    width: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict)

    def before_body(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if ids is None:
            ids = args[0]
        past = kwargs.get("past_key_values")
        self.offset = int(past.get_seq_length()) if past is not None else 0
        self.width = ids.shape[1]
        self.masks = {}
        if self.given is not None:
            self.where = self.given.repeated(ids.shape[0])
        elif self.offset == 0:  # a bare forward pass of the user's is a prompt of its own
            self.where = Where.of_inputs(ids.shape[0], ids.shape[1], kwargs.get("attention_mask"))
        elif self.where is None:
            raise BkdattrError(
                "a forward pass continues a cache that was filled outside this context, so the prompt's end is unknown; "
                "run the prompt inside the context, or use generate"
            )

    def mask(self, scope: Scope) -> Tensor:
        if scope not in self.masks:
            assert self.where is not None
            self.masks[scope] = self.where.select(scope, self.offset, self.width)
        return self.masks[scope]


def _body(subject: Subject) -> Any:
    """The module that owns the decoder layers: called once per forward pass, with the cache among its arguments."""
    return subject.causal_lm.get_submodule(subject.architecture.layers.rpartition(".")[0])


def _resolve_generate(call: _Call, subject: Subject, stack: ExitStack) -> None:
    """Inside the context, `generate` on the user's own model tells `call` the positions of what it was passed."""
    causal_lm = subject.causal_lm
    before = causal_lm.__dict__.get("generate")
    plain = causal_lm.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        inputs = next((kwargs[k] for k in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
        inputs = args[0] if inputs is None and args else inputs
        if inputs is None:
            raise BkdattrError("generate under an edit needs its prompt: pass input_ids (and attention_mask if padded)")
        outer = call.given
        call.given = Where.of_inputs(inputs.shape[0], inputs.shape[1], kwargs.get("attention_mask"))
        try:
            return plain(*args, **kwargs)
        finally:
            call.given = outer

    def restore() -> None:
        if before is None:
            del causal_lm.generate
        else:
            causal_lm.generate = before

    causal_lm.generate = generate
    stack.callback(restore)


# ------------------------------------------------------------------------------------------------ writing
@contextmanager
def edited(subject: Subject, edits: Sequence[Edit], where: Where | None = None) -> Iterator[None]:
    """Run with `edits` in force. Without `where`, positions come from the user's own `generate` call or forward pass.

    Several edits of one site apply in order. Raises `BkdattrError` for a site out of range, a value of the wrong width, a
    module in training mode, and on leaving where an edit was never hit. Leaves no hook behind, also by exception.
    """
    subject.check_eval()
    for edit in edits:
        _check_edit(subject, edit)
    call = _Call(given=where)
    hits = [0] * len(edits)
    geometry = subject.geometry
    before: dict[int, list[int]] = {}
    behind: dict[tuple[int, str], list[int]] = {}
    for i, edit in enumerate(edits):
        if edit.site.kind == "head":
            before.setdefault(edit.site.layer, []).append(i)
        else:
            behind.setdefault((edit.site.layer, edit.site.kind), []).append(i)

    def write(indices: list[int], x: Tensor, n_parts: int) -> Tensor | None:
        changed = None
        for i in indices:
            edit, mask = edits[i], call.mask(edits[i].scope)
            n = int(mask.sum())
            if n == 0:
                continue
            hits[i] += n
            if changed is None:
                changed = x.clone().view(*mask.shape, n_parts, -1)
            part = changed[:, :, edit.site.head or 0]
            changed[:, :, edit.site.head or 0] = torch.where(mask.to(x.device)[..., None], edit.apply(part), part)
        return None if changed is None else changed.view(x.shape)

    def z_hook(indices: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...]) -> Any:
            z = write(indices, args[0], geometry.n_heads)
            return None if z is None else (z, *args[1:])

        return hook

    def output_hook(indices: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            x = write(indices, output[0] if isinstance(output, tuple) else output, 1)
            return None if x is None else ((x, *output[1:]) if isinstance(output, tuple) else x)

        return hook

    with ExitStack() as stack:
        if edits:
            handle = _body(subject).register_forward_pre_hook(call.before_body, with_kwargs=True)
            stack.callback(handle.remove)
            for layer, indices in before.items():
                stack.callback(subject.sites[layer].out_proj.register_forward_pre_hook(z_hook(indices)).remove)
            for (layer, kind), indices in behind.items():
                module = subject.sites[layer].out_proj if kind == "attention" else subject.sites[layer].mlp
                stack.callback(module.register_forward_hook(output_hook(indices)).remove)
            if where is None:
                _resolve_generate(call, subject, stack)
        yield
    missed = [e for e, n in zip(edits, hits, strict=True) if n == 0]
    if missed:
        raise BkdattrError(
            f"{len(missed)} of {len(edits)} edits were never hit, first {type(missed[0]).__name__} at {missed[0].site} "
            f"(scope {missed[0].scope}): no forward pass inside the context reached that position"
        )


def _check_edit(subject: Subject, edit: Edit) -> None:
    geometry, site = subject.geometry, edit.site
    if edit.scope not in SCOPES:
        raise BkdattrError(f"scope {edit.scope!r}: expected one of {', '.join(SCOPES)}")
    geometry.check_layer(site.layer)
    if site.kind == "head":
        geometry.check_head(HeadIndex(site.layer, -1 if site.head is None else site.head))
        if isinstance(edit, AddVector):
            raise BkdattrError(f"AddVector writes to an attention or MLP output, not to the head {site}")
    width = geometry.d_head if site.kind == "head" else geometry.d_model
    value = getattr(edit, "value", getattr(edit, "vector", None))
    if value is not None and value.shape[-1] != width:
        raise BkdattrError(f"{type(edit).__name__} at {site}: got a value of width {value.shape[-1]}, expected {width}")


# ------------------------------------------------------------------------------------------------ reading
@dataclass(eq=False)
class Trace:
    """What `capture` read at the last prompt token, filled as the forward pass runs (fp32, on the CPU)."""

    z: dict[int, Float[Tensor, "batch head d_head"]] = field(default_factory=dict)
    resid_post: dict[int, Float[Tensor, "batch d_model"]] = field(default_factory=dict)


@contextmanager
def capture(subject: Subject, where: Where, *, z: Sequence[int] = (), resid_post: Sequence[int] = ()) -> Iterator[Trace]:
    """Read head z and layer outputs of the named layers at each row's last prompt token."""
    subject.check_eval()
    for layer in (*z, *resid_post):
        subject.geometry.check_layer(layer)
    trace, call, geometry = Trace(), _Call(given=where), subject.geometry

    def read(x: Tensor) -> Tensor | None:
        rows, columns = call.mask("last_prompt").nonzero(as_tuple=True)
        if len(rows) == 0:
            return None
        return x[rows.to(x.device), columns.to(x.device)].detach().float().cpu()

    def z_hook(layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            x = read(args[0])
            if x is not None:
                trace.z[layer] = x.view(len(x), geometry.n_heads, geometry.d_head)

        return hook

    def resid_hook(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            x = read(output[0] if isinstance(output, tuple) else output)
            if x is not None:
                trace.resid_post[layer] = x

        return hook

    with ExitStack() as stack:
        stack.callback(_body(subject).register_forward_pre_hook(call.before_body, with_kwargs=True).remove)
        for layer in z:
            stack.callback(subject.sites[layer].out_proj.register_forward_pre_hook(z_hook(layer)).remove)
        for layer in resid_post:
            stack.callback(subject.sites[layer].layer.register_forward_hook(resid_hook(layer)).remove)
        yield trace
