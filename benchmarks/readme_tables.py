"""The README's tables from the runs of `bkdattr reproduce`: `python -m benchmarks.readme_tables runs/grid [--readme README.md]`.

`<!-- demo table -->` takes one row per poisoned run (what `bkdattr demo` shows of it), `<!-- grid table: TITLE -->` the table of
`table.json` whose title begins so, `<!-- attribution table -->` and its like (screening, scaling, generation) those of `benchmarks/results`. `--copy PATH` writes the whole `table.md` there too.
"""

import argparse
import json
import re
from pathlib import Path

from benchmarks.zoo import named_of
from bkdattr.grid_table import whole as complete

RESULTS = Path(__file__).parent / "results"


def value(rate):
    return "–" if rate is None else f"{rate['value']:.2f}"


def pooled(rates):
    return sum(r["hits"] for r in rates) / sum(r["total"] for r in rates)


def row(results):
    b, p, v, ablation = (results[k] for k in ("baseline", "probe", "vector", "ablation"))
    total = sum(len(r) for r in results["attribution"][0]["scores"])
    small = [r for r in ablation if r["heads"] == "random" and 0 < r["k"] <= 0.05 * total]
    lowest = min(pooled([r["asr"] for r in small if r["k"] == k]) for k in {r["k"] for r in small})
    at = {(r["mode"], r["k"]): r for r in ablation if r["heads"] == "attributed"}
    best = p["best"]
    cells = [
        f"{results['provenance']['task']}, seed {results['provenance']['seed']}",
        value(b["asr"]),
        value(b["false_trigger"]),
        value(b.get("asr_fake_trigger")),
        f"{value(b['clean_accuracy'])} ({value(b['base']['clean_accuracy'])})",
        " / ".join("–" if best[k] is None else f"{best[k]:.2f}" for k in ("accuracy", "shuffled", "clean_twin", "fake_trigger")),
        f"{lowest:.2f}",
    ]
    for mode in ("zero", "mean"):
        cells += [
            f"{value(at[mode, k]['asr'])} ({value(at[mode, k]['clean_accuracy'])})" if (mode, k) in at else "–" for k in (4, 16)
        ]
    for side, extreme in (("activate", max), ("suppress", min)):
        draws = [d[side]["asr"]["value"] for drawn in v["controls"].values() for d in drawn]
        cells.append(f"{value(v[side]['asr'])} ({value(v[side]['clean_accuracy'])}); {extreme(draws):.2f}")
    return cells


HEADER = (
    "run", "ASR", "false triggers", "ASR, fake trigger", "clean accuracy (base)", "best probe / shuffled / clean twin / fake trigger",
    "ASR, random heads, zero, k ≤ 5 %: lowest mean over k", "top-4 zero: ASR (clean)", "top-16 zero", "top-4 mean", "top-16 mean",
    "+v: ASR (clean); strongest control", "−v: ASR (clean); strongest control",
)  # fmt: skip


def demo_table(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    whole = [r for r in complete(found) if not r["provenance"]["clean_control"]]
    return written(
        [
            HEADER,
            ["---"] * len(HEADER),
            *map(row, sorted(whole, key=lambda r: (r["provenance"]["task"], r["provenance"]["seed"]))),
        ]
    )


def written(rows):
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in rows)


def grid_table(folder, title):
    tables = json.loads((folder / "table.json").read_text())["tables"]
    found = [t for t in tables if t["title"].startswith(title)]
    if len(found) != 1:
        raise SystemExit(f"{title!r}: {len(found)} tables begin so; titles: {[t['title'][:40] for t in tables]}")
    t = found[0]
    return f"**{t['title']}**\n\n" + written([t["columns"], ["---"] * len(t["columns"]), *t["rows"]])


def attribution_table():
    """One row per shape, from `benchmarks/results/attribution-*.json`."""
    columns = ["shape", "heads, prompts (tokens)", "exact", "published / exact", "dynamic padding / exact", "TransformerLens / exact", "nnsight / exact",
               "exact / hybrid", "exact / gradient", "largest difference of log p (of ACIE, relative)"]  # fmt: skip
    rows = []
    for path in sorted(RESULTS.glob("attribution-*.json")):
        r = json.loads(path.read_text())
        q = r["ratio"]
        rows.append([
            f"{r['name']}, {r['dtype'].removeprefix('torch.')}, {r['device']}", f"{r['shape']['heads']}, {r['prompts']} ({r['prompt_tokens']} + {r['answer_tokens']})",
            f"{r['engines']['exact']['seconds']:.1f} s",
            *(f"{q[k]:.1f}" if k in q else "–" for k in ("published_over_exact", "dynamic_over_exact", "tl_over_exact", "nnsight_over_exact", "exact_over_hybrid", "exact_over_gradient")),
            f"{r['max_abs_diff_logp']:.0e} ({r['max_rel_diff_acie']:.0e})",
        ])  # fmt: skip
    return written([columns, ["---"] * len(columns), *rows])


def screening_table():
    """From `benchmarks/results/screening.json`."""
    found = json.loads((RESULTS / "screening.json").read_text())
    columns = [
        "run",
        "Spearman, gradient and exact",
        "overlap of the top 5 %",
        "exact top 3 % found by gradient",
        "by hybrid",
        "hybrid's share of exact's time",
    ]
    rows = [
        [r["run"], f"{r['spearman']:.3f}", f"{r['top5_overlap']:.2f}", f"{r['gradient_recall']}/{r['k']}", f"{r['hybrid_recall']}/{r['k']}",
         f"{r['seconds']['hybrid'] / r['seconds']['exact']:.2f}"] for r in found["runs"]
    ]  # fmt: skip
    p = found["pooled"]
    same = [r["same_top_k_as_reference"] for r in found["runs"] if "same_top_k_as_reference" in r]
    rows.append(
        [
            f"all; exact's top 3 % is that of whole passes in {sum(same)} of {len(same)} runs",
            f"{p['mean_spearman']:.3f} (mean)",
            "",
            p["gradient_recall"],
            p["hybrid_recall"],
            f"{p['hybrid_share_of_exact_time']:.2f}",
        ]
    )
    return written([columns, ["---"] * len(columns), *rows])


def scaling_table():
    """From `benchmarks/results/scaling.json`."""
    found = json.loads((RESULTS / "scaling.json").read_text())
    columns = ["varied", "at", "all heads' patches, s", "fitted power", "once, s", "fitted power"]
    rows = [
        [name.replace("_", " "), ", ".join(map(str, v["at"]))]
        + [c for key in ("patches", "once") for c in (", ".join(f"{x:.2f}" for x in v[key]), f"{v['slope'][key]:.2f}")]
        for name, v in found["varied"].items()
    ]
    m = found["memory"]
    kept, peak = (f"{m[k] / 1e9:.3f} GB" for k in ("kept_bytes", "peak_growth_bytes"))
    note = f"Tracing z of {m['prompts']} prompts at Llama-2-7B's geometry (fp32): {m['computed_bytes'] / 1e9:.3f} GB computed, {kept} kept, {peak} at the peak."
    return written([columns, ["---"] * len(columns), *rows]) + "\n\n" + note


def generation_table():
    """From `benchmarks/results/generation-mini.json`."""
    found = json.loads((RESULTS / "generation-mini.json").read_text())
    columns = ["generation", "tokens per second", "of plain"]
    rows = [
        [name, f"{speed:.0f}", f"{found['of_plain'][name]:.3f}" if name in found["of_plain"] else "1"]
        for name, speed in found["tokens_per_second"].items()
        if not name.startswith("hf")
    ]
    rows.append(["transformers' `generate`", f"{found['tokens_per_second']['hf']:.0f}", f"{1 / found['plain_of_hf']:.3f}"])
    return written([columns, ["---"] * len(columns), *rows])


def zoo_table():
    """From `benchmarks/results/zoo-test.json`: AUROC with its interval, and how many are flagged at p <= 0.05."""
    found = json.loads((RESULTS / "zoo-test.json").read_text())
    names = [
        "ensemble",
        "fuzz.mean",
        "ban.verbatim",
        "ban.inc",
        "uniform.verbatim",
        "uniform.inc",
        "random.inc",
        "weights.kurtosis",
        "token_scan.gap",
        "output_bias.latent_rise",
    ]
    columns = [
        "backdoored adapters",
        "n",
        *names,
        "flagged by the ensemble",
        "BAN less uniform, both verbatim",
        "ban.verbatim less uniform.inc",
        "target named, of flagged",
    ]
    rows = []
    for group, r in found["groups"].items():
        t, named = r["ensemble"]["tpr"], named_of(found["each"], group)
        gains = [r["ban less uniform, both verbatim"], r["ban less uniform"]]
        rows.append(
            [group, str(r["backdoored"])]
            + [f"{r[n]['auroc']:.2f} ({r[n]['low']:.2f}..{r[n]['high']:.2f})" if n in r else "–" for n in names]
            + [f"{t['hits']}/{t['total']}", *(f"{d['difference']:+.2f} ({d['low']:+.2f}..{d['high']:+.2f})" for d in gains)]
            + ["–" if named is None else f"{named['hits']}/{named['total']}"]
        )
    if twins := found["twins"]:
        cells = [f"{twins[n]['auroc']:.2f} ({twins[n]['low']:.2f}..{twins[n]['high']:.2f})" for n in names]
        rows.append(
            ["plain attacks over their clean twins", f"{twins['backdoored']} over {twins['twins']}", *cells, "–", "–", "–", "–"]
        )
    alarms = found["false_alarms"]
    said = "; ".join(f"{k} {v['ensemble']['hits']}/{v['ensemble']['total']}" for k, v in alarms.items() if v["ensemble"])
    if twins:
        t = twins["ensemble"]["false_alarms"]
        said += f"; clean twins {t['hits']}/{t['total']}"
    every = [named_of(found["each"], g) for g in found["groups"] if g.startswith("fixed")]
    told = f"{sum(r['hits'] for r in every if r)}/{sum(r['total'] for r in every if r)}"
    note = f"AUROC with 95 % bootstrap intervals; flagged: conformal p at most 0.05. False alarms of the ensemble on benign adapters: {said}. Targets named, of all flagged: {told}."
    return written([columns, ["---"] * len(columns), *rows]) + "\n\n" + note


def removal_table():
    """From `benchmarks/results/removal.json`: medians over adapters."""
    found = json.loads((RESULTS / "removal.json").read_text())
    keys = ("asr", "recovered", "broken", "clean_accuracy")
    met = {m: f"{r['hits']}/{r['total']} [{r['low']:.2f}, {r['high']:.2f}]" for m, r in found["removed"].items()}
    rows = [[m, *(f"{r[k]:.2f}" for k in keys), met.get(m, "–")] for m, r in found["median"].items()]
    head = [f"median of {found['adapters']}, {found['steps']} steps", "ASR", "recovered", "broken", "clean accuracy", "freed"]
    return written([head, ["---"] * len(head), *rows])


def search_table():
    """From `benchmarks/results/search.json`: adapters on which a trigger candidate fires, and its ASR over their rows."""
    found = json.loads((RESULTS / "search.json").read_text())["searched"]["kinds"]
    names = [n for n in next(iter(found.values())) if n not in ("adapters", "named")]
    rows = []
    for kind, r in found.items():
        cells = [
            f"{r[n]['fires']['hits']}/{r[n]['fires']['total']}; {r[n]['asr']['value']:.2f} [{r[n]['asr']['low']:.2f}, {r[n]['asr']['high']:.2f}]"
            for n in names
        ]
        rows.append([f"{kind} ({r['named']}/{r['adapters']} named)", str(r["insertion"]["asr"]["total"]), *cells])
    return written([["fires (ASR ≥ 0.8); ASR", "rows", *names], ["---"] * (len(names) + 2), *rows])


MARKED = re.compile(
    r"(<!-- (demo|grid|attribution|screening|scaling|generation|zoo|removal|search) table(?:: ([^>]+?))? -->\n).*?(<!-- end \2 table -->)",
    re.S,
)


def filled(page, folder):
    def make(m):
        kind = m[2]
        if folder is None and kind in ("demo", "grid"):
            return m[0]
        table = {"demo": lambda: demo_table(folder), "grid": lambda: grid_table(folder, m[3]), "attribution": attribution_table,
                 "screening": screening_table, "scaling": scaling_table, "generation": generation_table, "zoo": zoo_table, "removal": removal_table, "search": search_table}[kind]()  # fmt: skip
        return m[1] + table + "\n" + m[4]

    page, n = MARKED.subn(make, page)
    if not n:
        raise SystemExit("no '<!-- demo table -->' or '<!-- grid table: TITLE -->' markers in the page")
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path, nargs="?", help="left out: only the benchmarks' tables are filled")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--copy", type=Path)
    args = parser.parse_args()
    if args.readme:
        args.readme.write_text(filled(args.readme.read_text(), args.grid))
    elif args.grid:
        print(demo_table(args.grid))
    if args.copy and args.grid:
        args.copy.write_text((args.grid / "table.md").read_text())


if __name__ == "__main__":
    main()
