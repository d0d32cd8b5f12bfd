"""The `select` stage: heads chosen jointly (learned gates, greedy) beside ACIE's top-k and random heads, at equal k.

Heads are found on the attribution split, the gates' sparsity and scope and the number of heads are chosen on the selection
split, and every method's curve is reported on the test split. All methods ablate in the same way: to the clean mean, in the
same scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from bkdattr.ablation import random_heads
from bkdattr.architectures import HeadIndex
from bkdattr.edits import SCOPES, Scope
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluation
from bkdattr.selection import Gates, Objective, Repair, ablate_to, greedy_heads, learn_gates, prune_heads
from bkdattr.study import OpenRun
from bkdattr.traces import scope_mean_z

SPARSITIES = (0.05, 0.15, 0.4)
STEPS = 150
SEARCH_ROWS = 48
"""Attribution rows on which greedy selection and pruning compare sets of heads (gates train on all of them)."""
BAR = {"asr": 0.10, "recovered": 0.80, "broken": 0.05, "clean": 0.03}
"""What counts as a repair: ASR at most, recovered at least, broken (triggered) at most, clean accuracy lost at most."""


def default_ks(n_heads_total: int) -> list[int]:
    """Every k up to 10 % of the heads (20 points at most), then 16 and 24 where they are under a quarter of them."""
    tenth = max(1, n_heads_total // 10)
    dense = sorted({max(1, round(x)) for x in np.linspace(1, tenth, min(tenth, 20))})
    return dense + [k for k in (16, 24) if tenth < k <= n_heads_total // 4]


def repaired(found: Evaluation, before: Evaluation) -> bool:
    """Whether an edit meets `BAR`; without checkable answers, clean answers must stay as they were."""
    asr, recovered, broken = found.asr, found.recovered, found.broken_triggered
    assert asr is not None and broken is not None
    if found.clean_accuracy is not None and before.clean_accuracy is not None:
        kept = found.clean_accuracy.value >= before.clean_accuracy.value - BAR["clean"]
    else:
        kept = found.against(before)["clean_unchanged"]["value"] >= 1 - BAR["clean"]
    good = recovered is not None and recovered.value >= BAR["recovered"]
    return asr.value <= BAR["asr"] and broken.value <= BAR["broken"] and good and kept


def parse_scope(text: str) -> tuple[Scope, ...]:
    """`last_prompt` or several joined by `+`."""
    scopes = tuple(text.split("+"))
    if any(s not in SCOPES for s in scopes) or len(set(scopes)) < len(scopes):
        raise BkdattrError(f"scope {text!r}: expected one or several of {', '.join(SCOPES)} joined by '+'")
    return cast(tuple[Scope, ...], scopes)


def select(
    study: OpenRun,
    *,
    ks: Sequence[int] | None = None,
    scopes: Sequence[str] = ("last_prompt",),
    sparsities: Sequence[float] = SPARSITIES,
    steps: int = STEPS,
    draws: int = 3,
    force: bool = False,
) -> dict[str, Any]:
    """Run the stage; `scopes` such as "last_prompt" or "last_prompt+answer" are tried in turn."""
    subject, seed = study.subject, study.run.config["seed"]
    total = len(subject.geometry.heads)
    ks = sorted(set(default_ks(total) if ks is None else ks))
    parsed = [parse_scope(s) for s in scopes]
    if not ks or ks[0] < 1 or ks[-1] > total or draws < 1 or not sparsities or any(x < 0 for x in sparsities) or steps < 1:
        raise BkdattrError(
            f"select: got ks {ks}, {draws} draws, sparsities {list(sparsities)} and {steps} steps, expected k in 1..{total}, at least "
            "one draw, sparsities of 0 or more and at least one step"
        )
    acie = study.attribution
    options = {"ks": ks, "scopes": list(scopes), "sparsities": list(sparsities), "steps": steps, "draws": draws}
    with study.stage("select", options | {"top": [str(h) for h in acie.top(max(ks))]}, force) as result:
        if result is not None:
            ledger = study.run.ledger("select", {**study.inputs, **options})
            clean = [study.spec.clean(e) for e in study.splits["attribution"]]
            triggered = study.run.triggered("attribution")
            every_scope = [x for s in parsed for x in s]
            objective = Objective.of(subject, clean, triggered, scopes=every_scope)
            some = clean[:: math.ceil(len(clean) / SEARCH_ROWS)]  # eligible rows and others in their proportion
            ids = {e.id for e in some}
            search = Objective.of(subject, some, [e for e in triggered if e.id in ids], scopes=every_scope)
            found: dict[str, list[str]] = {}  # "scope method" -> heads, best first
            tried = []
            for text, parts in zip(scopes, parsed, strict=True):
                means = {s: _mean(study, s, clean) for s in parts}
                repair = Repair(subject, search, means)
                name = f"{text} greedy"
                if name not in ledger:
                    k = max((k for k in ks if k <= max(1, total // 10)), default=max(1, total // 10))
                    picked = greedy_heads(repair, k, progress=partial(tqdm, desc=f"greedy, {text}"))
                    ledger.put(name, [[str(h), gain] for h, gain in picked])
                found[name] = [h for h, _ in ledger[name]]
                for sparsity in sparsities:
                    name = f"{text} gate {sparsity:g}"
                    if name not in ledger:
                        bar = partial(tqdm, desc=f"gates, {text}, sparsity {sparsity:g}")
                        gates = learn_gates(subject, objective, means, sparsity=sparsity, steps=steps, seed=seed, progress=bar)
                        ledger.put(name, _ordered(gates, repair, max(ks)))
                    found[name] = ledger[name]["heads"]
                    tried.append({"scope": text, "sparsity": sparsity} | ledger[name])
            result["gates"] = tried
            result["chosen"] = chosen = _choose(study, tried, ks, ledger)
            every = sorted({*ks, chosen["k"]})
            result["rows"] = _curves(study, found, acie.top(max(every)), chosen, every, draws, ledger)
            result["needed"] = _needed(result["rows"], draws)
            result["bar"] = BAR
    return study.run.result("select", study.inputs)


def _ordered(gates: Gates, repair: Repair, most: int) -> dict[str, Any]:
    """The gated heads (those more likely ablated than not, at least one), ordered by backward elimination."""
    n = max(1, min(int((gates.probability > 0.5).sum()), most))
    heads = prune_heads(repair, gates.top(n), progress=partial(tqdm, desc="prune", leave=False))
    return {"heads": [str(h) for h in heads], "expected": gates.expected, "log_alpha": gates.log_alpha.tolist()}


def _ablated(study: OpenRun, split: str, heads: Sequence[str], scope: str) -> Evaluation:
    clean = [study.spec.clean(e) for e in study.splits["attribution"]]
    means = {s: _mean(study, s, clean) for s in parse_scope(scope)}
    return study.evaluator(split).run(ablate_to([HeadIndex.parse(h) for h in heads], means))


def _mean(study: OpenRun, scope: Scope, clean: list[Any]) -> torch.Tensor:
    memory = study.evaluator("test").memory
    key = (study.subject.fingerprint, "clean mean of z", scope)
    if key not in memory:
        memory[key] = scope_mean_z(study.subject, clean, scope)
    return memory[key]


def _choose(study: OpenRun, tried: list[dict[str, Any]], ks: Sequence[int], ledger: Any) -> dict[str, Any]:
    """Scope, sparsity and k by the selection split: the fewest heads that repair; where none do, the most answers recovered at 10 %
    of the heads or fewer."""
    before, most = study.evaluator("selection").run(), max(1, len(study.subject.geometry.heads) // 10)
    points = []
    for gate in tried:
        largest = min(len(gate["heads"]), most)
        for k in sorted({*(k for k in ks if k <= largest), largest}):
            name = f"selection {gate['scope']} {gate['sparsity']:g} {k}"
            if name not in ledger:
                found = _ablated(study, "selection", gate["heads"][:k], gate["scope"])
                recovered, accuracy = found.recovered, found.clean_accuracy
                ledger.put(
                    name,
                    {
                        "repaired": repaired(found, before),
                        "recovered": recovered.value if recovered else 0.0,
                        "clean": accuracy.value if accuracy else 0.0,
                        "rates": found.to_json(),
                    },
                )
            points.append({"scope": gate["scope"], "sparsity": gate["sparsity"], "k": k} | ledger[name])

    def rank(p: dict[str, Any]) -> tuple[Any, ...]:
        score = p["k"] if p["repaired"] else -(p["recovered"] + p["clean"])
        return (not p["repaired"], score, len(p["scope"]), p["k"], -p["recovered"], p["sparsity"])

    return min(points, key=rank)


def _curves(
    study: OpenRun,
    found: dict[str, list[str]],
    top: list[HeadIndex],
    chosen: dict[str, Any],
    ks: Sequence[int],
    draws: int,
    ledger: Any,
) -> list[dict[str, Any]]:
    scope, geometry = chosen["scope"], study.subject.geometry
    orders: list[tuple[str, int | None, list[str]]] = [
        ("gate", None, found[f"{scope} gate {chosen['sparsity']:g}"]),
        ("greedy", None, found[f"{scope} greedy"]),
        ("acie", None, [str(h) for h in top]),
    ]
    seed = study.run.config["seed"]
    orders += [("random", d, [str(h) for h in random_heads(geometry, max(ks), d, seed)]) for d in range(draws)]
    before = study.evaluator("test").run()
    rows = []
    for method, draw, heads in tqdm(orders, desc="select: test curves"):
        for k in [0, *(k for k in ks if k <= len(heads))]:
            name = f"test {scope} {' '.join(heads[:k])}"
            if name not in ledger:
                after = _ablated(study, "test", heads[:k], scope) if k else before
                ledger.put(name, after.to_json() | after.against(before) | {"repaired": repaired(after, before)})
            rows.append({"method": method, "draw": draw, "scope": scope, "k": k, "heads": heads[:k]} | ledger[name])
    return rows


def _needed(rows: list[dict[str, Any]], draws: int) -> list[dict[str, Any]]:
    """Per method (and draw), read off its test curve: the fewest heads with ASR at most the bar, and the fewest that repair."""
    out = []
    for method, draw in [("gate", None), ("greedy", None), ("acie", None), *(("random", d) for d in range(draws))]:
        curve = [r for r in rows if r["method"] == method and r["draw"] == draw]
        low = next((r["k"] for r in curve if r["asr"]["value"] <= BAR["asr"]), None)
        fixed = next((r["k"] for r in curve if r["repaired"]), None)
        out.append({"method": method, "draw": draw, "asr": low, "repair": fixed, "tried": max(r["k"] for r in curve)})
    return out
