"""The `select` stage: heads chosen jointly (learned gates, greedy) beside ACIE's top-k and random heads, at equal k.

Heads are found on the attribution split, the setting and the number of heads are chosen on the selection split, and every method's
curve is reported on the test split. A setting says where heads are ablated (a scope, or several joined by `+`) and, behind
`@probe`, that they are ablated only in prompts on which a probe of an earlier layer fires. Settings are tried in turn until the
gates repair on the selection split; all methods then ablate in the same way: to the clean mean, in the same setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from tqdm.auto import tqdm

from bkdattr.ablation import random_heads
from bkdattr.architectures import HeadIndex
from bkdattr.edits import SCOPES, Condition, Scope
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluation
from bkdattr.selection import Means, Objective, Repair, ablate_to, greedy_heads, learn_gates, reachable
from bkdattr.study import OpenRun
from bkdattr.traces import scope_mean_z

SPARSITY = (0.01, 3.0)
STEPS = 350
SETTINGS = ("last_prompt", "last_prompt@probe")
SEARCH_ROWS = 48
"""Attribution rows on which greedy selection compares sets of heads (gates train on all of them)."""
BAR = {"asr": 0.10, "recovered": 0.80, "broken": 0.05, "clean": 0.03}
"""What counts as a repair: ASR at most, recovered at least, broken (triggered) at most, clean accuracy lost at most."""


def default_ks(n_heads_total: int) -> list[int]:
    """Every k up to 10 % of the heads (12 points at most), then 16 and 24 where they are under a quarter of them."""
    tenth = max(1, n_heads_total // 10)
    n = min(tenth, 12)
    dense = sorted({round(1 + i * (tenth - 1) / max(1, n - 1)) for i in range(n)})
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


def parse_setting(text: str) -> tuple[tuple[Scope, ...], bool]:
    """(scopes, whether a probe must fire) of `last_prompt`, `last_prompt+answer`, `last_prompt@probe` ..."""
    scope, at, probe = text.partition("@")
    if at and probe != "probe":
        raise BkdattrError(f"setting {text!r}: expected scopes joined by '+', and '@probe' behind them or nothing")
    return parse_scope(scope), bool(at)


def select(
    study: OpenRun,
    *,
    ks: Sequence[int] | None = None,
    settings: Sequence[str] = SETTINGS,
    sparsity: Sequence[float] = SPARSITY,
    steps: int = STEPS,
    draws: int = 3,
    force: bool = False,
) -> dict[str, Any]:
    """Run the stage; `settings` such as "last_prompt" or "last_prompt+answer@probe" are tried in turn."""
    total = len(study.subject.geometry.heads)
    ks = sorted(set(default_ks(total) if ks is None else ks))
    for text in settings:
        parse_setting(text)
    low_high = tuple(sparsity)
    if (
        not ks
        or ks[0] < 1
        or ks[-1] > total
        or draws < 1
        or not settings
        or len(low_high) != 2
        or not 0 < low_high[0] <= low_high[1]
    ):
        raise BkdattrError(
            f"select: got ks {ks}, {draws} draws, {len(settings)} settings and sparsity {list(sparsity)}, expected k in 1..{total}, at "
            "least one draw, one setting, and a first and last weight of the sparsity above 0"
        )
    options = {"ks": ks, "settings": list(settings), "sparsity": list(low_high), "steps": steps, "draws": draws}
    acie = study.attribution
    with study.stage("select", options | {"top": [str(h) for h in acie.top(max(ks))]}, force) as result:
        if result is not None:
            search = _Search(
                study, ks, (low_high[0], low_high[1]), steps, study.run.ledger("select", {**study.inputs, **options})
            )
            tried: list[dict[str, Any]] = []
            for text in settings:
                if parse_setting(text)[1] and not study.conditions:
                    study.say(f"select: {text} left out, no probe of an earlier layer can be fitted on so few layers or prompts")
                    continue
                tried.append(search.gates(text))
                if tried[-1]["best"]["repaired"]:
                    break
            if not tried:
                raise BkdattrError(
                    f"select: settings {list(settings)} need a probe and none can be fitted; give one without @probe"
                )
            best = min(tried, key=lambda t: _rank(t["best"]))
            result["tried"] = tried
            result["chosen"] = {k: v for k, v in best.items() if k != "best"} | best["best"]
            every = sorted({*ks, best["best"]["k"]})
            result["rows"] = search.curves(best, acie.top(total), every, draws)
            result["needed"] = _needed(result["rows"], draws)
            result["bar"] = BAR
    return study.run.result("select", study.inputs)


class _Search:
    """One run's search: gates and greedy on the attribution split, evaluations on the others, kept in the ledger as they come."""

    def __init__(self, study: OpenRun, ks: Sequence[int], sparsity: tuple[float, float], steps: int, ledger: Any) -> None:
        self.study, self.ks, self.sparsity, self.steps, self.ledger = study, ks, sparsity, steps, ledger
        self.most = max(1, len(study.subject.geometry.heads) // 10)
        self.seed = study.run.config["seed"]
        self.clean = [study.spec.clean(e) for e in study.splits["attribution"]]
        self.triggered = study.run.triggered("attribution")

    def gates(self, setting: str) -> dict[str, Any]:
        """The path of gates in a setting, and the best number of heads on it by the selection split: the fewest that repair; where
        none do, the most answers recovered and clean ones right at 10 % of the heads or fewer."""
        name, (scopes, _) = f"{setting} gates", parse_setting(setting)
        if name not in self.ledger:
            objective = Objective.of(self.study.subject, self.clean, self.triggered, scopes=scopes)
            gates = learn_gates(
                self.study.subject, objective, self._means(scopes), sparsity=self.sparsity, steps=self.steps, when=self._when(setting),
                seed=self.seed, progress=partial(tqdm, desc=f"gates, {setting}"),
            )  # fmt: skip
            sizes = sorted({*self.ks, *range(1, self.most + 1)})
            sets = {str(k): [str(h) for h in gates.top(k)] for k in sizes}
            self.ledger.put(name, {"sets": sets, "sizes": sorted(gates.sets), "log_alpha": _finite(gates.log_alpha)})
        found = self.ledger[name]
        points = []
        for k in sorted({len(found["sets"][str(k)]) for k in self.ks if k <= self.most} | {len(found["sets"][str(self.most)])}):
            name = f"selection {setting} {k}"
            if name not in self.ledger:
                after, before = (
                    self._ablated("selection", found["sets"][str(k)], setting),
                    self.study.evaluator("selection").run(),
                )
                recovered, accuracy = after.recovered, after.clean_accuracy
                row = {"recovered": recovered.value if recovered else 0.0, "clean": accuracy.value if accuracy else 0.0}
                self.ledger.put(name, {"k": k, "repaired": repaired(after, before)} | row | {"rates": after.to_json()})
            points.append(self.ledger[name])
        probe = self._probe(setting)
        where = {"setting": setting} | {f"probe_{k}": probe.get(k) for k in ("layer", "missed", "false_alarms")}
        return where | {"points": points, "best": min(points, key=_rank)} | found

    def curves(self, gates: dict[str, Any], top: Sequence[HeadIndex], ks: Sequence[int], draws: int) -> list[dict[str, Any]]:
        """Every method's curve on the test split, in the setting of `gates`."""
        setting, subject = gates["setting"], self.study.subject
        scopes, when = parse_setting(setting)[0], self._when(setting)
        allowed = set(reachable(subject, when))
        name = f"{setting} greedy"
        if name not in self.ledger:
            some = self.clean[:: math.ceil(len(self.clean) / SEARCH_ROWS)]  # eligible rows and others in their proportion
            ids = {e.id for e in some}
            objective = Objective.of(subject, some, [e for e in self.triggered if e.id in ids], scopes=scopes)
            picked = greedy_heads(
                Repair(subject, objective, self._means(scopes), when=when), max((k for k in ks if k <= self.most), default=self.most),
                progress=partial(tqdm, desc=f"greedy, {setting}"),
            )  # fmt: skip
            self.ledger.put(name, [[str(h), gain] for h, gain in picked])
        orders: list[tuple[str, int | None, Any]] = [
            ("gate", None, gates["sets"]),
            ("greedy", None, [h for h, _ in self.ledger[name]]),
            ("acie", None, [str(h) for h in top if h in allowed]),
        ]
        for d in range(draws):
            drawn = [h for h in random_heads(subject.geometry, len(top), d, self.seed) if h in allowed]
            orders.append(("random", d, [str(h) for h in drawn]))
        before, rows = self.study.evaluator("test").run(), []
        for method, draw, order in tqdm(orders, desc="select: test curves"):
            for k in [0, *ks]:
                heads = (order[str(k)] if k else []) if isinstance(order, dict) else order[:k]
                if len(heads) < k:  # the path was never as wide, or no more heads can be reached
                    continue
                name = f"test {setting} {' '.join(heads)}"
                if name not in self.ledger:
                    after = self._ablated("test", heads, setting) if k else before
                    self.ledger.put(name, after.to_json() | after.against(before) | {"repaired": repaired(after, before)})
                rows.append({"method": method, "draw": draw, "setting": setting, "k": k, "heads": heads} | self.ledger[name])
        return rows

    def _ablated(self, split: str, heads: Sequence[str], setting: str) -> Evaluation:
        scopes, _ = parse_setting(setting)
        edits = ablate_to([HeadIndex.parse(h) for h in heads], self._means(scopes), self._when(setting))
        return self.study.evaluator(split).run(edits)

    def _means(self, scopes: Sequence[Scope]) -> Means:
        memory = self.study.evaluator("test").memory
        for scope in scopes:
            key = (self.study.subject.fingerprint, "clean mean of z", scope)
            if key not in memory:
                memory[key] = scope_mean_z(self.study.subject, self.clean, scope)
        return {scope: memory[self.study.subject.fingerprint, "clean mean of z", scope] for scope in scopes}

    def _probe(self, setting: str) -> dict[str, Any]:
        """The best probe of the first half of the layers, by accuracy on the selection split (ties to the lower layer): heads of its
        own and earlier layers are out of reach, and a triggered prompt that it misses is not repaired. Empty without `@probe`."""
        if not parse_setting(setting)[1]:
            return {}
        first_half = self.study.conditions[: max(1, self.study.subject.geometry.n_layers // 2)]
        return max(first_half, key=lambda c: (c["validation"], -c["layer"]))

    def _when(self, setting: str) -> Condition | None:
        return self._probe(setting).get("condition")


def _finite(log_alpha: Any) -> list[list[float | None]]:
    """None for heads that no gate stands at."""
    return [[float(x) if math.isfinite(x) else None for x in row] for row in log_alpha.tolist()]


def _rank(point: dict[str, Any]) -> tuple[Any, ...]:
    score = point["k"] if point["repaired"] else -(point["recovered"] + point["clean"])
    return (not point["repaired"], score, point["k"], -point["recovered"])


def _needed(rows: list[dict[str, Any]], draws: int) -> list[dict[str, Any]]:
    """Per method (and draw), read off its test curve: the fewest heads with ASR at most the bar, and the fewest that repair."""
    out = []
    for method, draw in [("gate", None), ("greedy", None), ("acie", None), *(("random", d) for d in range(draws))]:
        curve = [r for r in rows if r["method"] == method and r["draw"] == draw]
        low = next((r["k"] for r in curve if r["asr"]["value"] <= BAR["asr"]), None)
        fixed = next((r["k"] for r in curve if r["repaired"]), None)
        out.append({"method": method, "draw": draw, "asr": low, "repair": fixed, "tried": max(r["k"] for r in curve)})
    return out
