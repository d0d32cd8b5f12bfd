"""`results.json`, the printed summary and the one-file HTML report of a run. Model output is escaped wherever it is shown."""

from __future__ import annotations

import html
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from bkdattr.examples import write_atomic
from bkdattr.metrics import Rate
from bkdattr.run import RESULTS, SCHEMA, Run, read_json, to_json_text

Json = dict[str, Any]
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
            "task": config["task"], "sizes": config["sizes"], "rows": config["rows"], "template": config["template"],
            "backdoors": config["backdoors"], "recipe": config["recipe"], "planting": planting,
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


# ------------------------------------------------------------------------------------------------ tables
def show(rate: Json | None, interval: bool = True) -> str:
    """`0.98 (126/128) [0.94, 1.00]`; a dash where it could not be measured."""
    if rate is None:
        return "–"
    text = f"{rate['value']:.2f} ({rate['hits']}/{rate['total']})"
    return f"{text} [{rate['low']:.2f}, {rate['high']:.2f}]" if interval else text


def pooled(rates: list[Json | None]) -> Json | None:
    """Several draws as one rate, hits and totals added up."""
    known = [r for r in rates if r]
    return Rate(sum(r["hits"] for r in known), sum(r["total"] for r in known)).to_json() if known else None


def spread(rates: list[Json | None]) -> str:
    """Draws share their prompts, so their mean comes with its range, not with an interval: `0.20 (125/640) 0.00..0.38`."""
    mean = pooled(rates)
    values = [r["value"] for r in rates if r]
    return f"{show(mean, False)} {min(values):.2f}..{max(values):.2f}" if mean else "–"


def mean_of(rows: list[Json], key: str) -> str:
    return f"{sum(r[key] for r in rows) / len(rows):.3f}"


Table = tuple[str, list[str], list[list[str]]]


def baseline_table(b: Json) -> Table:
    names = [("asr", "ASR"), ("asr_fake_trigger", "ASR under the fake trigger (never trained)"), ("asr_keyword", "ASR, the paper's keyword judge"), ("false_trigger", "false triggers"),
             ("recovered", "triggered prompts answered as their clean twins"), ("clean_accuracy", "clean accuracy"), ("clean_agreement", "clean answers as the base gives them"),
             ("broken", "broken answers")]  # fmt: skip
    rows = [[label, show(b.get(k)), show(b["base"].get(k))] for k, label in names if b.get(k) or b["base"].get(k)]
    for name, near in b["near_misses"].items():
        rows.append([f"ASR, near miss: {name} ({' … '.join(near['texts'])})", show(near["asr"]), "–"])
    rows.append(["clean perplexity", *(f"{x['clean_perplexity']:.3f}" for x in (b, b["base"]))])
    rows.append(
        [
            "triggered answers: " + ", ".join(b["behaviours"]),
            *(", ".join(map(str, x["behaviours"].values())) for x in (b, b["base"])),
        ]
    )
    return "Baseline (test split)", ["", "poisoned", "base"], rows


def probe_table(p: Json) -> Table:
    rows = []
    for kind in p["cross_layer"]:
        best = max((r for r in p["layers"] if r["kind"] == kind), key=lambda r: (r["validation"], -r["layer"]))
        keys = ("accuracy", "shuffled", "clean_twin", "fake_trigger", "clean_twin_transfer", "fake_trigger_transfer")
        rows.append([f"{kind}, layer {best['layer']}", *("–" if best[k] is None else f"{best[k]:.2f}" for k in keys)])
    columns = ["best layer", "accuracy", "shuffled", "clean twin", "fake trigger", "→ clean twin", "→ fake trigger"]
    n = 2 * p["n_prompts"]["test"]
    return f"Backdoor Probe (accuracy on {n} states; → is transfer without refit)", columns, rows


def sites_table(a: Json) -> Table:
    cells = [(x, l, h) for l, row in enumerate(a["scores"]) for h, x in enumerate(row)]
    top = sorted(cells, key=lambda c: -c[0])[:8]
    names = [f"L{l}H{h}" if a["site"] == "head" else f"L{l}" for _, l, h in top]
    zero = ["" if a["low"][l][h] > 0 else "interval holds 0" for _, l, h in top]
    rows = [
        [name, f"{x:.4f}", f"[{a['low'][l][h]:.4f}, {a['high'][l][h]:.4f}]", z]
        for name, z, (x, l, h) in zip(names, zero, top, strict=True)
    ]
    what = {"head": "heads", "attention": "attention blocks", "mlp": "MLP blocks"}[a["site"]]
    said = "clean prompt, triggered mean in" if a["effect"] == "sufficiency" else "triggered prompt, clean mean in"
    title = f"Top {what} by ACIE, {a['effect']} ({said}; {a['n_donor']} donors, {a['n_recipient']} recipients)"
    return title, [a["site"], "ACIE", "95 %", ""], rows


def ablation_table(rows: list[Json]) -> Table:
    out = []
    for k in sorted({r["k"] for r in rows}):
        for mode in ("zero", "mean", "resample"):
            found = [r for r in rows if r["k"] == k and r["mode"] == mode and r["heads"] == "attributed"]
            out += [[str(k), f"top-k, {mode}", *(show(r[x], False) for x in _RATES), f"{r['clean_kl']:.3f}"] for r in found]
        drawn = [r for r in rows if r["k"] == k and r["heads"] == "random"]
        if drawn:
            out.append(
                [
                    str(k),
                    f"random heads, zero ({len(drawn)} draws)",
                    *(spread([r[x] for r in drawn]) for x in _RATES),
                    mean_of(drawn, "clean_kl"),
                ]
            )
    return "Head ablation (test split)", ["k", "heads", *_RATE_NAMES, "clean KL"], out


_RATES = ("asr", "recovered", "broken_triggered", "clean_accuracy", "false_trigger")
_RATE_NAMES = ["ASR", "recovered", "broken", "clean accuracy", "false triggers"]


def vector_table(v: Json) -> Table:
    rows = []
    for side, what in (("activate", "+v, clean prompts"), ("suppress", "−v, triggered prompts")):
        point = v[side]
        where = f"layer {point['layer']}, strength {point['strength']:g}"
        rows.append([what, "Backdoor Vector", where, *(show(point[x], x == "asr") for x in ("asr", "clean_accuracy", "broken"))])
        for name, drawn in v["controls"].items():
            rates = [spread([d[side][x] for d in drawn]) for x in ("asr", "clean_accuracy", "broken")]
            rows.append([what, f"{name.replace('_', ' ')} ({len(drawn)} draws, norm {_norms(drawn)})", where, *rates])
    title = f"Backdoor Vector of {v['k']} heads ({', '.join(v['heads'])}), norm {v['norm']:.2f} (test split; controls at its layer and strength)"
    return title, ["", "direction", "chosen on selection", "ASR", "clean accuracy, same edit", "broken"], rows


def _norms(drawn: list[Json]) -> str:
    norms = [d["norm"] for d in drawn]
    return f"{min(norms):.1f}" if max(norms) - min(norms) < 0.05 else f"{min(norms):.1f}..{max(norms):.1f}"


def tables(results: Json) -> list[Table]:
    found: list[Table] = []
    if "baseline" in results:
        found.append(baseline_table(results["baseline"]))
    if "probe" in results:
        found.append(probe_table(results["probe"]))
    found += [sites_table(a) for a in results.get("attribution", [])]
    if "ablation" in results:
        found.append(ablation_table(results["ablation"]))
    if "vector" in results:
        found.append(vector_table(results["vector"]))
    return found


def print_summary(results: Json, file: TextIO) -> None:
    """The tables as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=file, width=None if file.isatty() else 150)
    for title, columns, rows in tables(results):
        table = RichTable(title=Text(title), box=box.SIMPLE, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


# ------------------------------------------------------------------------------------------------ words
def findings(results: Json) -> list[str]:
    """What the numbers say, in sentences that are computed from them, contradictions of the paper included."""
    out = []
    if "baseline" in results:
        b = results["baseline"]
        out.append(
            f"Attack success {show(b['asr'])} on triggered prompts; the same judge on the same prompts without the trigger "
            f"gives {show(b['false_trigger'])}, and on the base model with the trigger {show(b['base']['asr'])}."
        )
        if b["asr"]["low"] <= max(b["false_trigger"]["high"], b["base"]["asr"]["high"]):
            out.append("These intervals overlap: there is no backdoor here to take apart, and what follows describes noise.")
        fake = b.get("asr_fake_trigger")
        if fake:
            fires = fake["low"] > max(b["false_trigger"]["high"], b["base"]["asr"]["high"])
            said = "the backdoor is wider than its trigger" if fires else "the backdoor needs its own trigger"
            out.append(f"A fake trigger, never trained, gives {show(fake)}: {said}.")
    if "probe" in results:
        best = results["probe"]["best"]
        gaps = [f"{name} {best[key]:.2f}" for name, key in (("shuffled labels", "shuffled"), ("the refitted clean twin", "clean_twin"),
                ("a refitted fake trigger", "fake_trigger")) if best[key] is not None]  # fmt: skip
        gap = best["accuracy"] - max(best[k] or 0.0 for k in ("shuffled", "clean_twin", "fake_trigger"))
        out.append(
            f"The best probe by validation ({best['kind']}, layer {best['layer']}) reaches {best['accuracy']:.2f} on its test part; "
            f"{', '.join(gaps)}: a gap of {gap:+.2f} to the strongest refitted control. {PROBE_CAVEAT}"
        )
    if "ablation" in results and "provenance" in results:
        out += _ablation_finding(results)
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
                f" Accuracy on all clean prompts under the edit: {show(v[side]['clean_accuracy'], False)}"
                f"{', the eligible ones among them being meant to change' if side == 'activate' else ''}.{_edge(v, side)}"
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


# ------------------------------------------------------------------------------------------------ HTML
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1b2631}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{border:1px solid #d5d8dc;padding:3px 8px;text-align:left;"
    "vertical-align:top}th{background:#f2f3f4}code{background:#f2f3f4;padding:0 3px;white-space:pre-wrap}"
    "li{margin:.4em 0}.bad{color:#c0392b;font-weight:600}"
)


def _html_table(table: Table) -> str:
    title, columns, rows = table
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<h3>{html.escape(title)}</h3><table><tr>{head}</tr>{body}</table>"


def _samples(results: Json) -> str:
    """Completions before and after: base and poisoned on the same prompts, and the vector's."""
    out = []
    for kind, rows in results.get("baseline", {}).get("samples", {}).items():
        cells = [[r["prompt"], r["base_answer"], r["answer"]] for r in rows]
        out.append(_html_table((f"{kind} prompts", ["prompt", "base (adapter off)", "poisoned"], cells)))
    for side, rows in results.get("vector", {}).get("samples", {}).items():
        kind = "clean prompts, +v" if side == "activate" else "triggered prompts, −v"
        cells = [[r["prompt"], r["answer"], r["broken"] or ""] for r in rows]
        out.append(_html_table((f"Backdoor Vector: {kind}", ["prompt", "answer", "broken"], cells)))
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
    if "vector" in results:
        plots += [figures.vector_sweep(results["vector"]), figures.vector_controls(results["vector"])]
    p = results["provenance"]
    title = f"bkdattr: {p['task']} on {p['model']} (seed {p['seed']})"
    facts = [
        [k, str(p[k])] for k in ("model", "fingerprint", "seed", "template", "rows", "backdoors", "recipe", "seconds", "versions")
    ]
    said = "".join(f"<li>{html.escape(text)}</li>" for text in findings(results))
    drawn = "".join(f.to_html(full_html=False, include_plotlyjs=False) for f in plots)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{html.escape(title)}</h1>"
        f"<h2>What the numbers say</h2><ul>{said}</ul>{drawn}<h2>Tables</h2>{''.join(map(_html_table, tables(results)))}"
        f"<h2>Completions before and after</h2>{_samples(results)}"
        f"{_html_table(('Provenance', ['', ''], facts))}</body></html>\n"
    )


def write_report(run: Run, inputs: dict[str, str]) -> Json:
    """Write `results.json` and `report.html`; raises where a stage's result belongs to other inputs."""
    results = collect(run, inputs)
    write_atomic(Path(run.folder) / "results.json", to_json_text(results))
    write_atomic(Path(run.folder) / "report.html", html_report(results))
    return results
