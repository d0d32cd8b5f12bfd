"""One table over all runs of a folder: the paper's tables, the columns that it lacks, and what each run says about the goals."""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bkdattr.errors import BkdattrError
from bkdattr.examples import write_atomic
from bkdattr.joint import BAR
from bkdattr.metrics import expected_jaccard, jaccard, kendall
from bkdattr.report import SCHEMA, html_table
from bkdattr.run import read_json, to_json_text
from bkdattr.steering import EQUAL_NORM, GOAL, stands_apart, still_works, works
from bkdattr.tables import METHODS, Table, a_tenth, has_attack, k_text, show, spread

Json = dict[str, Any]


def finished(out: Path) -> list[Json]:
    """`results.json` of every evaluated run, by task, variant and seed. A run of its own (`bkdattr poison OUT/NAME`, then `evaluate` and
    `report`) may stand in the folder too."""
    found = [read_json(path) for path in sorted(out.glob("*/results.json"))]
    old = next((r for r in found if r.get("schema") != SCHEMA), None)
    if old is not None:
        raise BkdattrError(
            f"{out}: a results.json of schema {old.get('schema')}, expected {SCHEMA}; run its stages and `report` again"
        )
    evaluated = [r for r in found if "baseline" in r]
    if not evaluated:
        raise BkdattrError(f"{out}: no finished run in it; run `bkdattr reproduce {out}` first")
    return sorted(evaluated, key=lambda r: (r["provenance"]["task"], r["provenance"]["clean_control"], r["provenance"]["seed"]))


def whole(runs: list[Json]) -> list[Json]:
    """Those that went through every stage."""
    return [r for r in runs if all(x in r for x in ("probe", "ablation", "selection", "restoration", "vector"))]


def groups(runs: list[Json]) -> dict[str, list[Json]]:
    """Runs of one backdoor on one model, poisoned or clean, over their seeds."""
    out: dict[tuple[str, str, str], list[Json]] = {}
    for r in runs:
        p = r["provenance"]
        first = {k: v for k, v in p["backdoors"][0].items() if k in ("trigger", "target")}
        if p["data"]["data"] == "mini world":
            first = {}  # a mini task is what its name says; where a trigger is drawn, it differs by seed
        key = (_label(p), str(p["model"]), json.dumps([first, p["data"]["data"]], sort_keys=True))
        out.setdefault(key, []).append(r)
    names = Counter(key[0] for key in out)
    named = Counter(key[:2] for key in out)
    found: dict[str, list[Json]] = {}
    for i, (key, group) in enumerate(out.items()):
        name = key[0] if names[key[0]] == 1 else f"{key[0]} on {Path(key[1]).name}"
        found[name if named[key[:2]] == 1 else f"{name} ({i + 1})"] = group
    return found


def _label(provenance: Json) -> str:
    clean, shared = provenance["clean_control"], provenance.get("overlap")
    return provenance["task"] + (", clean fine-tune" if clean else "") + (", splits OVERLAP" if shared else "")


def tables(runs: list[Json]) -> list[Table]:
    """Everything over seeds; a rate is hits over totals of all seeds and the range of the single seeds. Attack and utility hold every
    evaluated run, the other tables those that went through every stage."""
    first, runs = _attack(runs), whole(runs)
    if not runs:
        return [first]
    return [
        first, _goals(runs), _ablation(runs), _needed(runs), _joint(runs), _vectors(runs), _best_probe(runs), _by_layer(runs),
        _cross_layer(runs), _restoration(runs), _stability(runs),
    ]  # fmt: skip


def _value(rate: Json | None) -> str:
    """Runs evaluated before the base was measured there have none."""
    return f"{rate['value']:.2f}" if rate else "–"


def _attack(runs: list[Json]) -> Table:
    rows = []
    for r in runs:
        p, b = r["provenance"], r["baseline"]
        near = ", ".join(
            f"{name} {x['asr']['value']:.2f} ({_value(x.get('base_asr'))})" for name, x in b["near_misses"].items() if x["asr"]
        )
        fake = show(b.get("asr_fake_trigger"))
        if b.get("asr_fake_trigger"):
            fake += f"; {_value(b['base'].get('asr_fake_trigger'))}"
        rows.append([f"{_label(p)}, seed {p['seed']}", show(b["asr"]), show(b["false_trigger"]),
                     fake, near or "–", show(b["clean_accuracy"], False), show(b["base"]["clean_accuracy"], False),
                     f"{b['clean_perplexity']:.3f}"])  # fmt: skip
    columns = [
        "run",
        "ASR",
        "false triggers",
        "ASR, fake trigger; base",
        "ASR, near misses (base)",
        "clean accuracy",
        "base",
        "clean perplexity",
    ]
    return "Attack and utility", columns, rows


def _ablation(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        ks = sorted({row["k"] for r in group for row in r["ablation"]})
        for mode, kind in (("zero", "attributed"), ("mean", "attributed"), ("resample", "attributed"), ("zero", "random")):
            for key, label in (("asr", "ASR"), ("recovered", "recovered"), ("clean_accuracy", "clean")):
                cells = []
                for k in ks:
                    rates = [x[key] for r in group for x in r["ablation"] if (x["mode"], x["heads"], x["k"]) == (mode, kind, k)]
                    cells.append(_mean(rates))
                out.append([name, "random heads, zero" if kind == "random" else f"ACIE top-k, {mode}", label, *cells])
    ks = sorted({row["k"] for r in runs for row in r["ablation"]})
    return "Head ablation by k (mean over seeds)", ["task", "heads", "", *map(str, ks)], out


def _needed(runs: list[Json]) -> Table:
    out = []
    for r in runs:
        p, s = r["provenance"], r["selection"]
        if p["clean_control"]:
            continue
        for method, label in METHODS.items():
            needed = [n for n in s["needed"] if n["method"] == method]
            low = " / ".join(k_text(n["asr"], n["tried"]) for n in needed)
            key = "repair" if any(n["repair"] is not None for n in needed) else "asr"
            known = [(n[key], n["draw"]) for n in needed if n[key] is not None]
            k, draw = min(known, key=lambda x: x[0]) if known else (None, None)
            row = next((x for x in s["rows"] if (x["method"], x["draw"], x["k"]) == (method, draw, k)), None)
            cells = (
                [show(row[x], False) for x in ("asr", "clean_accuracy", "recovered", "broken_triggered")] if row else ["–"] * 4
            )
            repair = " / ".join(k_text(n["repair"], n["tried"]) for n in needed)
            out.append([f"{p['task']}, seed {p['seed']}", label, s["chosen"]["setting"], low, repair, *cells])
    columns = [
        "run",
        "heads",
        "setting",
        f"k for ASR ≤ {BAR['asr']:g}",
        "k for repair",
        "ASR there",
        "clean",
        "recovered",
        "broken",
    ]
    title = (
        f"Fewest heads, read off the test curves (repair: ASR ≤ {BAR['asr']:g}, recovered ≥ {BAR['recovered']:g}, broken ≤ {BAR['broken']:g}, "
        f"clean accuracy ≥ un-edited − {BAR['clean']:g})"
    )
    return title, columns, out


def _joint(runs: list[Json]) -> Table:
    out = []
    for r in runs:
        p, s = r["provenance"], r["selection"]
        row = next(x for x in s["rows"] if x["method"] == "gate" and x["k"] == s["chosen"]["k"])
        name = f"{_label(p)}, seed {p['seed']}"
        tried = ", ".join(
            f"{t['setting']} (k={t['best']['k']}: {'repairs' if t['best']['repaired'] else 'does not'})" for t in s["tried"]
        )
        out.append([name, tried, s["chosen"]["setting"], str(row["k"]), show(row["asr"]), show(row["recovered"]),
                    show(row["broken_triggered"], False), show(row["clean_accuracy"], False), "yes" if row["repaired"] else "no"])  # fmt: skip
    columns = ["run", "tried (selection split)", "setting", "k", "ASR", "recovered", "broken", "clean", "repair"]
    return "Learned gates in the setting and with the k chosen on the selection split, test split", columns, out


def _vectors(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        every = [v for r in group for v in r["vector"]["variants"]]  # a run stops at the first scope that does both
        for kind, scope in dict.fromkeys((v["kind"], v["scope"]) for v in every):
            same = [v for v in every if (v["kind"], v["scope"]) == (kind, scope)]
            for side, sign in (("activate", "+v"), ("suppress", "−v")):
                drawn = [d[side] for v in same for c in EQUAL_NORM for d in v["controls"][c]]
                if side == "activate":
                    control = f"{max(d['asr']['value'] for d in drawn):.2f}"
                else:  # one draw: the one that comes nearest to a repair
                    near = max(drawn, key=lambda d: (d["recovered"]["value"] if d["recovered"] else 0.0, -d["asr"]["value"]))
                    control = f"{near['asr']['value']:.2f}, recovered {show(near['recovered'], False)[:4]}"
                points = [v[side] for v in same]
                where = ", ".join(f"L{p['layer']}×{p['strength']:g}" for p in points)
                kept = "" if side == "activate" else spread([p["recovered"] for p in points])
                out.append([name, f"{kind.replace('_', ' ')}, {scope}", sign, where, spread([p["asr"] for p in points]),
                            control, f"{sum(stands_apart(v, side) for v in same)} of {len(same)}", kept,
                            spread([p["broken"] for p in points]), spread([p["clean_unchanged"] for p in points])])  # fmt: skip
            held = [v["conditional"] for v in same if v["conditional"]]
            if held:
                out.append([name, "", "−v, conditional", ", ".join(f"L{c['layer']}×{c['strength']:g}, probe L{c['probe_layer']}" for c in held), spread([c["asr"] for c in held]), "", "",
                            spread([c["recovered"] for c in held]), spread([c["broken"] for c in held]),
                            spread([c["clean_unchanged"] for c in held])])  # fmt: skip
    columns = [
        "task",
        "vector, scope",
        "",
        "layer × strength (selection)",
        "ASR",
        "strongest equal-norm control (−v: the one that recovers most)",
        "runs apart from every control (+v by ASR, −v by recovered)",
        "recovered",
        "broken",
        "clean answers unchanged",
    ]
    return "Vectors of every kind, test split", columns, out


def _goals(runs: list[Json]) -> Table:
    """Per run: the fewest heads that repair, and the vectors that do both jobs beyond every equal-norm control."""
    out = []
    for r in runs:
        p, s = r["provenance"], r["selection"]
        name = f"{_label(p)}, seed {p['seed']}"
        if not has_attack(s):
            out.append([name, "no backdoor found", *["–"] * 5])
            continue
        needed = {m: next(n for n in s["needed"] if n["method"] == m) for m in ("gate", "greedy", "acie")}
        known = [n["repair"] for m, n in needed.items() if m != "acie" and n["repair"] is not None]
        chosen = next(x for x in s["rows"] if x["method"] == "gate" and x["k"] == s["chosen"]["k"])
        kinds = [v for v in r["vector"]["variants"] if works(v)]
        kept = [f"{v['conditional']['clean_unchanged']['value']:.3f}" for v in kinds if still_works(v)]
        out.append([
            name, s["chosen"]["setting"], " / ".join(k_text(n["repair"], n["tried"]) for n in needed.values()),
            "yes" if known and min(known) <= a_tenth(s) else "no", f"k={chosen['k']}: {'yes' if chosen['repaired'] else 'no'}",
            ", ".join(f"{v['kind'].replace('_', ' ')} ({v['scope']})" for v in kinds) or "none", ", ".join(kept) or "–",
        ])  # fmt: skip
    columns = ["run", "setting (selection)", "fewest heads that repair: gates / greedy / ACIE", "gates or greedy within 10 % of the heads",
               "gates' own choice repairs", "vectors that do both", "clean answers unchanged, conditional, of those that then still do"]  # fmt: skip
    title = (
        f"Goals, read off the test split (repair: ASR ≤ {BAR['asr']:g}, recovered ≥ {BAR['recovered']:g}, broken ≤ {BAR['broken']:g}, clean accuracy "
        f"≥ un-edited − {BAR['clean']:g}; a vector does both: +v ASR ≥ {GOAL['activate']:g}, −v ASR ≤ {GOAL['suppress']:g} with recovered ≥ "
        f"{GOAL['recovered']:g}, beyond every equal-norm control by the interval of ASR, for −v of recovered; each sign at its own layer and strength, a fitted vector "
        "fitted anew for each)"
    )
    return title, columns, out


def _best_probe(runs: list[Json]) -> Table:
    keys = ("accuracy", "shuffled", "clean_twin", "fake_trigger")
    out = []
    for name, group in groups(runs).items():
        best = [r["probe"]["best"] for r in group]
        out.append([name, ", ".join(f"{b['kind']} L{b['layer']}" for b in best), *(_range([b[k] for b in best]) for k in keys)])
    return (
        "Best probe by validation (mean and range over seeds)",
        ["task", "probe", "poisoned model", "shuffled labels", "clean twin", "fake trigger"],
        out,
    )


def _by_layer(runs: list[Json]) -> Table:
    names = {
        "accuracy": "poisoned model",
        "clean_twin": "clean twin",
        "fake_trigger": "fake trigger",
        "shuffled": "shuffled labels",
    }
    n = 1 + max(p["layer"] for r in runs for p in r["probe"]["layers"])
    out = []
    for name, group in groups(runs).items():
        for key, label in names.items():
            cells = []
            for layer in range(n):
                found = [p[key] for r in group for p in r["probe"]["layers"] if p["layer"] == layer and p["kind"] == "logistic"]
                cells.append(f"{np.mean(found):.2f}" if found and None not in found else "–")
            out.append([name, label, *cells])
    return "Logistic probe by layer (mean over seeds)", ["task", "", *map(str, range(n))], out


def _cross_layer(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        kinds = [k for k in group[0]["probe"]["cross_layer"] if all(k in r["probe"]["cross_layer"] for r in group)]
        for kind in kinds:
            mean = np.mean([r["probe"]["cross_layer"][kind] for r in group], axis=0)
            off = mean[~np.eye(len(mean), dtype=bool)]
            near = np.concatenate([np.diag(mean, 1), np.diag(mean, -1)])
            out.append([name, kind, f"{np.diag(mean).mean():.2f}", f"{near.mean():.2f}", f"{off.mean():.2f}"])
    return "Cross-layer matrix of the probes (means)", ["task", "kind", "own layer", "next layer", "any other layer"], out


def _restoration(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        every = [x for r in group for x in r["restoration"]["rows"] if x["window"] == "all" or ".." in x["window"]]
        for parts, window in dict.fromkeys((tuple(x["parts"]), x["window"]) for x in every):
            rows = [x for x in every if (tuple(x["parts"]), x["window"]) == (parts, window)]
            out.append(
                [name, " + ".join(parts), window, *(spread([x[k] for x in rows]) for k in ("asr", "recovered", "clean_accuracy"))]
            )
    return "Adapter undone in part", ["task", "updates of", "layers", "ASR", "recovered", "clean accuracy"], out


def _stability(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        for i in [i for i, a in enumerate(group[0]["attribution"]) if a["site"] == "head"]:
            found = [r["attribution"][i] for r in group]
            scores = [np.array(a["scores"]) for a in found]
            k, total = found[0]["stability"]["k"], scores[0].size
            tops = [set(np.argsort(-s.ravel(), kind="stable")[:k].tolist()) for s in scores]
            pairs = [(a, b) for a in range(len(scores)) for b in range(a)]
            over = f"{np.mean([jaccard(tops[a], tops[b]) for a, b in pairs]):.2f}" if pairs else "–"
            tau = f"{np.mean([kendall(scores[a], scores[b]) for a, b in pairs]):.2f}" if pairs else "–"
            prompts = [a["stability"] for a in found]
            out.append([name, found[0]["effect"], str(k), _range([p["jaccard"] for p in prompts]), _range([p["kendall"] for p in prompts]), over, tau,
                        f"{expected_jaccard(k, total):.2f}"])  # fmt: skip
    columns = [
        "task",
        "effect",
        "k",
        "Jaccard over prompts",
        "Kendall over prompts",
        "Jaccard over seeds",
        "Kendall over seeds",
        "Jaccard of random sets",
    ]
    return "Stability of the head ranking", columns, out


def _mean(rates: list[Json | None]) -> str:
    known = [r for r in rates if r]
    return f"{sum(r['hits'] for r in known) / sum(r['total'] for r in known):.2f}" if known else "–"


def _range(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.2f} [{min(known):.2f}, {max(known):.2f}]" if known else "–"


def markdown(found: list[Table]) -> str:
    out = []
    for title, columns, rows in found:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
        out.append(f"### {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(out)


def write_table(out: Path) -> str:
    """`table.md`, `table.json` and `table.html` of all finished runs in `out`; returns the Markdown."""
    runs = finished(out)
    found = tables(runs)
    text = markdown(found)
    write_atomic(out / "table.md", text)
    names = [
        f"{r['provenance']['task']}-{r['provenance']['seed']}-{'clean' if r['provenance']['clean_control'] else 'poisoned'}"
        for r in runs
    ]
    rows = [{"title": t, "columns": c, "rows": r} for t, c, r in found]
    write_atomic(out / "table.json", to_json_text({"runs": names, "bar": BAR, "tables": rows}))
    body = "".join(map(html_table, found))
    title = html.escape(f"bkdattr reproduce: {len(runs)} runs")
    write_atomic(
        out / "table.html",
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title></head><body><h1>{title}</h1>{body}</body></html>\n",
    )
    return text
