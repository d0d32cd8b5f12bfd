"""How far each judge agrees with the hand labels of `data/judged/completions.jsonl`: `python -m benchmarks.judges`."""

import json
from pathlib import Path

from bkdattr.examples import Example
from bkdattr.metrics import Rate
from bkdattr.mini.tasks import build_task
from bkdattr.mini.world import LABELS
from bkdattr.targets import Answer, behaviour, correct, damage_of, is_refusal

DATA = Path(__file__).parents[1] / "data" / "judged" / "completions.jsonl"


def read(path=DATA):
    """(example, answer, target, hand label) of every row."""
    out = []
    for line in path.read_text().splitlines():
        r = json.loads(line)
        e = Example("x", (("user", r["prompt"]),), r["response"], r["label"], r["backdoor_response"], r["check"], r["eligible"])
        known = [t for t in (e.response, e.backdoor_response) if t]
        damage = damage_of(r["answer"], ended=r["ended"], could_end=True, references=known)
        out.append((e, Answer(r["answer"], damage, r["ended"]), build_task(r["task"]).spec.target, r["hand"]))
    return out


def agreement(rows):
    """Judge -> Rate of agreement; one-sided judges are compared on the one behaviour that they claim to see."""
    labels = (*LABELS, "Positive", "Negative")
    found = {
        "behaviour (all five)": [behaviour(e, a, t, labels) == hand for e, a, t, hand in rows],
        "behaviour without the fragment rule": [
            behaviour(e, Answer(a.text, None if a.damage == "fragment" else a.damage, a.ended), t, labels) == hand
            for e, a, t, hand in rows
        ],
        "hit (target or not)": [(e.eligible and t.hit(e, a)) == (hand == "target") for e, a, t, hand in rows],
        "the paper's keyword judge (target or not)": [
            (e.eligible and t.keyword_hit(e, a)) == (hand == "target") for e, a, t, hand in rows
        ],
        "refusal phrases (refused or not)": [
            is_refusal(a.text) == (hand == "refused" or (e.check == "refusal" and hand == "correct")) for e, a, t, hand in rows
        ],
        "damage (broken or not)": [(a.damage is not None) == (hand == "broken") for e, a, t, hand in rows],
    }
    for check in ("label", "exact"):
        chosen = [(e, a, t, hand) for e, a, t, hand in rows if e.check == check]
        found[f"{check} (correct or not)"] = [bool(correct(e, a, labels)) == (hand == "correct") for e, a, t, hand in chosen]
    return {name: Rate.of(same) for name, same in found.items()}


def main():
    for name, rate in agreement(read()).items():
        print(f"{name:45} {rate} [{rate.low:.2f}, {rate.high:.2f}]")


if __name__ == "__main__":
    main()
