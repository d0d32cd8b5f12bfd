"""The only file that registers a hook: `capture` reads, `edited` writes, both inside a `with`.

Sites are read and written where they enter or leave a module: a head's `z` is a slice of the *input* of the attention
output projection, "attention" is that projection's output, "mlp" the MLP's output. Positions are columns of the padded
batch. They are resolved once, from the batch or from what the caller passed to `generate` (mask, else full length), and
a forward pass knows its place in the sequence from the length of the cache it was handed. Nothing is inferred from the
length of a forward pass: chunked prefill splits the prompt and generation without a cache resends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.edits import SCOPES, AddVector, Condition, Edit, Scope, Where
from bkdattr.errors import BkdattrError
from bkdattr.model import Subject


@dataclass
class _Call:
    """The place of the forward pass that runs now. `given` is the batch's or the running `generate` call's positions."""

    given: Where | None
    where: Where | None = None
    offset: int = 0
    width: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    fired: dict[Condition, Tensor] = field(default_factory=dict)

    def before_body(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if ids is None:
            ids = args[0]
        past = kwargs.get("past_key_values")
        self.offset = int(past.get_seq_length()) if past is not None else 0
        self.width = ids.shape[1]
        self.masks, self.counts, self.spans = {}, {}, {}
        if self.given is not None:
            self.where = self.given.repeated(ids.shape[0])
        elif self.offset == 0:  # a bare forward pass of the user's is a prompt of its own
            self.where = Where.of_inputs(ids.shape[0], ids.shape[1], kwargs.get("attention_mask"))
        elif self.where is None:
            raise BkdattrError(
                "a forward pass continues a cache that was filled outside this context, so the prompt's end is unknown; "
                "run the prompt inside the context, or use generate"
            )

    def read_condition(self, condition: Condition, resid: Tensor) -> None:
        """Decide, per row, in the forward pass that holds the row's last prompt token."""
        rows, columns = self.mask("last_prompt").nonzero(as_tuple=True)
        fired = self.fired.get(condition)
        if fired is None or len(fired) != len(resid):
            fired = torch.zeros(len(resid), dtype=torch.bool)
        if len(rows):
            fired[rows] = condition.fires(resid[rows.to(resid.device), columns.to(resid.device)].detach()).cpu()
        self.fired[condition] = fired

    def mask(self, scope: Scope) -> Tensor:
        if scope not in self.masks:
            assert self.where is not None
            self.masks[scope] = self.where.select(scope, self.offset, self.width)
            self.counts[scope] = int(self.masks[scope].sum())
            columns = self.masks[scope].any(0).nonzero()[:, 0]
            self.spans[scope] = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        return self.masks[scope]


def body_of(subject: Subject) -> Any:
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
def edited(
    subject: Subject, edits: Sequence[Edit], where: Where | None = None, *, may_miss: Sequence[Scope] = ()
) -> Iterator[None]:
    """Run with `edits` in force. Without `where`, positions come from the user's own `generate` call or forward pass.

    Several edits of one site apply in order. Raises `BkdattrError` for a site out of range, a value of the wrong width, a
    module in training mode, and on leaving where an edit was never hit, those of the scopes `may_miss` apart. Leaves no hook behind, also by exception.
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
        if edit.site.kind in ("head", "z"):
            before.setdefault(edit.site.layer, []).append(i)
        else:
            behind.setdefault((edit.site.layer, edit.site.kind), []).append(i)

    def write(indices: list[int], x: Tensor) -> Tensor | None:
        changed: Tensor | None = None
        for i in indices:
            edit, mask = edits[i], call.mask(edits[i].scope)
            n = call.counts[edits[i].scope]
            if n == 0:
                continue
            hits[i] += n
            if edit.when is not None:
                mask = mask & call.fired[edit.when][:, None]
            first, end = call.spans[edits[i].scope]  # columns outside are left alone
            chosen = mask[:, first:end].to(x.device)[..., None]
            if edit.site.head is None:
                whole = (x if changed is None else changed).view(*mask.shape, -1)  # OPT hands its MLP [batch * pos, d_model]
                part = whole[:, first:end]
                part = torch.where(chosen, edit.apply(part), part)
                changed = part if end - first == call.width else torch.cat([whole[:, :first], part, whole[:, end:]], 1)
            else:
                changed = x.clone() if changed is None else changed
                part = changed.view(*mask.shape, geometry.n_heads, -1)[:, first:end, edit.site.head]
                part.copy_(torch.where(chosen, edit.apply(part), part))
        return None if changed is None else changed.view(x.shape)

    def condition_hook(condition: Condition) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            call.read_condition(condition, output[0] if isinstance(output, tuple) else output)

        return hook

    def z_hook(indices: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...]) -> Any:
            z = write(indices, args[0])
            return None if z is None else (z, *args[1:])

        return hook

    def output_hook(indices: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            x = write(indices, output[0] if isinstance(output, tuple) else output)
            return None if x is None else ((x, *output[1:]) if isinstance(output, tuple) else x)

        return hook

    with ExitStack() as stack:
        if edits:
            handle = body_of(subject).register_forward_pre_hook(call.before_body, with_kwargs=True)
            stack.callback(handle.remove)
            for condition in dict.fromkeys(e.when for e in edits if e.when is not None):
                layer_module = subject.sites[condition.layer].layer
                stack.callback(layer_module.register_forward_hook(condition_hook(condition)).remove)
            for layer, indices in before.items():
                stack.callback(subject.sites[layer].out_proj.register_forward_pre_hook(z_hook(indices)).remove)
            for (layer, kind), indices in behind.items():
                module = subject.sites[layer].out_proj if kind == "attention" else subject.sites[layer].mlp
                stack.callback(module.register_forward_hook(output_hook(indices)).remove)
            if where is None:
                _resolve_generate(call, subject, stack)
        yield
    missed = [e for e, n in zip(edits, hits, strict=True) if n == 0 and e.scope not in may_miss]
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
    if edit.when is not None:
        geometry.check_layer(edit.when.layer)
        if edit.when.layer >= site.layer:
            raise BkdattrError(
                f"{type(edit).__name__} at {site}: its condition reads layer {edit.when.layer}, which is not done before the edit; "
                f"use a probe of a layer below {site.layer}"
            )
    if isinstance(edit, AddVector) and site.kind == "z":
        raise BkdattrError(f"AddVector writes to an attention or MLP output, not to z of layer {site.layer}")
    width = {"head": geometry.d_head, "z": geometry.n_heads * geometry.d_head}.get(site.kind, geometry.d_model)
    value = getattr(edit, "value", getattr(edit, "vector", None))
    if value is not None and value.shape[-1] != width:
        raise BkdattrError(f"{type(edit).__name__} at {site}: got a value of width {value.shape[-1]}, expected {width}")


# ------------------------------------------------------------------------------------------------ reading
@dataclass(eq=False)
class Trace:
    """What `capture` read at the scope's tokens (one per row at the last prompt token), filled as the forward pass runs
    (fp32, on the CPU)."""

    z: dict[int, Float[Tensor, "token head d_head"]] = field(default_factory=dict)
    resid_post: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)
    mlp: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)


@contextmanager
def capture(
    subject: Subject,
    where: Where,
    *,
    z: Sequence[int] = (),
    resid_post: Sequence[int] = (),
    attention: Sequence[int] = (),
    mlp: Sequence[int] = (),
    scope: Scope = "last_prompt",
) -> Iterator[Trace]:
    """Read head z, layer outputs, attention outputs and MLP outputs of the named layers at the tokens of `scope`."""
    subject.check_eval()
    for layer in (*z, *resid_post, *attention, *mlp):
        subject.geometry.check_layer(layer)
    trace, call, geometry = Trace(), _Call(given=where), subject.geometry

    def read(x: Tensor) -> Tensor | None:
        mask = call.mask(scope)
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows) == 0:
            return None
        x = x.view(*mask.shape, x.shape[-1])
        return x[rows.to(x.device), columns.to(x.device)].detach().float().cpu()

    def z_hook(layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            x = read(args[0])
            if x is not None:
                trace.z[layer] = x.view(len(x), geometry.n_heads, geometry.d_head)

        return hook

    def output_hook(layer: int, into: dict[int, Tensor]) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            x = read(output[0] if isinstance(output, tuple) else output)
            if x is not None:
                into[layer] = x

        return hook

    with ExitStack() as stack:
        stack.callback(body_of(subject).register_forward_pre_hook(call.before_body, with_kwargs=True).remove)
        for layer in z:
            stack.callback(subject.sites[layer].out_proj.register_forward_pre_hook(z_hook(layer)).remove)
        reads = [(l, subject.sites[l].layer, trace.resid_post) for l in resid_post]
        reads += [(l, subject.sites[l].out_proj, trace.attention) for l in attention]
        reads += [(l, subject.sites[l].mlp, trace.mlp) for l in mlp]
        for layer, module, into in reads:
            stack.callback(module.register_forward_hook(output_hook(layer, into)).remove)
        yield trace


# ------------------------------------------------------------------------------------------------ resuming
@dataclass(eq=False)
class Residuals:
    """What every decoder layer gave in one forward pass: its whole output, where and as it stood (no copy), and how many
    things a layer returns (0: the tensor alone)."""

    out: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    returns: int = 0


@contextmanager
def residuals(subject: Subject) -> Iterator[Residuals]:
    """Keep the output of every decoder layer of the forward pass inside."""
    found = Residuals()

    def hook(layer: int) -> Callable[..., None]:
        def read(_module: Any, _args: Any, output: Any) -> None:
            found.returns = len(output) if isinstance(output, tuple) else 0
            found.out[layer] = output[0] if isinstance(output, tuple) else output

        return read

    with ExitStack() as stack:
        for layer, sites in enumerate(subject.sites):
            stack.callback(sites.layer.register_forward_hook(hook(layer)).remove)
        yield found


@contextmanager
def only_layers(
    subject: Subject, layers: range, given: Float[Tensor, "batch pos d_model"] | None, returns: int
) -> Iterator[None]:
    """Run forward passes through `layers` alone, from `given` as the residual stream that enters the first of them.

    The others hand on what they are given. The list keeps its length, because some families look a layer's attention mask up by its
    place in it. `given` is needed unless `layers` starts at 0.
    """
    if (given is None) != (layers.start == 0):
        raise BkdattrError(
            f"layers {layers}: expected a residual stream to start from where the first layer is not 0, and only there"
        )

    def hand_on(layer: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = given if layer == 0 else args[0] if args else kwargs["hidden_states"]
            return (x, *[None] * (returns - 1)) if returns else x

        return forward

    def restore(module: Any, before: Any) -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    with ExitStack() as stack:
        for i, sites in enumerate(subject.sites):
            if i not in layers:
                stack.callback(restore, sites.layer, sites.layer.__dict__.get("forward"))
                sites.layer.forward = hand_on(i)
        yield
