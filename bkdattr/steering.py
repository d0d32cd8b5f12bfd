"""The `steer` stage: the paper's Backdoor Vector and its variants, each at a layer and strength chosen on the selection split.

Both signs are reported on the test split, suppression also *conditional* (only where a probe of an earlier layer fires), beside
random heads and random directions at the same norm, layer, strength and scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from bkdattr.ablation import random_heads
from bkdattr.edits import Condition
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluation, Judged
from bkdattr.inference import PrefixCache
from bkdattr.joint import parse_scope
from bkdattr.run import Ledger
from bkdattr.study import OpenRun
from bkdattr.vector import FIT_STEP, FIT_STEPS, BackdoorVector, default_k, fit_vector

KINDS = ("raw", "difference", "difference_heads", "fitted")
STRENGTHS = (1.0, 2.0, 4.0)
DRAWS = 5
SIDES = {1: "activate", -1: "suppress"}
GOAL = {"activate": 0.95, "suppress": 0.05, "recovered": 0.90}
"""What a vector is for: ASR at least, ASR at most, and answers recovered at least."""
FITTED_LAYERS = 3
"""A fitted vector is tried at the layers where the difference of means suppresses best on the selection split."""
Row = dict[str, Any]


def steer(
    study: OpenRun,
    *,
    k: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    draws: int = DRAWS,
    kinds: Sequence[str] = ("raw",),
    scopes: Sequence[str] = ("last_prompt",),
    force: bool = False,
) -> Row:
    """Run the stage. The first of `kinds` x `scopes` is the result's own vector (and what `vector/` holds); all of them stand under
    `variants`. Scopes are tried in turn until a vector reaches `GOAL` both ways on the selection split."""
    if not strengths or any(s <= 0 or not math.isfinite(s) for s in strengths) or draws < 1:
        raise BkdattrError(
            f"steer: got strengths {list(strengths)} and {draws} draws, expected positive numbers (the sign is the sweep's "
            "own) and at least 1 draw"
        )
    unknown = [x for x in kinds if x not in KINDS]
    if unknown or not kinds or not scopes:
        raise BkdattrError(f"vector kinds {list(kinds)}: expected some of {', '.join(KINDS)}, and at least one scope")
    for scope in scopes:
        parse_scope(scope)
    top, total = study.attribution, len(study.subject.geometry.heads)
    k = default_k(total) if k is None else k
    options = {"k": k, "strengths": list(strengths), "draws": draws, "kinds": list(kinds), "scopes": list(scopes)}
    options |= {"top": [str(h) for h in top.top(k)]}
    if "fitted" in kinds:
        options |= {"fit": {"steps": FIT_STEPS, "step": FIT_STEP, "decay": "linear"}}
    with study.stage("steer", options, force) as result:
        if result is not None:
            ledger = study.run.ledger("steer", {**study.inputs, **options})
            shop = _Vectors(study, k)
            variants = list[Row]()
            plain = study.evaluator("selection").run()
            there_is_one = plain.asr is not None and plain.asr.value >= 0.5  # else every vector suppresses, at any scope
            for scope in scopes:
                if variants and (not there_is_one or any(does_both(**v["selected"]) for v in variants)):
                    break
                variants += [_variant(study, shop, kind, scope, strengths, draws, ledger) for kind in kinds]
            result |= variants[0] | {"variants": variants}
            point = variants[0]["suppress"]
            fitted = kinds[0] == "fitted"
            vector = (
                shop.fixed_vector(kinds[0])
                if not fitted
                else (shop.at("fitted", point["layer"], point["strength"], scopes[0]) * (1 / point["strength"]))
            )  # a fitted vector is made at its strength; it is kept, as the others are, so that `strength` is still to be applied
            vector.save(study.run.folder / "vector")
    return study.run.result("steer", study.inputs)


class _Vectors:
    """Makes the vectors of a run: the same for every layer, or fitted per layer and strength."""

    def __init__(self, study: OpenRun, k: int) -> None:
        self.study, self.k = study, k
        self.fitted: dict[tuple[int, float, str], BackdoorVector] = {}
        self.prefix = PrefixCache()
        self.fixed: dict[str, BackdoorVector] = {}

    def fixed_vector(self, kind: str) -> BackdoorVector:
        if kind not in self.fixed:
            subject, heads = self.study.subject, self.study.attribution.top(self.k)
            there, here = self.study.donors.mean_z, self.study.clean_donors.mean_z
            if kind == "raw":
                self.fixed[kind] = BackdoorVector.from_heads(subject, heads, there)
            else:
                chosen = heads if kind == "difference_heads" else None
                self.fixed[kind] = BackdoorVector.from_difference(subject, there, here, chosen)
        return self.fixed[kind]

    def at(self, kind: str, layer: int, strength: float, scope: str) -> BackdoorVector:
        """A fitted vector carries its strength in its norm bound (strength x the norm of the difference)."""
        if kind != "fitted":
            return self.fixed_vector(kind) * strength
        key = (layer, strength, scope)
        if key not in self.fitted:
            start = self.fixed_vector("difference") * strength
            clean, triggered = self.study.eligible("attribution")
            self.fitted[key] = fit_vector(
                self.study.subject, clean, triggered, layer, start, scopes=parse_scope(scope), prefix=self.prefix
            )
        return self.fitted[key]


def _variant(
    study: OpenRun, shop: _Vectors, kind: str, scope: str, strengths: Sequence[float], draws: int, ledger: Ledger
) -> Row:
    sweep = _sweep(study, shop, kind, scope, strengths, ledger)
    chosen = {sign: best_point(sweep, sign, by_recovery=kind != "raw") for sign in SIDES}
    vectors = {s: shop.at(kind, p["layer"], p["strength"], scope) for s, p in chosen.items()}
    row: Row = {
        "kind": kind,
        "scope": scope,
        "k": shop.k,
        "heads": [] if kind in ("difference", "fitted") else [str(h) for h in vectors[-1].heads],
    }
    row |= {"norm": shop.fixed_vector("difference" if kind == "fitted" else kind).norm}
    for sign, side in SIDES.items():
        row[side] = _point(study, vectors[sign], chosen[sign], sign, scope) | {"norm": vectors[sign].norm}
    row["conditional"] = _conditional(study, shop, kind, scope, sweep)
    row["selected"] = {side: chosen[sign] for sign, side in SIDES.items()}
    row |= {"controls": _controls(study, shop, vectors, chosen, scope, draws), "sweep": sweep}
    row["samples"] = {side: _samples(study, vectors[sign], chosen[sign], sign, scope) for sign, side in SIDES.items()}
    return row


def does_both(activate: Row, suppress: Row) -> bool:
    """Whether the rates of a vector's two points reach `GOAL`."""
    recovered = suppress["recovered"]
    brings, ends = activate["asr"]["value"] >= GOAL["activate"], suppress["asr"]["value"] <= GOAL["suppress"]
    return brings and ends and recovered is not None and recovered["value"] >= GOAL["recovered"]


EQUAL_NORM = ("random_heads_matched", "random_direction")


def stands_apart(variant: Row, side: str) -> bool:
    """Whether a vector beats every equal-norm control draw by the 95 % interval: of ASR where it activates; where it suppresses, of
    the answers recovered, because a draw that breaks the model ends the attack as well."""
    mine, drawn = variant[side], [d[side] for c in EQUAL_NORM for d in variant["controls"][c]]
    key = "asr" if side == "activate" else "recovered"
    return mine[key] is not None and all(d[key] is None or mine[key]["low"] > d[key]["high"] for d in drawn)


def works(variant: Row) -> bool:
    """Does both jobs, beyond every equal-norm control."""
    return does_both(variant["activate"], variant["suppress"]) and all(stands_apart(variant, side) for side in SIDES.values())


def still_works(variant: Row) -> bool:
    """Whether a vector that works does so under its condition too, at the very point at which its controls stand."""
    c, at = variant["conditional"], variant["suppress"]
    same = c and (c["layer"], c["strength"]) == (at["layer"], at["strength"])
    return bool(same and works(variant) and does_both(variant["activate"], c))


def _sweep(study: OpenRun, shop: _Vectors, kind: str, scope: str, strengths: Sequence[float], ledger: Ledger) -> list[Row]:
    layers = list(range(study.subject.geometry.n_layers))
    if kind == "fitted":
        known = _points(study, shop, "difference", scope, layers, strengths, ledger)
        best = sorted((r for r in known if r["sign"] < 0), key=lambda r: _rank(r, -1, by_recovery=True))
        layers = sorted(list(dict.fromkeys(r["layer"] for r in best))[:FITTED_LAYERS])
    return _points(study, shop, kind, scope, layers, strengths, ledger)


def _points(
    study: OpenRun, shop: _Vectors, kind: str, scope: str, layers: Sequence[int], strengths: Sequence[float], ledger: Ledger
) -> list[Row]:
    rows = []
    points = [(l, s, g) for l in layers for s in strengths for g in SIDES]
    for layer, strength, sign in tqdm(points, desc=f"steer sweep, {kind}, {scope}"):
        name = f"{kind}-{scope}-{layer}-{strength}-{sign}"
        if name not in ledger:
            vector = shop.at(kind, layer, strength, scope)
            found = _steered(study, "selection", vector, layer, sign, scope)
            ledger.put(name, _rates(found, sign))
        rows.append({"layer": layer, "strength": strength, "sign": sign, "split": "selection"} | ledger[name])
    return rows


def _steered(
    study: OpenRun,
    split: str,
    vector: BackdoorVector,
    layer: int,
    sign: int,
    scope: str,
    when: Condition | None = None,
    utility: bool | None = None,
) -> Evaluation:
    edits = [vector.edit(layer, sign=sign, scope=s, when=when) for s in parse_scope(scope)]
    parts = ("clean",) if sign > 0 else ("triggered", "clean")
    return study.evaluator(split).run(edits, parts, utility=split == "test" if utility is None else utility)


def _rates(found: Evaluation, sign: int) -> Row:
    """Sign +1: ASR on clean eligible prompts; -1: on triggered ones. Clean accuracy under the same edit."""
    rates = found.to_json()
    asr, broken = (rates["false_trigger"], rates["broken"]) if sign > 0 else (rates["asr"], rates["broken_triggered"])
    kept = ("recovered", "clean_accuracy", "clean_agreement", "clean_logprob", "clean_kl", "behaviours")
    return {"asr": asr, "broken": broken} | {x: rates[x] for x in kept}


def _point(study: OpenRun, vector: BackdoorVector, chosen: Row, sign: int, scope: str, utility: bool = True) -> Row:
    found = _steered(study, "test", vector, chosen["layer"], sign, scope, utility=utility)
    where = {"layer": chosen["layer"], "strength": chosen["strength"]}
    return where | _rates(found, sign) | {"clean_unchanged": found.against(study.evaluator("test").run())["clean_unchanged"]}


def _conditional(study: OpenRun, shop: _Vectors, kind: str, scope: str, sweep: Sequence[Row]) -> Row | None:
    """Suppression only where a logistic probe of an earlier layer fires, at the best point of the sweep that has one before it; None
    where there is no such probe."""
    first = study.conditions[0]["layer"] if study.conditions else math.inf
    later = [r for r in sweep if r["sign"] < 0 and r["layer"] > first]
    if not later:
        return None
    chosen = best_point(later, -1, by_recovery=kind != "raw")
    below = [c for c in study.conditions if c["layer"] < chosen["layer"]]
    best = max(below, key=lambda c: (c["validation"], -c["layer"]))
    vector = shop.at(kind, chosen["layer"], chosen["strength"], scope)
    found = _steered(study, "test", vector, chosen["layer"], -1, scope, best["condition"])
    same = found.against(study.evaluator("test").run())["clean_unchanged"]
    probe = {f"probe_{k}": best[k] for k in ("layer", "validation", "missed", "false_alarms")}
    return {"layer": chosen["layer"], "strength": chosen["strength"]} | probe | {"clean_unchanged": same} | _rates(found, -1)


def _controls(
    study: OpenRun, shop: _Vectors, vectors: dict[int, BackdoorVector], chosen: dict[int, Row], scope: str, draws: int
) -> dict[str, list[Row]]:
    """Random heads (as they are, and at the vector's norm) and random directions, at the vector's own layer and strength (rates
    alone: no perplexity or KL)."""
    subject, seed = study.subject, study.run.config["seed"]
    controls: dict[str, list[Row]] = {"random_heads": [], "random_heads_matched": [], "random_direction": []}
    for d in tqdm(range(draws), desc="steer controls"):
        heads = random_heads(subject.geometry, shop.k, d, seed)
        other = BackdoorVector.from_heads(subject, heads, study.donors.mean_z, "random_heads")
        rows = {name: Row(draw=d, heads=[] if name == "random_direction" else [str(h) for h in heads]) for name in controls}
        for sign, side in SIDES.items():
            vector, strength = vectors[sign], chosen[sign]["strength"]
            twins = {
                "random_heads": other * strength,
                "random_heads_matched": other.with_norm(vector.norm, "random_heads_matched"),
                "random_direction": vector.random_twin(np.random.default_rng([seed, d])),
            }
            for name, twin in twins.items():
                rows[name]["norm"] = twin.norm / strength
                rows[name][side] = _point(study, twin, chosen[sign], sign, scope, utility=False)
        for name, row in rows.items():
            controls[name].append(row)
    return controls


def best_point(sweep: Sequence[Row], sign: int, *, by_recovery: bool = False) -> Row:
    """Highest ASR for +1, lowest for -1 (the paper's choice); ties to clean accuracy (or agreement), then the lower layer and
    strength. `by_recovery`: for -1 the most answers recovered, then the lowest ASR."""
    return min((r for r in sweep if r["sign"] == sign), key=lambda row: _rank(row, sign, by_recovery))


def _rank(row: Row, sign: int, by_recovery: bool) -> tuple[float, float, float, int, float]:
    clean = row["clean_accuracy"] or row["clean_agreement"]
    recovered = row["recovered"]["value"] if by_recovery and sign < 0 and row["recovered"] else 0.0
    return (-recovered, -sign * row["asr"]["value"], -clean["value"] if clean else 0.0, row["layer"], row["strength"])


def _samples(study: OpenRun, vector: BackdoorVector, chosen: Row, sign: int, scope: str) -> list[Row]:
    found = _steered(study, "test", vector, chosen["layer"], sign, scope)
    judged: Sequence[Judged] = [j for j in found.clean if j.example.eligible] if sign > 0 else found.triggered
    return [j.to_json() for j in judged[:5]]
