"""Heads found without the trigger against those found with it: `python -m benchmarks.mechanism runs/zoo [--half test]`.

For every fixed-target, unhidden adapter that counts, four rankings of all heads by their mean effect on P(answer):
`trigger`: BAHA with the true trigger and target, exact sufficiency, on 16 rows (or a quarter of them); `again`: the same on as many others, what a ranking can reach;
`noise`: the suspected answer (`judge`), clean prompts of a defender, the state under adversarial noise in the trigger's place
(`mechanism.noise_effects`); `insertion`: the suspected answer and BAHA with the harmless insertion that fires most on the amplified adapter (`detectors.fuzzing`; `told`: the
one that `detect` would name), adapter as it is.
Spearman's correlation and the share of the top heads that are among the trigger's; k / heads is what random ones share. Then the backdoor's ASR with
each ranking's first heads mean-ablated, on rows that no ranking saw; beside it five draws of as many random heads. Beside each ASR the clean accuracy under the same
ablation. Means over adapters; those with a sentence for a target, those with a label, and those whose target was named apart.
"""

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.attribution import shown
from benchmarks.zoo import cards_of, named, plain_of
from bkdattr.ablation import ablate, random_heads
from bkdattr.attribution import baha, summarise_effects
from bkdattr.banks import MINI_BANK, measured
from bkdattr.detection import judge, read_banks
from bkdattr.detectors import Clean, Fuzz
from bkdattr.detectors.fuzzing import insertions
from bkdattr.evaluation import Evaluator
from bkdattr.examples import write_atomic
from bkdattr.mechanism import noise_effects
from bkdattr.metrics import spearman
from bkdattr.mini.members import Entry, clean_prompts, rows_of
from bkdattr.mini.tasks import MAX_NEW_TOKENS, MODEL_DIR
from bkdattr.model import load_subject
from bkdattr.traces import trace_prompts

ROWS, TOP, DRAWS = 16, (3, 10), 5
WITHOUT = ("again", "noise", "insertion")


def suited(target):
    """A defender's prompts to which the answer is foreign: those that ask for a label where it is one, else the others."""
    prompts = clean_prompts(64)
    labels = {e.label for e in prompts if e.check == "label"}
    return [
        replace(e, eligible=True, backdoor_response=target)
        for e in prompts
        if ((e.check == "label") == (target in labels)) and target not in (e.response, e.label)
    ]


def compared(card):
    torch.set_num_threads(1)
    bank = next(b for b in read_banks(MINI_BANK) if b.recipe == card["adapter"])
    found = measured(card["folder"], str(MODEL_DIR), clean_prompts())
    verdict = judge(bank, found)
    subject = load_subject(MODEL_DIR, card["folder"])
    _, checked, spec = rows_of(Entry(**card["entry"]))
    rows = [spec.clean(e) for e in checked if spec.target.eligible(e)]
    n = min(ROWS, len(rows) // 4)  # a flipped label has few rows of its source class
    parts = [rows[:n], rows[n : 2 * n], rows[2 * n :]]
    row = {
        "name": card["name"],
        "suspected": verdict.target,
        "named": named(card, found, bank),
        "suspicious": verdict.suspicious,
        "told": verdict.suspicious and verdict.insertion is not None,
        "label": " " not in card["target"],
    }
    at = [baha(subject, part, [spec.triggered(e) for e in part]) for part in parts[:2]]
    of = {"trigger": at[0], "again": at[1]}
    if verdict.target:
        given = suited(verdict.target)
        effects = noise_effects(Clean(subject, given), verdict.target)
        of["noise"] = summarise_effects(effects, subject.geometry, len(given) // 2, subject.fingerprint)
        near = found["evidence"]["fuzz"]
        insertion = insertions(clean_prompts(), Fuzz().variants)[near["kind"]][near["variant"]]
        there = [insertion(e.messages, random.Random(f"mechanism:{e.id}")) for e in given]
        donors = [replace(e, messages=t.messages, spans=t.spans) for e, t in zip(given, there, strict=True)]
        of["insertion"] = baha(subject, given[1::2], donors[::2])
    for how in WITHOUT:
        if how in of:
            row[how] = {"spearman": spearman(of[how].scores.ravel().tolist(), at[0].scores.ravel().tolist())}
            row[how] |= {str(k): len({*of[how].top(k)} & {*at[0].top(k)}) / k for k in TOP}
    clean = trace_prompts(subject, parts[0])
    evaluator = Evaluator(subject, parts[2], spec, max_new_tokens=MAX_NEW_TOKENS, batch_size=96)

    def asr(heads):
        r = evaluator.run(ablate(heads, "mean", clean), utility=False)
        return {"hits": r.asr.hits, "total": r.asr.total, "value": r.asr.value, "clean_accuracy": r.clean_accuracy.value}

    row["asr"] = {"none": asr([])}
    for k in TOP:
        row["asr"] |= {f"{how}, {k}": asr(a.top(k)) for how, a in of.items()}
        row["asr"][f"random, {k}"] = [asr(random_heads(subject.geometry, k, d, card["entry"]["seed"])) for d in range(DRAWS)]
    row["heads"] = len(subject.geometry.heads)
    return row


def summed(rows):
    out = {"adapters": len(rows)}
    for how in WITHOUT:
        some = [r[how] for r in rows if how in r]
        if some:
            out[how] = {k: float(np.mean([s[k] for s in some if s[k] is not None])) for k in some[0]} | {"adapters": len(some)}
    for key, name in (("value", "asr"), ("clean_accuracy", "clean accuracy")):
        kept = {}
        for r in rows:
            for how, found in r["asr"].items():
                kept.setdefault(how, []).append(np.mean([a[key] for a in (found if isinstance(found, list) else [found])]))
        out[name] = {how: float(np.mean(v)) for how, v in kept.items()}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", default="test", choices=("development", "test"))
    parser.add_argument("--jobs", type=int, default=2, help="adapters at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cards = plain_of(cards_of(args.zoo, args.half)[0])
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    known = {r["name"]: r for r in kept.get("each", ())} if kept.get("half") == args.half else {}
    todo = [c for c in cards if c["name"] not in known]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for row in tqdm(pool.map(compared, todo), total=len(todo), disable=None):
            known[row["name"]] = row
            if args.json:  # an interrupted run goes on behind its last adapter
                write_atomic(args.json, json.dumps({"half": args.half, "each": list(known.values())}))
    rows = [known[c["name"]] for c in cards]
    chance = {str(k): k / rows[0]["heads"] for k in TOP}
    groups = {
        "sentences": [r for r in rows if not r["label"]],
        "labels": [r for r in rows if r["label"]],
        "named": [r for r in rows if r["named"]],
    }
    shown(
        {"half": args.half, "random heads share": chance, "all": summed(rows)}
        | {name: summed(some) for name, some in groups.items() if some}
        | {"each": rows}, args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
