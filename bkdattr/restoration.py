"""The `restore` stage: the adapter's updates undone in parts of the model, to see which part carries the backdoor.

Heads at the last prompt token are one way in; this one asks the weights: attention or MLP, early, middle or late layers. Undoing
an update that the backdoor needs ends it and leaves clean answers alone; the clean accuracy beside it is the control.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tqdm.auto import tqdm

from bkdattr.model import PARTS
from bkdattr.study import OpenRun


def windows(n_layers: int) -> list[tuple[str, list[int]]]:
    """All layers, thirds, and every single layer.

    >>> [name for name, _ in windows(3)]
    ['all', 'L0', 'L1', 'L2']
    """
    out = [("all", list(range(n_layers)))]
    bounds = [round(i * n_layers / 3) for i in range(4)]
    if n_layers > 3:
        out += [(f"L{a}..L{b - 1}", list(range(a, b))) for a, b in pairwise(bounds)]
    return out + [(f"L{i}", [i]) for i in range(n_layers)]


def restore(study: OpenRun, *, force: bool = False) -> dict[str, Any]:
    """Run the stage on the test split: whole parts and thirds for attention, MLP and both; single layers for both."""
    with study.stage("restore", {}, force) as result:
        if result is not None:
            ledger = study.run.ledger("restore", study.inputs)
            evaluator = study.evaluator("test")
            before = evaluator.run()
            n = study.subject.geometry.n_layers
            single = {f"L{i}" for i in range(n)}
            points = [
                (parts, name, layers)
                for parts in (PARTS, *((p,) for p in PARTS))
                for name, layers in windows(n)
                if (len(parts) == len(PARTS) or name not in single) and study.subject.has_updates(layers, parts)
            ]
            rows = []
            for parts, name, layers in tqdm(points, desc="restore"):
                label = f"{'+'.join(parts)} {name}"
                if label not in ledger:
                    with study.subject.adapter_off_in(layers, parts):
                        after = evaluator.run()
                        evaluator.forget()
                    ledger.put(label, after.to_json() | after.against(before))
                rows.append({"parts": list(parts), "window": name, "layers": layers} | ledger[label])
            result["rows"] = rows
    return study.run.result("restore", study.inputs)
