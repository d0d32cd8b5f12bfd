"""Where the heads are: one row per model family. Heads are read and written as `z`, the input of the attention output
projection, `[batch, pos, n_heads * d_head]` in every family listed, grouped KV heads included."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from bkdattr.errors import BkdattrError


@dataclass(frozen=True)
class Architecture:
    """Module paths of a family, relative to the causal LM (`layers`) or to a layer (`out_proj`, `mlp`).

    `writes_residual`: the projection's output is added to the residual stream as it is; False where a norm follows, so
    that a head's contribution is not its residual write. `eager`: needs `attn_implementation="eager"`.
    """

    layers: str
    out_proj: str
    mlp: str
    writes_residual: bool = True
    eager: bool = False


_LLAMA = Architecture("model.layers", "self_attn.o_proj", "mlp")
_POST_NORM = Architecture("model.layers", "self_attn.o_proj", "mlp", writes_residual=False)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _POST_NORM,
    "olmo2": _POST_NORM,
    "gpt2": Architecture("transformer.h", "attn.c_proj", "mlp"),
    "gptj": Architecture("transformer.h", "attn.out_proj", "mlp"),
    "gpt_neox": Architecture("gpt_neox.layers", "attention.dense", "mlp"),
    "opt": Architecture("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "bloom": Architecture("transformer.h", "self_attention.dense", "mlp", eager=True),
}


def architecture_of(config: Any) -> Architecture:
    """The row of a config's `model_type`; raises with the supported families."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise BkdattrError(
            f"model type {config.model_type!r} is not known; supported: {', '.join(sorted(ARCHITECTURES))}; "
            "a new family is one row in bkdattr/architectures.py"
        )
    return row


@dataclass(frozen=True, order=True)
class HeadIndex:
    """A head; prints `L12H7`.

    >>> str(HeadIndex(12, 7)), HeadIndex.parse("L12H7")
    ('L12H7', HeadIndex(layer=12, head=7))
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> HeadIndex:
        match = re.fullmatch(r"L(\d+)H(\d+)", text)
        if not match:
            raise BkdattrError(f"head {text!r}: expected the form L12H7 (layer 12, head 7)")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class HeadGeometry:
    """Query heads of a model. `d_head` comes from the projection's input width, never from `d_model // n_heads`."""

    n_layers: int
    n_heads: int
    d_head: int
    d_model: int

    @property
    def heads(self) -> list[HeadIndex]:
        return [HeadIndex(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise BkdattrError(f"layer {layer} is out of range: the model has layers 0..{self.n_layers - 1}")

    def check_head(self, head: HeadIndex) -> None:
        if not (0 <= head.layer < self.n_layers and 0 <= head.head < self.n_heads):
            raise BkdattrError(
                f"head {head} is out of range: the model has layers 0..{self.n_layers - 1} with heads 0..{self.n_heads - 1}"
            )


@dataclass(frozen=True, eq=False)
class LayerSites:
    """The modules of one decoder layer that are hooked."""

    layer: nn.Module
    out_proj: nn.Module
    mlp: nn.Module


def layer_sites(causal_lm: Any) -> list[LayerSites]:
    """The hooked modules per layer, found on the causal LM itself (an injected LoRA leaves the paths as they are)."""
    row = architecture_of(causal_lm.config)
    try:
        return [
            LayerSites(layer, layer.get_submodule(row.out_proj), layer.get_submodule(row.mlp))
            for layer in cast(nn.ModuleList, causal_lm.get_submodule(row.layers))
        ]
    except AttributeError as error:
        raise BkdattrError(
            f"{type(causal_lm).__name__} does not have the modules of its model type "
            f"{causal_lm.config.model_type!r}: {error}; load it with AutoModelForCausalLM"
        ) from None


def head_geometry(causal_lm: Any) -> HeadGeometry:
    """Geometry read off the projection's weight: Linear is [out, in], Conv1D (GPT-2) is [in, out]."""
    sites = layer_sites(causal_lm)
    n_heads = int(causal_lm.config.num_attention_heads)
    base: Any = getattr(sites[0].out_proj, "base_layer", sites[0].out_proj)
    d_in, d_out = (base.in_features, base.out_features) if hasattr(base, "in_features") else tuple(base.weight.shape)
    if d_in % n_heads:
        raise BkdattrError(f"the output projection takes {d_in} inputs, which {n_heads} heads do not divide")
    return HeadGeometry(len(sites), n_heads, d_in // n_heads, d_out)
