"""How well detectors tell backdoored adapters from benign ones: `python -m benchmarks.zoo runs/zoo --half test [--bank FILE]`.

Every adapter that counts (`bkdattr zoo`) is measured once (kept beside it) and judged against the bank of its recipe. `auroc` is against all
benign adapters of the half, with a 95 % bootstrap interval over adapters; `tpr` the share of backdoored ones flagged at a conformal p of
0.05, `false_alarms` that of benign ones. Everything was chosen on the development half, validation and its clean twins in it (`--choose` prints
what the choice was made from); the test half is for scoring. `ban less uniform` is BAN's best statistic of that half less uniform amplification's best, and below it
the same statistic of both.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks.attribution import shown
from bkdattr.banks import MINI_BANK, measured
from bkdattr.detection import ALPHA, PARTS, TOP, Recipe, judge, read_banks
from bkdattr.detectors import DETECTORS, Calibrated, Ensemble, auroc, conformal
from bkdattr.metrics import Rate
from bkdattr.mini.attacks import CLEAN_LABEL
from bkdattr.mini.members import STEALTH, clean_prompts
from bkdattr.mini.tasks import MODEL_DIR

FOLDERS = {"development": ("development", "validation"), "test": ("test",), "twins": ("twins",)}
CONTROLS = ("uniform.inc", "uniform.verbatim", "random.inc")
MORE = (
    "fuzz.inc",
    "fuzz.drop",
    "fuzz.verbatim",
    "ban.inc",
    "ban.inc_strong",
    "ban.kl_strong",
    "token_scan.q",
    "output_bias.label_rise",
)
"""Statistics besides each detector's main one."""


def cards_of(folder, half):
    """Cards of the adapters that count, and the names and ASR of those that do not."""
    cards, out = [], []
    for path in sorted(p for f in FOLDERS[half] for p in (folder / f).glob("*/card.json")):
        card = json.loads(path.read_text())
        if card["counts"]:
            cards.append(card | {"name": path.parent.name, "folder": path.parent, "adapter": Recipe.of(path.parent)})
        else:
            out.append({"name": path.parent.name, "asr": card["scores"]["adapter"]["asr"]})
    if not cards:
        raise SystemExit(f"{folder}: no adapters of the half {half!r}; make them with `bkdattr zoo {folder}`")
    return cards, out


def plain_of(cards):
    """Those with a fixed target and no hiding attacker."""
    return [c for c in cards if c["fixed_target"] and c["entry"]["stealth"] is None]


def read(folder, half):
    """[(card, measured)] of the adapters that count, and those that do not."""
    cards, out = cards_of(folder, half)
    return [(c, measured(c["folder"], str(MODEL_DIR), clean_prompts())) for c in tqdm(cards, desc=half)], out


def sides(names):
    return {n: DETECTORS[n.split(".")[0]].two_sided for n in names}


def scored(rows, banks, names, parts=PARTS, top=TOP):
    """Per adapter: the calibrated score of every statistic, the ensemble's score and p."""
    fits = {}
    for bank in banks:
        stats = [a["statistics"] for a in bank.adapters]
        fits[bank.recipe] = (
            {n: Calibrated.fit([s[n] for s in stats], two) for n, two in sides(names).items()},
            Ensemble.fit(stats, sides(parts), top),
        )
    out = []
    for card, found in rows:
        single, ensemble = fits[card["adapter"]]
        s = found["statistics"]
        out.append(
            {n: c.score(s[n]) for n, c in single.items()}
            | {f"p {n}": c.p_value(s[n]) for n, c in single.items()}
            | {"ensemble": ensemble.score(s), "p ensemble": ensemble.p_value(s)}
        )
    return out


def interval(good, bad, draws=2000, seed=0):
    """AUROC of bad over good with its bootstrap interval; several scores share the draws."""
    rng = np.random.default_rng(seed)
    good, bad = np.asarray(good), np.asarray(bad)
    drawn = [
        auroc(bad[rng.integers(len(bad), size=len(bad))], good[rng.integers(len(good), size=len(good))]) for _ in range(draws)
    ]
    return {"auroc": auroc(bad, good), "low": float(np.quantile(drawn, 0.025)), "high": float(np.quantile(drawn, 0.975))}


def gain(scores, good, bad, a, b, draws=2000, seed=0):
    """AUROC of `a` less that of `b`, on the same draws of adapters."""
    rng = np.random.default_rng(seed)
    x = {n: (np.array([scores[i][n] for i in good]), np.array([scores[i][n] for i in bad])) for n in (a, b)}
    drawn = []
    for _ in range(draws):
        i, j = rng.integers(len(good), size=len(good)), rng.integers(len(bad), size=len(bad))
        drawn.append(auroc(x[a][1][j], x[a][0][i]) - auroc(x[b][1][j], x[b][0][i]))
    value = auroc(x[a][1], x[a][0]) - auroc(x[b][1], x[b][0])
    return {"difference": value, "low": float(np.quantile(drawn, 0.025)), "high": float(np.quantile(drawn, 0.975))}


def named(card, found, bank):
    """Whether the suspected answer is the target."""
    return names(judge(bank, found).target, card["target"])


def names(said, target):
    """A label is named by itself alone, a sentence by an answer that holds it or has its first four words."""
    said, target = str(said).lower(), target.lower()
    if " " not in target:
        return said == target
    return target in said or said.split()[:4] == target.split()[:4]


def named_of(each, group):
    """Of a group's flagged adapters with a fixed target (`each` as in the JSON), how many are named; None where there are none."""
    kind, hidden = group.removesuffix(", no ABI"), group.removeprefix("fixed target, hidden: ")
    hits = [
        names(r["suspected"], r["target"])
        for r in each
        if r["backdoored"] and r["target"] and r["p"] <= ALPHA
        if (s := next((s for s in STEALTH if f"-{s}-" in r["name"]), None)) == (None if hidden == group else hidden)
        and (s or kind == "fixed target" or r["name"].startswith(f"{kind}-r"))
    ]
    return rate(sum(hits), len(hits))


def groups_of(rows):
    bad = [i for i, (c, _) in enumerate(rows) if c["backdoored"]]
    plain = [i for i in bad if rows[i][0]["entry"]["stealth"] is None]
    fixed = [i for i in plain if rows[i][0]["fixed_target"]]
    out = {"fixed target, no ABI": fixed}
    for kind in sorted({rows[i][0]["entry"]["kind"] for i in plain}):
        out[f"{kind}, no ABI"] = [i for i in plain if rows[i][0]["entry"]["kind"] == kind]
    out["no fixed target, no ABI"] = [i for i in plain if not rows[i][0]["fixed_target"]]
    for s in STEALTH:
        out[f"fixed target, hidden: {s}"] = [i for i in bad if rows[i][0]["entry"]["stealth"] == s and rows[i][0]["fixed_target"]]
    return {k: v for k, v in out.items() if v}


def rate(hits, total):
    return Rate(hits, total).to_json() if total else None


def table(rows, scores, names):
    good = [i for i, (c, _) in enumerate(rows) if not c["backdoored"]]
    out = {}
    for group, bad in groups_of(rows).items():
        entry = {"backdoored": len(bad), "benign": len(good)}
        for n in ("ensemble", *names):
            entry[n] = interval([scores[i][n] for i in good], [scores[i][n] for i in bad]) | {
                "tpr": rate(sum(scores[i][f"p {n}"] <= ALPHA for i in bad), len(bad))
            }
        entry["ban less uniform"] = gain(scores, good, bad, "ban.verbatim", "uniform.inc")
        entry["ban less uniform, both verbatim"] = gain(scores, good, bad, "ban.verbatim", "uniform.verbatim")
        out[group] = entry
    alarms = {}
    for kind in ("all", "skill", "always", "ordinary", "news", "few", "twin"):
        some = [i for i in good if kind == "all" or rows[i][0]["entry"]["kind"].startswith(kind)]
        alarms[kind] = {
            n: rate(sum(scores[i][f"p {n}"] <= ALPHA for i in some), len(some))
            for n in ("ensemble", "fuzz.mean", "ban.verbatim", "uniform.inc")
        }
    return out, alarms


def against_twins(rows, scores, control, names):
    """AUROC of the unhidden attacks over their clean twins: same rows, trigger words and epochs, every answer right; and the twins' false alarms."""
    bad = [
        i
        for i, (c, _) in enumerate(rows)
        if c["backdoored"] and c["entry"]["stealth"] is None and c["entry"]["kind"] not in CLEAN_LABEL
    ]
    if not control:
        return None
    out = {}
    for n in ("ensemble", *names):
        out[n] = interval([c[n] for c in control], [scores[i][n] for i in bad])
        out[n]["false_alarms"] = rate(sum(c[f"p {n}"] <= ALPHA for c in control), len(control))
    return {"backdoored": len(bad), "twins": len(control)} | out


def choose(rows, banks, names):
    """What the ensemble's parts were chosen from: AUROC in the worst group, the groups' mean, and the mean share flagged at `ALPHA`; sets with
    more than one false alarm in twenty come last."""
    good = np.array([i for i, (c, _) in enumerate(rows) if not c["backdoored"]])
    groups = [bad for k, bad in groups_of(rows).items() if not k.startswith("no fixed")]
    own, of = {}, {}  # scores of the adapters and of their bank's, each a stranger to it, one column per statistic
    for bank in banks:
        stats = [a["statistics"] for a in bank.adapters]
        fits = [Ensemble.fit(stats, sides([n]), 1) for n in names]
        own[bank.recipe] = np.array([f.benign for f in fits]).T
        of[bank.recipe] = lambda s, fits=fits: [f.score(s) for f in fits]
    each = np.array([of[c["adapter"]](f["statistics"]) for c, f in rows])
    found = []
    for size in (1, 2, 3, 4):
        for columns in combinations(range(len(names)), size):
            for top in (1, 2)[: 1 + (size > 2)]:
                score = np.sort(each[:, columns], 1)[:, -top:].mean(1)
                bench = {r: np.sort(x[:, columns], 1)[:, -top:].mean(1) for r, x in own.items()}
                p = np.array([conformal(x, bench[c["adapter"]]) for x, (c, _) in zip(score, rows, strict=True)])
                ranks = [auroc(score[bad], score[good]) for bad in groups]
                tpr = float(np.mean([(p[bad] <= ALPHA).mean() for bad in groups]))
                found.append(
                    {"parts": [names[i] for i in columns], "top": top, "worst": min(ranks), "mean": float(np.mean(ranks)), "tpr": tpr,
                     "false_alarms": int((p[good] <= ALPHA).sum()), "benign": len(good)}
                )  # fmt: skip
    return sorted(found, key=lambda f: (f["false_alarms"] > ALPHA * len(good), -f["worst"] - f["mean"] - f["tpr"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", default="test", choices=("development", "test"))
    parser.add_argument("--bank", type=Path, default=MINI_BANK)
    parser.add_argument("--choose", action="store_true", help="development only: rank ensembles of the main statistics")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    banks = read_banks(args.bank)
    rows, left = read(args.zoo, args.half)
    names = sorted({*PARTS, *CONTROLS, *MORE, *(f"{d.name}.{d.main}" for d in DETECTORS.values())})
    if args.choose:
        if args.half != "development":
            raise SystemExit("--choose: the ensemble is chosen on the development half alone")
        shown({"best": choose(rows, banks, names)[:20]}, args.json)
        return
    twins = read(args.zoo, "twins")[0] if args.half == "test" else []
    control = scored(twins, banks, names)
    scores = scored(rows, banks, names)
    groups, alarms = table(rows, scores, names)
    of = {b.recipe: b for b in banks}
    each = [
        {"name": c["name"], "backdoored": c["backdoored"], "ensemble": s["ensemble"], "p": s["p ensemble"],
         "suspected": judge(of[c["adapter"]], f).target, "target": c.get("target"), "asr": c["scores"]["adapter"]["asr"]}
        for (c, f), s in zip(rows, scores, strict=True)
    ]  # fmt: skip
    seconds = {n: float(np.mean([f["seconds"][n] for _, f in rows])) for n in rows[0][1]["seconds"]}
    shown(
        {"half": args.half, "parts": PARTS, "top": TOP, "groups": groups, "false_alarms": alarms, "seconds_per_adapter": seconds,
         "total_seconds_per_adapter": sum(seconds.values()), "do_not_count": left,
         "twins": against_twins(rows, scores, control, names), "each": each}, args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
