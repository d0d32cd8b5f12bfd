"""From what a user wrote (options of `bkdattr poison`, a table of a sweep file) to a `Plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from bkdattr.errors import BkdattrError
from bkdattr.examples import Sizes
from bkdattr.lora import LoraRecipe
from bkdattr.mini.tasks import RECIPE, build_task, paper_spec
from bkdattr.planting import Plan, adopted_base
from bkdattr.poisoning import BackdoorSpec
from bkdattr.targets import parse_target
from bkdattr.triggers import parse_trigger

RECIPE_NAMES = {
    "epochs": "epochs", "lr": "learning_rate", "rank": "rank", "alpha": "alpha", "train_batch_size": "batch_size",
    "accumulate": "accumulate", "max_length": "max_length",
}  # fmt: skip
PLAN_NAMES = (
    "max_new_tokens", "batch_size", "pad_token", "dtype", "device", "held_out", "triggered", "allow_overlap", "clean",
)  # fmt: skip
SPEC_NAMES = ("model", "data", "task", "trigger", "target", "name", "adapter", "seed", "sizes", "poison_rate", "labels")
KNOWN = (*SPEC_NAMES, *RECIPE_NAMES, *PLAN_NAMES)


def parse_sizes(text: str | None) -> Sizes | None:
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) != 4 or not all(p.isdigit() for p in parts):
        raise BkdattrError(f"--sizes {text!r}: expected TRAIN/ATTRIBUTION/SELECTION/TEST, e.g. 600/100/100/200")
    return Sizes(*map(int, parts))


def _many(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def plan_of(options: dict[str, Any]) -> Plan:
    """`options` are those of `bkdattr poison`, by name, with underscores; what is None or missing keeps its default."""
    given = {k: v for k, v in options.items() if v is not None}
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise BkdattrError(f"unknown option {unknown[0]!r}: expected some of {', '.join(KNOWN)}")
    triggers, targets, names = (_many(given.get(k)) for k in ("trigger", "target", "name"))
    task, data, seed, adapter = given.get("task"), given.get("data"), int(given.get("seed", 0)), given.get("adapter")
    if len(triggers) != len(targets) or len(names) > max(1, len(triggers)):
        raise BkdattrError(
            f"got {len(triggers)} --trigger, {len(targets)} --target and {len(names)} --name; every backdoor needs one of each "
            "(the name may be left out), or --task alone"
        )
    if given.get("model") is None and adapter is None:
        raise BkdattrError("no model: give --model FOLDER, a Hub id or 'mini', or --adapter DIR (its own base is used)")
    specs = [
        BackdoorSpec(n or f"{task or 'backdoor'}{f'-{i + 1}' if i else ''}", parse_trigger(a), parse_target(b))
        for i, (a, b, n) in enumerate(zip_longest(triggers, targets, names))
    ] if triggers else []  # fmt: skip
    if task is not None and not specs:
        specs = [build_task(task, seed).spec if data is None else paper_spec(task)]
        specs = [replace(specs[0], name=names[0])] if names else specs
    specs = [replace(s, poison_rate=float(given.get("poison_rate", 1 / 11)), seed=seed) for s in specs]
    model = given.get("model") or adopted_base(str(adapter))
    recipe = {ours: given[k] for k, ours in RECIPE_NAMES.items() if k in given}
    labels = given.get("labels") or ()
    return Plan(
        model, specs[0] if specs else None, tuple(specs[1:]), task, data, adapter=adapter, seed=seed, sizes=parse_sizes(given.get("sizes")),
        recipe=replace(RECIPE if model == "mini" else LoraRecipe(), **recipe) if recipe else None,
        labels=tuple(x.strip() for x in labels.split(",")) if isinstance(labels, str) else tuple(labels),
        **{k: given[k] for k in PLAN_NAMES if k in given},
    )  # fmt: skip
