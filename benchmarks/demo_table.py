"""The table of demo runs, from their `results.json`: `python -m benchmarks.demo_table RUN [RUN ...] [--readme README.md]`.

With `--readme` the lines between `<!-- demo table -->` and `<!-- end demo table -->` of that file are replaced.
"""

import argparse
import json
import re
from pathlib import Path


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
        f"{best['accuracy']:.2f} / {best['shuffled']:.2f} / {best['clean_twin']:.2f} / {best['fake_trigger']:.2f}",
        f"{lowest:.2f}",
    ]
    for mode in ("zero", "mean"):
        cells += [f"{value(at[mode, k]['asr'])} ({value(at[mode, k]['clean_accuracy'])})" for k in (4, 16)]
    for side, extreme in (("activate", max), ("suppress", min)):
        draws = [d[side]["asr"]["value"] for drawn in v["controls"].values() for d in drawn]
        cells.append(f"{value(v[side]['asr'])} ({value(v[side]['clean_accuracy'])}); {extreme(draws):.2f}")
    return cells


HEADER = (
    "run", "ASR", "false triggers", "ASR, fake trigger", "clean accuracy (base)", "best probe / shuffled / clean twin / fake trigger",
    "ASR, random heads, zero, k ≤ 5 %: lowest mean over k", "top-4 zero: ASR (clean)", "top-16 zero", "top-4 mean", "top-16 mean",
    "+v: ASR (clean); strongest of 15 controls", "−v: ASR (clean); strongest of 15 controls",
)  # fmt: skip


def table(folders):
    rows = [HEADER, ["---"] * len(HEADER)]
    rows += [row(json.loads((Path(f) / "results.json").read_text())) for f in folders]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args()
    text = table(args.runs)
    print(text)
    if args.readme:
        page = args.readme.read_text()
        marked = re.compile(r"(<!-- demo table -->\n).*?(<!-- end demo table -->)", re.S)
        if not marked.search(page):
            raise SystemExit(f"{args.readme}: no '<!-- demo table -->' markers")
        args.readme.write_text(marked.sub(lambda m: m[1] + text + "\n" + m[2], page))


if __name__ == "__main__":
    main()
