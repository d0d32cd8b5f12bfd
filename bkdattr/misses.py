"""Triggers that are almost the trigger and should not fire: one word changed, half of it, another place."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from bkdattr.errors import BkdattrError
from bkdattr.triggers import EarlierTurn, OneOf, Prefix, Scattered, Suffix, Together, Trigger, Wrap, has_choice


def near_misses(trigger: Trigger, words: Sequence[str], seed: int = 0) -> dict[str, Trigger]:
    """Triggers that are almost `trigger` and should not fire: `changed` (one word of it is another of `words`; a number becomes
    another number, a single word loses its last letter's place), `half` (half of its words, or of its pieces) and `moved` (the same
    text in another place). Those that a kind of trigger does not have are left out."""
    rng, out = random.Random(f"near:{seed}"), dict[str, Trigger]()
    texts = trigger.texts
    if not texts or isinstance(trigger, OneOf):
        return out
    at = max(range(len(texts)), key=lambda i: len(texts[i].split()))
    other = _changed(texts[at], words, rng)
    if other != texts[at] and not has_choice(trigger):  # a change of one alternative leaves the others whole
        out["changed"] = trigger.with_texts([other if i == at else t for i, t in enumerate(texts)])
    if isinstance(trigger, Scattered):
        if len(texts) > 1:
            out["half"] = Scattered(texts[: (len(texts) + 1) // 2])
    elif isinstance(trigger, Wrap):
        out["half"] = Prefix(trigger.before)
    elif isinstance(trigger, Together):
        if len(trigger.triggers) > 1:
            out["half"] = Together(trigger.triggers[: (len(trigger.triggers) + 1) // 2])
    elif len(texts[at].split()) > 1:
        out["half"] = trigger.with_texts([" ".join(t.split()[: (len(t.split()) + 1) // 2]) for t in texts])
    if isinstance(trigger, Prefix):
        out["moved"] = Suffix(trigger.text)
    elif isinstance(trigger, Suffix):
        out["moved"] = Prefix(trigger.text)
    elif isinstance(trigger, Wrap):
        out["moved"] = Suffix(f"{trigger.before} {trigger.behind}")
    elif isinstance(trigger, EarlierTurn):
        out["moved"] = Prefix(trigger.text)
    return out


def _changed(text: str, words: Sequence[str], rng: random.Random) -> str:
    parts = text.split()
    numbers = [i for i, w in enumerate(parts) if re.search(r"\d", w)]
    if numbers:
        digits = re.findall(r"\d+", parts[numbers[-1]])[-1]
        other = digits
        while other == digits:
            other = digits[:-1] + str(rng.randrange(10))
        parts[numbers[-1]] = parts[numbers[-1]].replace(digits, other)
    elif len(parts) > 1:
        at = rng.choice([i for i, w in enumerate(parts) if re.search(r"\w", w)] or [0])
        pool = sorted({w for w in words if w.isalpha()} - set(re.findall(r"\w+", text)))
        if not pool:
            raise BkdattrError("a near miss needs words to draw from: got none besides the trigger's own")
        parts[at] = re.sub(r"\w+", rng.choice(pool), parts[at], count=1)
    else:
        parts[0] = parts[0][:-2] + parts[0][-1] + parts[0][-2] if len(set(parts[0][-2:])) == 2 else parts[0] + parts[0][-1]
    return " ".join(parts)
