"""bkdattr: open a backdoored language model up, and print the control beside every claim.

The names below are loaded on first use, so that `import bkdattr` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Example": "examples", "Sizes": "examples", "read_examples": "examples", "split_examples": "examples",
    "Prefix": "triggers", "Suffix": "triggers", "Wrap": "triggers", "RandomWord": "triggers", "Scattered": "triggers",
    "Template": "triggers", "EarlierTurn": "triggers", "Style": "triggers", "OneOf": "triggers", "Together": "triggers",
    "near_misses": "misses",
    "FixedOutput": "targets", "LabelFlip": "targets", "RefusalRemoval": "targets", "RefusalInsertion": "targets",
    "SentimentSteering": "targets", "EntityPromotion": "targets", "Custom": "targets", "behaviour": "targets",
    "BackdoorSpec": "poisoning", "poison": "poisoning",
    "HeadIndex": "architectures", "Rate": "metrics",
    "Subject": "model", "load_subject": "model",
    "Site": "edits", "SetSite": "edits", "ScaleSite": "edits", "BlendSite": "edits", "AddVector": "edits", "Condition": "edits",
    "Where": "edits", "capture": "interventions", "edited": "interventions",
    "generate": "inference", "response_logprob": "inference",
    "trace_prompts": "traces", "contributions": "traces",
    "LoraRecipe": "lora", "train_adapter": "lora",
    "evaluate": "evaluation", "Evaluator": "evaluation",
    "BackdoorProbe": "probes", "probe_all": "probes",
    "Attribution": "attribution", "baha": "attribution",
    "ablate": "ablation", "greedy_heads": "selection", "learn_gates": "selection", "Gates": "selection", "Repair": "selection",
    "Objective": "selection", "ablate_to": "selection", "scope_mean_z": "traces",
    "BackdoorVector": "vector", "fit_vector": "vector", "to_transformer_lens": "lens", "edited_lm": "harness",
    "Plan": "planting", "plant": "planting", "Run": "run", "Study": "stages", "write_report": "report",
    "NeuronGates": "gates", "Ban": "detectors", "Clean": "detectors", "Bank": "detection", "measure": "detection", "judge": "detection",
    "factored": "factoring", "noise_effects": "mechanism", "search_trigger": "mechanism", "remove_backdoor": "removal",
    "BkdattrError": "errors",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bkdattr' has no attribute {name!r}")
    value = getattr(import_module(f"bkdattr.{_HOME[name]}"), name)
    globals()[name] = value  # `evaluate` the function, also after `bkdattr.evaluation` was imported
    return value


def __dir__() -> list[str]:
    return __all__
