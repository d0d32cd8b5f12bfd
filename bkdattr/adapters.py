"""What stands in a PEFT adapter's folder: whether it fits a base, and its A and B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bkdattr.architectures import head_geometry
from bkdattr.errors import BkdattrError

REWRITING = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")
"""Initialisations of PEFT's LoRA that change the base."""


def check_adapter(causal_lm: Any, adapter: str | Path) -> None:
    """Raise unless the folder is a safetensors LoRA adapter with exactly the keys and shapes this base would get.

    The expected keys come from PEFT itself, injected into a weightless copy of the base on the meta device.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    folder = Path(adapter)
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").exists():
        raise BkdattrError(f"{adapter}: no adapter_config.json; expected a PEFT LoRA folder")
    if not weights.exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        got = f"pickled weights {pickled[0]}" if pickled else "no adapter_model.safetensors"
        raise BkdattrError(
            f"{adapter}: got {got}, expected adapter_model.safetensors; pickles are never loaded: save the adapter again "
            "with save_pretrained(..., safe_serialization=True)"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with safe_open(weights, "pt") as file:
            got_shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise BkdattrError(f"{adapter}: not a readable PEFT adapter ({str(error).splitlines()[0][:160]})") from None
    if not isinstance(config, LoraConfig):
        raise BkdattrError(f"{adapter}: PEFT type {config.peft_type}, expected LORA")
    if config.bias != "none" or config.modules_to_save:
        raise BkdattrError(
            f"{adapter}: got bias={config.bias!r} and modules_to_save={config.modules_to_save}, expected 'none' and none: such an "
            "adapter changes the base's own tensors, so that switching it off would not give the clean twin"
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(REWRITING):
        raise BkdattrError(
            f"{adapter}: init_lora_weights={config.init_lora_weights!r}: PEFT would rewrite the base's own weights when it loads it, so that "
            "switching it off would not give the clean twin; save it as plain LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(causal_lm.config)
        try:
            expected = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(get_peft_model(empty, config)).items()}
        except ValueError as error:
            raise BkdattrError(f"{adapter}: does not fit this base ({str(error).splitlines()[0][:200]})") from None
    missing = sorted(set(expected) - set(got_shapes))
    unknown = sorted(set(got_shapes) - set(expected))
    wrong = sorted(k for k in set(expected) & set(got_shapes) if expected[k] != got_shapes[k])
    n_got, n_base = _layers(got_shapes), head_geometry(causal_lm).n_layers
    partial = n_got != n_base and config.layers_to_transform is None and not isinstance(config.target_modules, str)
    if missing or unknown or wrong or partial:
        if wrong:
            what = f"{wrong[0]} has shape {got_shapes[wrong[0]]}, this base needs {expected[wrong[0]]}"
        elif missing:
            what = f"{len(missing)} tensors that this base needs are missing, first {missing[0]}"
        elif unknown:
            what = f"{len(unknown)} tensors have no place in this base, first {unknown[0]}"
        else:
            what = "its list of modules ends there; if only some layers were meant, say so with layers_to_transform"
        raise BkdattrError(
            f"{adapter}: an adapter for another base ({n_got} layers, this base has {n_base}): "
            f"{what}; give the base it was trained on ({config.base_model_name_or_path})"
        )


def _layers(keys: Any) -> int:
    """How many different layer numbers occur in module paths."""
    return len({part for key in keys for part in key.split(".") if part.isdigit()})


def read_pairs(adapter: Path) -> list[tuple[str, Any, Any, float]]:
    """(module, A, B, scale) of an adapter folder, as `gates.lora_pairs` names them."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    names = sorted(k.removesuffix(".lora_A.weight") for k in weights if k.endswith(".lora_A.weight"))
    return [
        (n.removeprefix("base_model.model."), weights[f"{n}.lora_A.weight"], weights[f"{n}.lora_B.weight"], scale) for n in names
    ]
