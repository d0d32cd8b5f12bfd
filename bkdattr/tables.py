"""The tables of a run, as values `(title, columns, rows)` of text, and how a rate is written."""

from __future__ import annotations

from typing import Any, TextIO

from bkdattr.metrics import Rate

Json = dict[str, Any]


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
        rows.append([f"ASR, near miss: {name} ({' … '.join(near['texts'])})", show(near["asr"]), show(near.get("base_asr"))])
    rows += [[f"ASR under the trigger of another backdoor: {name}", show(r), "–"] for name, r in b["other_backdoors"].items()]
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


METHODS = {"gate": "learned gate", "greedy": "greedy", "acie": "ACIE top-k", "random": "random heads"}


def k_text(k: int | None, tried: int) -> str:
    return f"more than {tried}" if k is None else str(k)


def a_tenth(selection: Json) -> int:
    """10 % of the model's heads, at least one."""
    return max(1, sum(map(len, selection["tried"][0]["log_alpha"])) // 10)


def has_attack(selection: Json) -> bool:
    """Whether the un-edited model has an attack success to repair: at least one half on the test split."""
    return bool(next(r["asr"]["value"] for r in selection["rows"] if r["k"] == 0) >= 0.5)


def setting_text(chosen: Json) -> str:
    """`last prompt token`, or with the probe that must fire."""
    scope = chosen["setting"].partition("@")[0].replace("last_prompt", "last prompt token").replace("+", " + ")
    return scope + (f", only where the probe of layer {chosen['probe_layer']} fires" if chosen["probe_layer"] is not None else "")


def selection_table(s: Json) -> Table:
    out = []
    for k in sorted({r["k"] for r in s["rows"]}):
        for method, name in METHODS.items():
            found = [r for r in s["rows"] if r["k"] == k and r["method"] == method]
            if len(found) == 1 and method != "random":
                rates = [*(show(found[0][x], False) for x in _RATES), f"{found[0]['clean_kl']:.3f}"]
            elif found:
                rates = [*(spread([r[x] for r in found]) for x in _RATES), mean_of(found, "clean_kl")]
            else:
                continue
            out.append([str(k), name + (f" ({len(found)} draws)" if method == "random" else ""), *rates])
    chosen = s["chosen"]
    title = (
        f"Heads chosen jointly, set to their clean means, {setting_text(chosen)} (test split; the setting and k = {chosen['k']} chosen on "
        "the selection split)"
    )
    return title, ["k", "heads", *_RATE_NAMES, "clean KL"], out


def restoration_table(r: Json) -> Table:
    rows = [
        [
            " + ".join(x["parts"]),
            x["window"],
            *(show(x[n], n == "asr") for n in _RATES),
            f"{x['clean_kl']:.3f}" if x["clean_kl"] else "–",
        ]
        for x in r["rows"]
    ]
    return "Adapter undone in part (test split)", ["updates of", "layers", *_RATE_NAMES, "clean KL"], rows


def vector_table(v: Json) -> Table:
    rows = []
    for side, what in (("activate", "+v, clean prompts"), ("suppress", "−v, triggered prompts")):
        point = v[side]
        where = f"layer {point['layer']}, strength {point['strength']:g}"
        rows.append([what, "Backdoor Vector", where, *(show(point[x], x == "asr") for x in ("asr", "clean_accuracy", "broken"))])
        for name, drawn in v["controls"].items():
            rates = [spread([d[side][x] for d in drawn]) for x in ("asr", "clean_accuracy", "broken")]
            rows.append([what, f"{name.replace('_', ' ')} ({len(drawn)} draws, norm {_norms(drawn)})", where, *rates])
    of = f"{v['k']} heads ({', '.join(v['heads'])})" if v["heads"] else f"all heads ({v['kind']})"
    title = f"Backdoor Vector of {of}, norm {v['norm']:.2f} (test split; controls at its layer and strength)"
    return title, ["", "direction", "chosen on selection", "ASR", "clean accuracy, same edit", "broken"], rows


def variants_table(v: Json) -> Table:
    """Every kind of vector at its own layer and strength; the strongest single draw of its equal-norm controls beside it."""
    rows = []
    for x in v["variants"]:
        for side, name in (("activate", "+v"), ("suppress", "−v")):
            p = x[side]
            drawn = [d[side] for c in ("random_heads_matched", "random_direction") for d in x["controls"][c]]
            key = "asr" if side == "activate" else "recovered"
            best = max(drawn, key=lambda d: d[key]["value"] if d[key] else 0.0)
            control = show(best["asr"]) + ("" if side == "activate" else f"; recovered {show(best['recovered'], False)}")
            kept = "" if side == "activate" else show(p["recovered"], False)
            where = f"layer {p['layer']}, strength {p['strength']:g}"
            rows.append([f"{x['kind'].replace('_', ' ')}, {x['scope']}", name, where, show(p["asr"]), control, kept,
                         show(p["broken"], False), show(p["clean_unchanged"], False), f"{p['clean_kl']:.3f}"])  # fmt: skip
        c = x["conditional"]
        if c:
            where = f"layer {c['layer']}, strength {c['strength']:g}, if the probe of layer {c['probe_layer']} fires"
            rows.append(["", "−v, conditional", where, show(c["asr"]), "", show(c["recovered"], False),
                         show(c["broken"], False), show(c["clean_unchanged"], False), f"{c['clean_kl']:.3f}"])  # fmt: skip
    columns = ["vector, scope", "", "chosen on selection", "ASR", f"strongest of {len(drawn)} equal-norm controls (−v: the one that recovers most)", "recovered", "broken",
               "clean answers unchanged", "clean KL"]  # fmt: skip
    return "Vectors of every kind (test split)", columns, rows


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
    if "selection" in results:
        found.append(selection_table(results["selection"]))
    if "restoration" in results:
        found.append(restoration_table(results["restoration"]))
    if "vector" in results:
        found.append(vector_table(results["vector"]))
        if len(results["vector"].get("variants", [])) > 1:
            found.append(variants_table(results["vector"]))
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
