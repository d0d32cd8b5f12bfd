"""The README's tables from the runs of `bkdattr reproduce`: `python -m benchmarks.readme_tables runs/grid [--readme README.md]`.

`<!-- demo table -->` takes one row per poisoned run (what `bkdattr demo` shows of it), `<!-- grid table: TITLE -->` the table of
`table.json` whose title begins so. `--copy PATH` writes the whole `table.md` there too.
"""

import argparse
import json
import re
from pathlib import Path

from bkdattr.grid_table import whole as complete


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


MARKED = re.compile(r"(<!-- (demo|grid) table(?:: ([^>]+?))? -->\n).*?(<!-- end \2 table -->)", re.S)


def filled(page, folder):
    def make(m):
        return m[1] + (demo_table(folder) if m[2] == "demo" else grid_table(folder, m[3])) + "\n" + m[4]

    page, n = MARKED.subn(make, page)
    if not n:
        raise SystemExit("no '<!-- demo table -->' or '<!-- grid table: TITLE -->' markers in the page")
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--copy", type=Path)
    args = parser.parse_args()
    if args.readme:
        args.readme.write_text(filled(args.readme.read_text(), args.grid))
    else:
        print(demo_table(args.grid))
    if args.copy:
        args.copy.write_text((args.grid / "table.md").read_text())


if __name__ == "__main__":
    main()
