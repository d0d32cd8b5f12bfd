"""How far gradient estimates agree with exact effects on planted backdoors, and what the hybrid finds in what time.

`python -m benchmarks.screening runs/grid` takes the poisoned runs in a folder (`bkdattr reproduce runs/grid`), attributes every one anew by each
method on its attribution split, sufficiency of heads, and prints Spearman, the overlap of the top 5 %, and the recall of the exact top 3 %.
`recall_at` is the recall for any verified share: `--runs '*-[0-9]'` prints it for the attacks' runs, on which `screening.FRACTION` was chosen.
`--reference` also takes the exact engine's ACIE and top 3 % against whole passes, one per head.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.attribution import Slow, shown
from bkdattr.attribution import Recipients, estimate_effects, site_effects, sites_of
from bkdattr.engine import prefix_cache
from bkdattr.metrics import spearman
from bkdattr.run import Run
from bkdattr.screening import FRACTION, screen
from bkdattr.stages import Study
from bkdattr.vector import default_k


def measured(folder, reference):
    study = Study(Run.open(folder), lambda text: None)
    subject, (clean, _) = study.subject, study.eligible("attribution")
    recipients, donors, heads = Recipients.of(subject, clean), study.donors, sites_of(study.subject.geometry, "head")
    size, config = study.run.config["batch_size"], study.run.config

    def clock(work):
        start = time.perf_counter()
        return work(), time.perf_counter() - start

    def exact(sites, prefix=None):
        return {s: float(x.mean()) for s, x in site_effects(subject, recipients, donors, sites, batch_size=size, prefix=prefix)}

    def estimate(prefix=None):
        return estimate_effects(subject, recipients, donors, batch_size=size, prefix=prefix)

    def hybrid():
        prefix = prefix_cache(subject)
        best, sample = screen(estimate(prefix), FRACTION, config["seed"])
        return best, exact([*best, *sample], prefix)

    estimate(), exact(heads[:1])  # warm, and the model has proved that it can be resumed, for both
    true, t_exact = clock(lambda: exact(heads))
    guess, t_gradient = clock(estimate)
    (best, found), t_hybrid = clock(hybrid)
    guess = {s: float(x.mean()) for s, x in guess.items()}
    ranked = [sorted(heads, key=lambda s, x=x: -x[s]) for x in (true, guess)]
    k, five = default_k(len(heads)), max(1, round(0.05 * len(heads)))
    top = set(sorted(best, key=lambda s: -found[s])[:k])
    row = {}
    if reference:
        slow = Slow(subject, recipients.prompts, recipients.responses)
        base = slow().exp()
        effects = {s: float((slow(s, donors.mean_at(s)).exp() - base).mean()) for s in heads}
        best = sorted(heads, key=lambda s: -effects[s])
        off = max(abs(effects[s] - true[s]) for s in heads) / max(map(abs, effects.values()))
        row = {"same_top_k_as_reference": set(best[:k]) == set(ranked[0][:k]), "max_rel_diff_acie": off}
    return row | {
        "run": f"{config['task']}, seed {config['seed']}", "heads": len(heads), "prompts": len(clean), "k": k,
        "spearman": spearman([true[s] for s in heads], [guess[s] for s in heads]),
        "top5_overlap": len(set(ranked[0][:five]) & set(ranked[1][:five])) / five,
        "ranks": [ranked[1].index(s) + 1 for s in ranked[0][:k]],
        "gradient_recall": len(set(ranked[0][:k]) & set(ranked[1][:k])), "hybrid_recall": len(set(ranked[0][:k]) & top),
        "seconds": {"exact": t_exact, "gradient": t_gradient, "hybrid": t_hybrid},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--tasks", default="fixed-output,label-flip,jailbreak")
    parser.add_argument("--runs", help="a pattern of folder names, in place of the tasks'")
    parser.add_argument(
        "--reference", action="store_true", help="also patch every head by whole passes of all prompts, one pass per head"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    patterns = [args.runs] if args.runs else [f"{t}-*-poisoned" for t in args.tasks.split(",")]
    folders = [f for p in patterns for f in sorted(args.grid.glob(p)) if (f / "poison.json").exists()]
    rows = [measured(folder, args.reference) for folder in folders]
    if not rows:
        raise SystemExit(
            f"{args.grid}: no poisoned runs named {' or '.join(patterns)}; make them with `bkdattr reproduce {args.grid}`"
        )
    n = sum(r["k"] for r in rows)
    share = [r["seconds"]["hybrid"] / r["seconds"]["exact"] for r in rows]
    at = [r / row["heads"] for row in rows for r in row["ranks"]]
    recall = {
        f"{f:.2f}": f"{sum(r <= f + 0.5 / rows[0]['heads'] for r in at)}/{n}" for f in (0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25)
    }
    pooled = {
        "hybrid_recall": f"{sum(r['hybrid_recall'] for r in rows)}/{n}", "gradient_recall": f"{sum(r['gradient_recall'] for r in rows)}/{n}",
        "hybrid_share_of_exact_time": float(sum(r["seconds"]["hybrid"] for r in rows) / sum(r["seconds"]["exact"] for r in rows)),
        "share_range": [min(share), max(share)], "fraction": FRACTION, "threads": args.threads,
        "recall_at": recall, "mean_spearman": float(np.mean([r["spearman"] for r in rows])),
    }  # fmt: skip
    shown({"pooled": pooled, "runs": rows}, args.json)


if __name__ == "__main__":
    main()
