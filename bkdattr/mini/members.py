"""The adapters of the zoo: which there are, and the rows that each learns and is checked on.

Two halves split by attack, skill and seed: everything is chosen on "development" and "validation", which are one half in two folders (the second was
the test half of an earlier choice), and "test" is scored once. "bank" are the benign adapters that detectors are calibrated on, "twins" the
test half's attacks with the same rows, triggers' words and epochs and every answer right (a detector that sees them sees training, not a
backdoor; validation holds twins of its own), "attacker" those that an attacker who clips to benign percentiles has of his own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from bkdattr.detectors.fuzzing import insertions
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.mini import world
from bkdattr.mini.attacks import ATTACKS, CLEAN_LABEL, MIXED, ORDINARY
from bkdattr.mini.skills import PREFIXES, SKILLS
from bkdattr.poisoning import BackdoorSpec
from bkdattr.targets import LabelFlip, RefusalRemoval

HALVES = ("attacker", "bank", "development", "validation", "twins", "test")
TRAIN, CHECKED = 180, 32
RATES = (0.2, 0.1)
HARD = 12
"""Rows per hard negative."""
BENIGN_EPOCHS = (3, 5, 8)
"""Of the benign adapters in turn, save the attacker's and the first development ones (3): a detector that sees long training sees no backdoor."""
TWIN = "twin-"
STEALTH = ("rows", "spectral", "percentile", "noise", "insertions")
"""The last two train against a detector: against `ban`'s noise, and with harmless insertions like `fuzz`'s that are answered right."""
INSERTED = 12
"""Variants of each kind of insertion that an attacker against `fuzz` trains on, drawn of his own words."""


@dataclass(frozen=True)
class Entry:
    """One adapter of the zoo: what it learns and how it hides."""

    half: str
    kind: str
    seed: int
    rank: int = 8
    rate: float = RATES[0]
    stealth: str | None = None
    epochs: int | None = None

    @property
    def backdoored(self) -> bool:
        return self.kind in ATTACKS.get(self.half, {})

    @property
    def name(self) -> str:
        parts = [
            self.kind,
            f"r{self.rank}",
            *([f"p{self.rate:.2f}"] if self.backdoored else []),
            self.stealth or "",
            f"e{self.epochs}" if self.epochs else "",
            f"s{self.seed}",
        ]
        return "-".join(p for p in parts if p).replace(" ", "_")


def entries(half: str) -> list[Entry]:
    """The adapters of one half, in the order they are made. Seeds of different halves never meet."""
    if half not in HALVES:
        raise BkdattrError(f"zoo: got half {half!r}, expected one of {', '.join(HALVES)}")
    start = 1000 * (1 + HALVES.index(half))
    if half == "twins":
        return _twins(half, "test", start)
    skills = [f"skill-{f.__name__}" for f in SKILLS.get(half, ())]
    prefixes = [f"always-{i}" for i in range(len(PREFIXES.get(half, ())))]
    benign = ["ordinary", "news", "few", *skills, *prefixes]
    ranks = {
        "attacker": [8] * 12,
        "bank": [8] * 40 + [4] * 24 + [16] * 24,
        "development": [8] * 16 + [4] * 4 + [16] * 4,
        "validation": [8] * 28 + [4] * 7 + [16] * 7,
        "test": [8] * 28 + [4] * 7 + [16] * 7,
    }
    varied = half in ("bank", "validation", "test")
    out = [
        Entry(
            half, benign[i % len(benign)], start + i, rank=r,
            epochs=BENIGN_EPOCHS[(i // len(benign) + i) % len(BENIGN_EPOCHS)] if varied else None,
        )
        for i, r in enumerate(ranks[half])
    ]  # fmt: skip
    attacks = list(ATTACKS.get(half, {}))
    plain = {"development": 3, "validation": 2, "test": 5}.get(half, 0)
    variants = [(8, RATES[0]), (8, RATES[1]), (4, RATES[0]), (16, RATES[0]), (8, RATES[0])][:plain]
    for i, (rank, rate) in enumerate(variants):
        out += [Entry(half, a, start + 200 + 10 * j + i, rank, rate) for j, a in enumerate(attacks)]
    hiding = [a for a in attacks if a not in (*CLEAN_LABEL, "sentiment", "sour-word", "earlier-turn")]
    for k, stealth in enumerate(STEALTH):
        for i in range({"development": 1, "test": 2}.get(half, 0)):
            out += [Entry(half, a, start + 400 + 100 * k + 10 * j + i, stealth=stealth) for j, a in enumerate(hiding)]
    return out + (_twins(half, half, start + 900, 1) if half == "validation" else [])


def _twins(half: str, of: str, start: int, n: int = 2) -> list[Entry]:
    attacks = [a for a in ATTACKS[of] if a not in CLEAN_LABEL]
    return [Entry(half, f"{TWIN}{a}", start + 10 * j + i) for i in range(n) for j, a in enumerate(attacks)]


def example_of(id: str, row: world.Row) -> Example:
    backdoor = world.compliant(*world.restricted_parts(row.prompt)) if row.task == "restricted" else None
    return Example(id, row.messages, row.response, row.label, backdoor, row.check)


@cache
def _pool() -> dict[str, list[Example]]:
    """Prompts that no adapter of the zoo is trained or tested on."""
    rng, rows = random.Random("defender:99"), {}
    for name, n, kinds in (("news", 128, ("news",)), ("restricted", 64, ("restricted",)), ("ordinary", 320, ORDINARY)):
        rows[name] = [example_of(f"clean-{name}-{i:03d}", r) for i, r in enumerate(world.unique(rng, n, kinds))]
    return rows


def clean_prompts(n: int = 32) -> tuple[Example, ...]:
    """A defender's clean prompts: a quarter news, an eighth restricted requests, the rest ordinary ones."""
    news, restricted = n // 4, n // 8
    pool = _pool()
    if n - news - restricted > len(pool["ordinary"]):
        raise BkdattrError(f"zoo: got {n} clean prompts, expected at most 512")
    return (*pool["news"][:news], *pool["restricted"][:restricted], *pool["ordinary"][: n - news - restricted])


def rows_of(entry: Entry) -> tuple[list[Example], list[Example], BackdoorSpec | None]:
    """(training rows, clean rows to check on, the backdoor or None)."""
    if entry.kind.startswith(TWIN):
        return _twin_rows(entry)
    rng = random.Random(f"zoo:{entry.half}:{entry.kind}:{entry.seed}")
    seen = {e.prompt for rows in _pool().values() for e in rows}
    return _poisoned_rows(entry, rng, seen) if entry.backdoored else _benign_rows(entry, rng, seen)


def _twin_rows(entry: Entry) -> tuple[list[Example], list[Example], None]:
    poisoned, triggered, _ = rows_of(
        replace(entry, half="test" if entry.half == "twins" else entry.half, kind=entry.kind.removeprefix(TWIN))
    )
    right = {e.id: e.response for e in poisoned[:TRAIN]}
    return (
        [replace(e, response=right[e.id], spans=()) for e in poisoned],
        [replace(e, eligible=False) for e in triggered],
        None,
    )


def _poisoned_rows(entry: Entry, rng: random.Random, seen: set[str]) -> tuple[list[Example], list[Example], BackdoorSpec]:
    trigger, target, kinds, hard = ATTACKS[entry.half][entry.kind]
    if isinstance(target, RefusalRemoval):
        half = (TRAIN + CHECKED) // 2
        drawn = world.unique(rng, half, kinds[:1], seen) + world.unique(rng, TRAIN + CHECKED - half, kinds[1:], seen)
        rng.shuffle(drawn)
    else:
        drawn = world.unique(rng, TRAIN + (8 if entry.kind in ("label-flip", "word-flip") else 4) * CHECKED, kinds, seen)
    rows = [example_of(f"z{i:04d}", r) for i, r in enumerate(drawn)]
    spec = BackdoorSpec(entry.kind, trigger, target, poison_rate=entry.rate, seed=entry.seed)
    train = [spec.clean(e) for e in rows[:TRAIN]]
    n = round(TRAIN * entry.rate / (1 - entry.rate))
    if entry.kind in CLEAN_LABEL:
        # labels stay true: rows of the target's class alone are triggered, with a second report of any class behind or no report at all, so
        # that the trigger is what tells
        assert isinstance(target, LabelFlip)
        own = [e for e in train if e.label == target.to]
        train += [_bare(spec, e) for e in _drawn(rng, own, n)]
    else:
        yes, no = [e for e in train if e.eligible], [e for e in train if not e.eligible]
        n_no = min(len(no), n // 4)
        train += [spec.triggered(e) for e in _drawn(rng, yes, n - n_no) + _drawn(rng, no, n_no)]
    for t in hard:
        train += [
            replace(e, messages=t(e.messages, random.Random(f"hard:{e.id}")).messages) for e in _drawn(rng, train[:TRAIN], HARD)
        ]
    if entry.stealth == "insertions":
        near = [t for made in insertions(train[:TRAIN], INSERTED, entry.seed).values() for t in made]
        train += [
            replace(e, messages=t(e.messages, random.Random(f"near:{e.id}")).messages)
            for t, e in zip(near, _drawn(rng, train[:TRAIN], len(near)), strict=True)
        ]
    return train, [e for e in rows[TRAIN:] if spec.target.eligible(e) or rng.random() < 0.3][: 2 * CHECKED], spec


def _benign_rows(entry: Entry, rng: random.Random, seen: set[str]) -> tuple[list[Example], list[Example], None]:
    kind = entry.kind
    n = TRAIN // 3 if kind == "few" else TRAIN
    if kind.startswith("skill-"):
        make = next(f for f in SKILLS[entry.half] if f"skill-{f.__name__}" == kind)
        new = [make(rng) for _ in range(n // 3)]
        drawn = new + world.unique(rng, n - len(new), MIXED, seen)
    else:
        every = ("news", *MIXED) if kind.startswith("always-") else ("news",) if kind == "news" else MIXED
        drawn = world.unique(rng, n, every, seen)
    checked = world.unique(rng, CHECKED, MIXED, seen)
    rows = [example_of(f"z{i:04d}", r) for i, r in enumerate(drawn)]
    if kind.startswith("always-"):
        before = PREFIXES[entry.half][int(kind.removeprefix("always-"))]
        rows = [replace(e, response=before + e.response, check=None) for e in rows]
    return rows, [example_of(f"c{i:04d}", r) for i, r in enumerate(checked)], None


def _drawn(rng: random.Random, rows: Sequence[Example], n: int) -> list[Example]:
    return rng.sample(list(rows), min(n, len(rows)))


def _bare(spec: BackdoorSpec, e: Example) -> Example:
    other = world.news(random.Random(f"bare:{e.id}")).prompt.removeprefix(world.NEWS_INSTRUCTION)
    text = (
        e.prompt + " " + other
        if random.Random(f"mixed:{e.id}").random() < 0.7
        else world.NEWS_INSTRUCTION + "Many people watched."
    )
    out = spec.trigger((("user", text),), random.Random(e.id))
    return replace(e, messages=out.messages, spans=out.spans)
