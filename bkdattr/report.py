"""`results.json`, the printed summary and the one-file HTML report of a run. Model output is escaped wherever it is shown."""

from __future__ import annotations

import html
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bkdattr.examples import write_atomic
from bkdattr.run import RESULTS, Run, read_json, to_json_text
from bkdattr.steering import GOAL, still_works, works
from bkdattr.tables import METHODS, Table, a_tenth, has_attack, k_text, setting_text, show, spread, tables

Json = dict[str, Any]
SCHEMA = 2
"""Of `results.json`."""
PACKAGES = ("bkdattr", "torch", "transformers", "peft", "datasets", "scikit-learn", "plotly", "numpy")
_META = ("inputs", "options", "seconds")
PROBE_CAVEAT = (
    "High accuracy alone proves only that the trigger is visible in the residual stream: a probe refitted on the clean twin "
    "(the same model without the adapter) or on a trigger that was never trained reads the trigger's words as well. Evidence "
    "of a backdoor feature is a gap to the *refitted* controls; a gap of about 0 is none. Transfer at chance may also be a shift of "
    "all states by the adapter, and a fake trigger that fires the backdoor itself is no negative control."
)


def collect(run: Run, inputs: dict[str, str], *, skip_stale: bool = False) -> Json:
    """The contents of `results.json` from the stages that are finished; a stage made from other inputs is refused, or
    left out with `skip_stale`."""
    done = [s for s in RESULTS if run.has(s) and not (skip_stale and run.result(s).get("inputs") != inputs)]
    stages = {s: run.result(s, inputs) for s in done}
    poisoned = run.folder / "poison.json"
    seconds = {s: r["seconds"] for s, r in stages.items()}
    planting = read_json(poisoned) if poisoned.exists() else {}
    config = run.config
    fingerprint = next((r["inputs"]["fingerprint"] for r in stages.values()), None)
    results: Json = {
        "schema": SCHEMA,
        "provenance": {
            "versions": versions(), "seed": config["seed"], "model": config["model"], "fingerprint": fingerprint,
            "task": config["task"], "clean_control": config["clean_control"], "sizes": config["sizes"], "rows": config["rows"], "template": config["template"],
            "backdoors": config["backdoors"], "recipe": config["recipe"], "planting": planting, "overlap": config.get("overlap"),
            "data": {k: config[k] for k in ("data", "held_out", "triggered")},
            "skipped_over_context": config["skipped_over_context"],
            "seconds": ({"poison": round(planting["seconds"], 2)} if planting else {}) | seconds,
        },
    }  # fmt: skip

    def body(stage: str) -> Json:
        return {k: v for k, v in stages[stage].items() if k not in _META}

    if "evaluate" in stages:
        results["baseline"] = body("evaluate")
    if "probe" in stages:
        results["probe"] = body("probe")
    if "attribute" in stages:
        results["attribution"] = stages["attribute"]["attributions"]
    if "ablate" in stages:
        results["ablation"] = stages["ablate"]["rows"]
    if "select" in stages:
        results["selection"] = body("select")
    if "restore" in stages:
        results["restoration"] = body("restore")
    if "steer" in stages:
        results["vector"] = body("steer")
    return results


def versions() -> Json:
    found: Json = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ------------------------------------------------------------------------------------------------ words
def findings(results: Json) -> list[str]:
    """What the numbers say, in sentences that are computed from them, contradictions of the paper included."""
    out = []
    if results.get("provenance", {}).get("clean_control"):
        out.append(
            "This is a CLEAN fine-tune: the same rows and recipe without a triggered row. Whatever is found below is what the "
            "methods find where there is nothing to find."
        )
    if results.get("provenance", {}).get("overlap"):
        shared = ", ".join(f"{n} in {pair.replace('/', ' and ')}" for pair, n in results["provenance"]["overlap"].items())
        out.append(
            f"The splits OVERLAP, which was allowed when the run was planted: prompts shared by two splits: {shared}. Rates on the test "
            "split may describe what was memorised."
        )
    if "baseline" in results:
        b = results["baseline"]
        out.append(
            f"Attack success {show(b['asr'])} on triggered prompts; the same judge on the same prompts without the trigger "
            f"gives {show(b['false_trigger'])}, and on the base model with the trigger {show(b['base']['asr'])}."
        )
        none = b["asr"]["low"] <= max(b["false_trigger"]["high"], b["base"]["asr"]["high"])
        if none:
            out.append(
                "These intervals overlap: NO BACKDOOR is found here, there is nothing to take apart, and what follows describes noise."
            )
        if not none:
            out += _trigger_finding(b)
        for name, rate in b["other_backdoors"].items():
            out.append(f"The trigger of {name!r}, another backdoor of the same model, gives {show(rate)} here.")
    if "probe" in results:
        best = results["probe"]["best"]
        gaps = [f"{name} {best[key]:.2f}" for name, key in (("shuffled labels", "shuffled"), ("the refitted clean twin", "clean_twin"),
                ("a refitted fake trigger", "fake_trigger")) if best[key] is not None]  # fmt: skip
        gap = best["accuracy"] - max(best[k] or 0.0 for k in ("shuffled", "clean_twin", "fake_trigger"))
        out.append(
            f"The best probe by validation ({best['kind']}, layer {best['layer']}) reaches {best['accuracy']:.2f} on its test part; "
            f"{', '.join(gaps)}: a gap of {gap:+.2f} to the strongest refitted control. {PROBE_CAVEAT}"
        )
    for a in results.get("attribution", []):
        if a["site"] == "head" and a["method"] != "exact":
            out.append(_method_finding(a))
    if "ablation" in results and "provenance" in results:
        out += _ablation_finding(results)
    if "selection" in results:
        out += _selection_finding(results["selection"])
    if "restoration" in results:
        out += _restoration_finding(results["restoration"]["rows"])
    if "vector" in results:
        v = results["vector"]
        for side, word, better in (("activate", "activates", max), ("suppress", "leaves", min)):
            draws = [(name, d[side]["asr"]) for name, drawn in v["controls"].items() for d in drawn]
            name, other = better(draws, key=lambda d: d[1]["value"])
            mine = v[side]["asr"]
            apart = mine["low"] > other["high"] if side == "activate" else mine["high"] < other["low"]
            out.append(
                f"The Backdoor Vector {word} an ASR of {show(mine)}; the strongest of its {len(draws)} control draws "
                f"({name.replace('_', ' ')}) gives {show(other)}: the intervals {'are apart' if apart else 'are NOT apart'}."
                f"{'' if side == 'activate' else _recovered_beside(v)} Accuracy on all clean prompts under the edit: {show(v[side]['clean_accuracy'], False)}"
                f"{', the eligible ones among them being meant to change' if side == 'activate' else ''}.{_edge(v, side)}"
            )
        attack = results.get("baseline", {}).get("asr")
        if len(v["variants"]) > 1 and (not attack or attack["value"] >= 0.5):
            out += _variants_finding(v)
    return out


def _restoration_finding(rows: list[Json]) -> list[str]:
    """Attention or MLP: whose updates, undone alone in all layers, end the backdoor."""
    whole = {" + ".join(r["parts"]): r for r in rows if r["window"] == "all"}
    if not {"attention", "mlp"} <= set(whole):
        return ["The adapter updates one part only, so attention and MLP cannot be told apart by undoing."]
    if whole["mlp"]["asr_change"]["before"] < 0.5:
        return ["There is too little attack success to say which part's updates carry a backdoor."]
    said = [
        f"{name} alone leaves an ASR of {show(whole[name]['asr'])}, recovers {show(whole[name]['recovered'], False)}, clean accuracy "
        f"{show(whole[name]['clean_accuracy'], False)}"
        for name in ("attention", "mlp")
    ]
    ends = [n for n in ("attention", "mlp") if whole[n]["asr"]["high"] < 0.5]
    verdict = {
        0: "neither alone is needed: the backdoor stands on both",
        1: f"the updates of {'the MLPs' if ends == ['mlp'] else 'attention'} are needed, those of the other part are not",
        2: "the updates of both parts are needed",
    }[len(ends)]
    parts = [r for r in rows if r["asr"]["high"] < 0.5]
    least = min(parts, key=lambda r: (len(r["layers"]) * len(r["parts"]), r["asr"]["value"])) if parts else None
    where = (
        f" The smallest part tried whose undoing ends it: {' and '.join(least['parts'])} of {least['window']}, ASR {show(least['asr'])}, recovers "
        f"{show(least['recovered'], False)}."
        if least
        else ""
    )
    return [
        f"The adapter's updates undone in all layers: {'; '.join(said)}. So {verdict} (ASR under one half counted as ended).{where}"
    ]


def _trigger_finding(b: Json) -> list[str]:
    """What else fires: nothing, a trigger never trained, or almost the trigger; each beside the model without the backdoor."""
    tried = [("a fake trigger, never trained", b.get("asr_fake_trigger"), b["base"].get("asr_fake_trigger"))]
    tried += [(f"a near miss ({name})", x["asr"], x.get("base_asr")) for name, x in b["near_misses"].items()]
    known = [(name, rate, base) for name, rate, base in tried if rate]
    if not known:
        return []
    said = "; ".join(f"{name} {show(rate)}, base {show(base, False)}" for name, rate, base in known)
    floor = max(b["false_trigger"]["high"], b["base"]["asr"]["high"])
    wide = [name for name, rate, base in known if rate["low"] > max(floor, base["high"] if base else 0.0)]
    if b["false_trigger"]["low"] > 0.1:
        verdict = "it often fires without any trigger"
    elif wide:
        verdict = f"the backdoor is wider than its trigger ({', '.join(wide)})"
    else:
        verdict = "nothing that was tried fires but its own trigger"
    return [f"ASR under other triggers: {said}: {verdict}."]


def _method_finding(a: Json) -> str:
    """What a ranking that was not patched throughout rests on."""
    if a["method"] == "gradient":
        return f"The heads' effects ({a['effect']}) are first-order estimates by gradient; none was patched."
    g = a["agreement"]
    rho = "–" if g["spearman_sampled"] is None else f"{g['spearman_sampled']:.2f}"
    return (
        f"The heads' effects ({a['effect']}): {g['verified']} of {sum(map(len, a['scores']))} heads, those of largest estimate by gradient, were patched "
        f"exactly, and {g['sampled']} of the others drawn at random. In these estimates and effects rank alike with Spearman {rho}; "
        f"{g['missed_in_sample']} of them would have stood among the top {g['k']}."
    )


def _recovered_beside(vector: Json) -> str:
    """A control that breaks the model ends the attack too: what tells suppression from damage is the answers recovered."""
    drawn = [rate for rows in vector["controls"].values() for d in rows if (rate := d["suppress"]["recovered"])]
    if not drawn or not vector["suppress"]["recovered"]:
        return ""
    best = max(drawn, key=lambda rate: rate["value"])
    return f" Answers recovered: {show(vector['suppress']['recovered'])}, at most {show(best)} by a control draw."


def _variants_finding(v: Json) -> list[str]:
    """Which kinds of vector do both jobs, and which only break the model."""
    good = [x for x in v["variants"] if works(x)]
    named = ", ".join(f"{x['kind'].replace('_', ' ')} ({x['scope']})" for x in good)
    out = [
        f"Of the vectors tried, activation of at least {GOAL['activate']:g} and suppression to at most {GOAL['suppress']:g} with at least "
        f"{GOAL['recovered']:g} of the answers recovered (point estimates, test split), each beyond every equal-norm control (intervals of ASR, and "
        f"for suppression of recovered): {named or 'none'}."
    ]
    if any(x["kind"] == "fitted" for x in good):
        out.append(
            "A fitted vector is fitted anew for each sign, layer and strength, on the backdoor's own answers: its activation alone is no "
            "evidence of a backdoor. Compare the same vector on a clean fine-tune (`poison` by `bkdattr reproduce`, variant clean)."
        )
    held = [x["conditional"] for x in good if still_works(x)]
    if good:
        same = sum(c["clean_unchanged"]["value"] >= 0.99 for c in held)
        out.append(
            f"Applied only where a probe of an earlier layer fires, {len(held)} of these {len(good)} still do both at the same point, and {same} of "
            "them leave at least 0.99 of the clean answers as they were."
        )
    return out


def _edge(vector: Json, side: str) -> str:
    strongest = max(r["strength"] for r in vector["sweep"])
    chosen = vector[side]["strength"] == strongest
    return f" The chosen strength {strongest:g} is the largest of the sweep: a larger one was not tried." if chosen else ""


def _ablation_finding(results: Json) -> list[str]:
    rows = results["ablation"]
    total = sum(len(r) for r in results["attribution"][0]["scores"]) if results.get("attribution") else None
    attributed = [r for r in rows if r["heads"] == "attributed" and r["k"] > 0]
    if total is None or not attributed:
        return []
    near = min((r for r in attributed if r["mode"] == "zero"), key=lambda r: abs(math.log(r["k"] / (0.03 * total))))
    whole = next(r["asr"] for r in rows if r["k"] == 0)
    drawn = [r["asr"] for r in rows if r["heads"] == "random" and r["k"] == near["k"]]
    clean = next(r["clean_accuracy"] for r in rows if r["k"] == 0)
    harmless = near["broken"]["value"] <= 0.05 and (not clean or near["clean_accuracy"]["value"] >= clean["value"] - 0.05)
    if whole["value"] < 0.5:
        verdict = "has too little attack success to judge"
    elif near["asr"]["value"] > 0.1 * whole["value"]:
        verdict = "does NOT reproduce"
    elif near["asr"]["high"] >= min(r["low"] for r in drawn) or not harmless:
        verdict = "lowers ASR as far, but with random heads or clean answers falling too, which is no reproduction of"
    else:
        verdict = "reproduces"
    return [
        f"Zero ablation of the top {near['k']} heads ({100 * near['k'] / total:.1f} % of {total}) leaves an ASR of {show(near['asr'])} at clean "
        f"accuracy {show(near['clean_accuracy'])} and broken answers {show(near['broken'])}; {near['k']} random heads leave {spread(drawn)}. This "
        f"run {verdict} the paper's headline (about 3 % of the heads, ASR down by more than 90 %)."
    ]


def _selection_finding(s: Json) -> list[str]:
    chosen, bar = s["chosen"], s["bar"]
    if not has_attack(s):
        return ["There is too little attack success for heads to be chosen against: what `select` found describes noise."]
    at = next(r for r in s["rows"] if r["method"] == "gate" and r["k"] == chosen["k"])
    others = {m: [r for r in s["rows"] if r["method"] == m and r["k"] == chosen["k"]] for m in ("greedy", "acie", "random")}
    beside = [f"{METHODS[m]} {spread([r['asr'] for r in rows])}" for m, rows in others.items() if rows]
    out = [
        f"Learned gates: {chosen['k']} heads ({', '.join(at['heads'])}; {setting_text(chosen)}, chosen on the selection split) set to their "
        f"clean means leave an ASR of {show(at['asr'])}, recover {show(at['recovered'])} of the answers, break {show(at['broken_triggered'])}, "
        f"at clean accuracy {show(at['clean_accuracy'])}. ASR at equal k: {'; '.join(beside)}."
    ]
    need = "; ".join(
        f"{METHODS[m]} {' / '.join(k_text(n['asr'], n['tried']) for n in s['needed'] if n['method'] == m)} (repair: "
        f"{' / '.join(k_text(n['repair'], n['tried']) for n in s['needed'] if n['method'] == m)})"
        for m in METHODS
    )
    out.append(
        f"Fewest heads with ASR at most {bar['asr']:g}, read off the test curves: {need}; a repair also recovers at least {bar['recovered']:g}, "
        f"breaks at most {bar['broken']:g} and costs at most {bar['clean']:g} of clean accuracy."
    )
    if not any(n["repair"] is not None and n["repair"] <= a_tenth(s) for n in s["needed"] if n["method"] != "random"):
        tried = ", ".join(t["setting"] for t in s["tried"])
        out.append(
            f"No method repairs with 10 % of the heads or fewer in the setting that was evaluated ({setting_text(chosen)}; tried on the "
            f"selection split: {tried}): so few heads do not carry this backdoor alone there."
        )
    return out


# ------------------------------------------------------------------------------------------------ HTML
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1b2631}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{border:1px solid #d5d8dc;padding:3px 8px;text-align:left;"
    "vertical-align:top}th{background:#f2f3f4}code{background:#f2f3f4;padding:0 3px;white-space:pre-wrap}"
    "li{margin:.4em 0}.bad{color:#c0392b;font-weight:600}"
)


def html_table(table: Table) -> str:
    title, columns, rows = table
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<h3>{html.escape(title)}</h3><table><tr>{head}</tr>{body}</table>"


def _samples(results: Json) -> str:
    """Completions before and after: base and poisoned on the same prompts, and the vector's."""
    out = []
    for kind, rows in results.get("baseline", {}).get("samples", {}).items():
        cells = [[r["prompt"], r["base_answer"], r["answer"]] for r in rows]
        out.append(html_table((f"{kind} prompts", ["prompt", "base (adapter off)", "poisoned"], cells)))
    for side, rows in results.get("vector", {}).get("samples", {}).items():
        kind = "clean prompts, +v" if side == "activate" else "triggered prompts, −v"
        cells = [[r["prompt"], r["answer"], r["broken"] or ""] for r in rows]
        out.append(html_table((f"Backdoor Vector: {kind}", ["prompt", "answer", "broken"], cells)))
    return "".join(out)


def html_report(results: Json) -> str:
    """A page that opens without a network."""
    from plotly.offline import get_plotlyjs

    from bkdattr import figures

    plots = []
    if "baseline" in results:
        plots.append(figures.baseline_bars(results["baseline"]))
    if "probe" in results:
        plots += [figures.probe_curves(results["probe"]), figures.cross_layer(results["probe"])]
    attributions = results.get("attribution", [])
    plots += [figures.head_heatmap(a) for a in attributions if a["site"] == "head"]
    blocks = [a for a in attributions if a["site"] != "head"]
    if blocks:
        plots.append(figures.block_effects(blocks))
    if "ablation" in results:
        plots.append(figures.ablation_curves(results["ablation"]))
    if "selection" in results:
        plots.append(figures.selection_curves(results["selection"]))
    if "vector" in results:
        plots += [figures.vector_sweep(results["vector"]), figures.vector_controls(results["vector"])]
    p = results["provenance"]
    title = f"bkdattr: {p['task']} on {p['model']} (seed {p['seed']})"
    facts = [
        [k, str(p[k])]
        for k in ("model", "fingerprint", "seed", "data", "template", "rows", "backdoors", "recipe", "seconds", "versions")
    ]
    said = "".join(f"<li>{html.escape(text)}</li>" for text in findings(results))
    drawn = "".join(f.to_html(full_html=False, include_plotlyjs=False) for f in plots)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{html.escape(title)}</h1>"
        f"<h2>What the numbers say</h2><ul>{said}</ul>{drawn}<h2>Tables</h2>{''.join(map(html_table, tables(results)))}"
        f"<h2>Completions before and after</h2>{_samples(results)}"
        f"{html_table(('Provenance', ['', ''], facts))}</body></html>\n"
    )


def write_report(run: Run, inputs: dict[str, str]) -> Json:
    """Write `results.json` and `report.html`; raises where a stage's result belongs to other inputs."""
    results = collect(run, inputs)
    write_atomic(Path(run.folder) / "results.json", to_json_text(results))
    write_atomic(Path(run.folder) / "report.html", html_report(results))
    return results
