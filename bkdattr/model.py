"""The model under study: base + un-merged LoRA adapter as one `Subject`; its clean twin is the adapter switched off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bkdattr.adapters import check_adapter
from bkdattr.architectures import (
    Architecture,
    HeadGeometry,
    LayerSites,
    architecture_of,
    head_geometry,
    layer_sites,
)
from bkdattr.chat import ChatFormat
from bkdattr.errors import BkdattrError

PARTS = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model ready to be studied: `model` (a causal LM or a `PeftModel`), its chat format, sites and geometry.

    The model is put into eval mode and never modified: edits live inside `with` blocks only.
    """

    model: Any
    chat: ChatFormat

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Subject:
        """Wrap a loaded model; raises where its family is unknown or the tokenizer lacks what is needed."""
        model.eval()
        causal_lm = _causal_lm(model)
        architecture_of(causal_lm.config)
        if architecture_of(causal_lm.config).eager and causal_lm.config._attn_implementation != "eager":
            raise BkdattrError(
                f"{causal_lm.config.model_type} needs eager attention: got {causal_lm.config._attn_implementation!r}; "
                'load it with attn_implementation="eager"'
            )
        return cls(model, ChatFormat.of(tokenizer, causal_lm.config, getattr(causal_lm, "generation_config", None)))

    @cached_property
    def causal_lm(self) -> Any:
        """The causal LM inside, LoRA layers injected (called directly: same numbers as the PEFT wrapper)."""
        return _causal_lm(self.model)

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.causal_lm.config)

    @cached_property
    def sites(self) -> list[LayerSites]:
        return layer_sites(self.causal_lm)

    @cached_property
    def geometry(self) -> HeadGeometry:
        return head_geometry(self.causal_lm)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.causal_lm.get_input_embeddings())

    @property
    def has_adapter(self) -> bool:
        return any("lora_" in name for name, _ in self.causal_lm.named_parameters())

    @property
    def adapter_on(self) -> bool:
        """Whether an adapter takes part in the forward pass now."""
        return self.has_adapter and not all(m.disable_adapters for m in self.causal_lm.modules() if hasattr(m, "lora_A"))

    @contextmanager
    def adapter_off(self) -> Iterator[Subject]:
        """The clean twin: the same weights without the adapter, for the length of the block."""
        if not self.has_adapter:
            raise BkdattrError("this subject has no adapter, so it has no clean twin; load it with adapter=DIR")
        partly = [m for m in self.causal_lm.modules() if hasattr(m, "lora_A") and m._disable_adapters]
        try:
            with self.model.disable_adapter():
                yield self
        finally:
            for module in partly:  # PEFT switches everything on again
                module._disable_adapters = True

    @contextmanager
    def adapter_off_in(self, layers: Sequence[int], parts: Sequence[str] = PARTS) -> Iterator[Subject]:
        """The adapter's updates undone in some layers only, in their attention, their MLP or both, for the length of the block."""
        unknown = [p for p in parts if p not in PARTS]
        if unknown or not parts or not layers:
            raise BkdattrError(
                f"restoration: got layers {list(layers)} and parts {list(parts)}, expected some of {', '.join(PARTS)}"
            )
        for layer in layers:
            self.geometry.check_layer(layer)
        chosen = [m for layer in layers for part, m in self._lora_modules(layer) if part in parts and not m._disable_adapters]
        if not chosen:
            raise BkdattrError(
                f"the adapter has no update in the {' or '.join(parts)} of layers {list(layers)}, so there is nothing to undo"
            )
        try:
            for module in chosen:
                module._disable_adapters = True
            yield self
        finally:
            for module in chosen:
                module._disable_adapters = False

    def has_updates(self, layers: Sequence[int], parts: Sequence[str] = PARTS) -> bool:
        """Whether the adapter changes anything there."""
        return any(part in parts for layer in layers for part, _ in self._lora_modules(layer))

    def _lora_modules(self, layer: int) -> list[tuple[str, Any]]:
        attention = self.architecture.out_proj.rpartition(".")[0]
        found = [(name, m) for name, m in self.sites[layer].layer.named_modules() if hasattr(m, "lora_A")]
        return [("attention" if name.startswith(attention + ".") else "mlp", m) for name, m in found]

    @cached_property
    def _weights_hash(self) -> str:
        digest = hashlib.sha256()
        config = {k: v for k, v in self.causal_lm.config.to_diff_dict().items() if k != "transformers_version" and k[0] != "_"}
        scaling = {n: m.scaling for n, m in self.causal_lm.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
        digest.update(json.dumps([config, scaling], sort_keys=True, default=str).encode())
        digest.update(str(self.chat.tokenizer.chat_template if self.chat.template == "chat" else "plain").encode())
        for name, tensor in sorted(self.causal_lm.state_dict().items()):
            flat = self._loaded(name, tensor).detach().reshape(-1)
            if "lora_" not in name and flat.numel() > 256:  # a fixed sample of the base, every byte of the adapter
                flat = flat[:: flat.numel() // 256 + 1]
            digest.update(f"{name.replace('.base_layer', '')}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the state dict; of a part that was offloaded (`device="auto"`) it holds no numbers until it is fetched."""
        if tensor.device.type != "meta":
            return tensor
        from accelerate.utils import align_module_device

        path, _, leaf = name.rpartition(".")
        module = self.causal_lm.get_submodule(path)
        with align_module_device(module):
            return getattr(module, leaf).detach().clone()

    @property
    def fingerprint(self) -> str:
        """Hash of config, chat template, a sample of the base weights, the whole adapter with its scaling, and adapter on/off (or
        where it is off)."""
        if not self.has_adapter:
            return f"{self._weights_hash}:none"
        off = [n for n, m in self.causal_lm.named_modules() if getattr(m, "disable_adapters", None) is True]
        lora = sum(hasattr(m, "lora_A") for m in self.causal_lm.modules())
        state = (
            "on" if not off else "off" if len(off) == lora else "part-" + hashlib.sha256(json.dumps(off).encode()).hexdigest()[:8]
        )
        return f"{self._weights_hash}:{state}"

    def check_fingerprint(self, fingerprint: str, what: str) -> None:
        if fingerprint != self.fingerprint:
            raise BkdattrError(
                f"{what} belongs to another model: its fingerprint is {fingerprint}, this model's is {self.fingerprint}; "
                "use the model (and adapter state) that it was made with"
            )

    def check_eval(self) -> None:
        training = next((name for name, m in self.model.named_modules() if m.training), None)
        if training is not None:
            raise BkdattrError(
                f"module {training or type(self.model).__name__!r} is in training mode, so dropout would change every "
                "reading; call model.eval() first"
            )


def device_of(module: Any) -> torch.device:
    """Where a module runs: also where its weights are elsewhere until it is called."""
    base = getattr(module, "base_layer", module)
    device = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    return torch.device(device) if device is not None else next(base.parameters()).device


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ------------------------------------------------------------------------------------------------ loading
def load_tokenizer(base: str | Path, pad_token: str | None = None) -> Any:
    """The base's tokenizer; `pad_token` sets a missing pad token ("eos" for the end-of-turn token)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # broken files raise many kinds; all mean that there is no tokenizer to be had here
        raise BkdattrError(_cannot_load(base, "tokenizer", error)) from None
    if pad_token is not None:
        tokenizer.pad_token = tokenizer.eos_token if pad_token == "eos" else pad_token
    if tokenizer.pad_token_id is None:
        raise BkdattrError(
            f"{base}: the tokenizer has no pad token; give one with --pad-token (pad_token=...), e.g. 'eos' for its "
            f"end-of-turn token {tokenizer.eos_token!r} (padding is masked everywhere)"
        )
    return tokenizer


def load_base(base: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A causal LM from a folder or Hub id: safetensors only, no remote code. `device` "auto" spreads it over what the machine has
    (accelerate's device map)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BkdattrError(_cannot_load(base, "model", error)) from None
    row = architecture_of(config)
    extra: dict[str, Any] = {"attn_implementation": "eager"} if row.eager else {}
    if device == "auto":
        extra["device_map"] = "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False, use_safetensors=True, **extra)
    except Exception as error:  # OSError, SafetensorError, RuntimeError of a wrong shape ...
        raise BkdattrError(_cannot_load(base, "model", error)) from None
    return model.eval() if device == "auto" else _placed(model, device)


def _placed(model: Any, device: str) -> Any:
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise BkdattrError(
            f"device {device!r}: the model cannot be placed there ({str(error).splitlines()[0][:120]}); use 'cpu', 'auto' or a device that torch sees"
        ) from None


def _cannot_load(base: str | Path, what: str, error: Exception) -> str:
    return (
        f"{base}: cannot load a {what} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}); "
        "give a folder with config.json, tokenizer and safetensors weights, or a Hub id"
    )


def dtype_of(name: str) -> torch.dtype:
    """A floating-point type by its name, as options give it."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BkdattrError(f"dtype {name!r}: expected a floating-point type of torch, e.g. float32, bfloat16 or float16")
    return found


def load_subject(
    base: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    pad_token: str | None = None,
) -> Subject:
    """Load base and, where given, an un-merged LoRA adapter folder, checked against the base before PEFT sees it."""
    tokenizer = load_tokenizer(base, pad_token)
    model = load_base(base, dtype=dtype, device=device)
    if adapter is not None:
        from peft import PeftModel

        check_adapter(model, adapter)
        model = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
    return Subject.of(model, tokenizer)
