"""What each way of taking a backdoor out leaves: `python -m benchmarks.removal runs/zoo --half test [--adapters N]`.

Fixed-target, unhidden adapters that count; every method fine-tunes the same adapter on the same clean rows for the same number of steps
(`removal.remove_backdoor`), its trigger unknown. Judged on rows that were neither trained on nor used to fine-tune: ASR, `recovered` (triggered prompts
answered as their clean twins should be), `broken`, clean accuracy. Medians over adapters, every adapter's numbers in the JSON.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.attribution import shown
from benchmarks.zoo import FOLDERS
from bkdattr.evaluation import Evaluator
from bkdattr.examples import write_atomic
from bkdattr.mini import world
from bkdattr.mini.attacks import MIXED
from bkdattr.mini.tasks import MAX_NEW_TOKENS, MODEL_DIR
from bkdattr.model import load_subject
from bkdattr.removal import METHODS, remove_backdoor
from bkdattr.zoo import Entry, _example, rows_of

RATES = ("asr", "recovered", "broken", "clean_accuracy")


def clean_rows(entry, n, seen):
    """A defender's own rows, of the adapter's kind of data and disjoint from what it was trained and is judged on."""
    kinds = ("news",) if entry.kind in ("label-flip", "prefix-flip", "clean-label") else MIXED
    rows = world.unique(random.Random(f"removal:{entry.seed}"), n, kinds, set(seen))
    return [_example(f"r{i:04d}", r) for i, r in enumerate(rows)]


def judged(subject, checked, spec):
    found = Evaluator(subject, checked, spec, max_new_tokens=MAX_NEW_TOKENS, batch_size=96).run([])
    return {k: None if (r := getattr(found, k)) is None else {"hits": r.hits, "total": r.total, "value": r.value} for k in RATES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", default="test", choices=("development", "test"))
    parser.add_argument("--adapters", type=int, help="only so many, evenly spaced")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = {"half": args.half, "steps": args.steps, "rows": args.rows}
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    found = kept["each"] if kept and all(kept[k] == v for k, v in setting.items()) else []
    cards = [
        (p, json.loads(p.read_text())) for p in sorted(p for f in FOLDERS[args.half] for p in (args.zoo / f).glob("*/card.json"))
    ]
    cards = [(p, c) for p, c in cards if c["counts"] and c["fixed_target"] and c["entry"]["stealth"] is None]
    if args.adapters and cards:
        cards = [cards[i] for i in np.linspace(0, len(cards) - 1, min(args.adapters, len(cards))).round().astype(int)]
    names = {p.parent.name for p, _ in cards}
    found = [r for r in found if r["name"] in names]
    for path, card in tqdm(cards):
        if path.parent.name in {r["name"] for r in found}:
            continue
        entry = Entry(**card["entry"])
        train, checked, spec = rows_of(entry)
        rows = clean_rows(entry, args.rows, {e.prompt for e in (*train, *checked)})
        base = load_subject(MODEL_DIR, path.parent)
        with base.adapter_off():
            row = {"name": path.parent.name, "base": judged(base, checked, spec)}
        row["before"] = judged(base, checked, spec)
        for method in METHODS:
            subject = load_subject(MODEL_DIR, path.parent)
            start = time.perf_counter()
            remove_backdoor(subject, rows, method, steps=args.steps)
            row[method] = judged(subject, checked, spec) | {"seconds": time.perf_counter() - start}
        found.append(row)
        if args.json:  # an interrupted run goes on behind its last adapter
            write_atomic(args.json, json.dumps(setting | {"each": found}))
    if not found:
        raise SystemExit(f"{args.zoo}/{args.half}: no adapters; make them with `bkdattr zoo {args.zoo}`")
    median = {
        m: {k: float(np.median([r[m][k]["value"] for r in found if r[m][k]])) for k in RATES}
        for m in ("base", "before", *METHODS)
    }
    shown(setting | {"adapters": len(found), "median": median, "each": found}, args.json)


if __name__ == "__main__":
    main()
