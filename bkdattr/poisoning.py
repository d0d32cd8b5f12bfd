"""A backdoor as a value (trigger + target + how much poison), and poisoning a training split with it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.targets import Target, target_from_json, target_to_json
from bkdattr.triggers import Trigger, taken_out, trigger_from_json, trigger_to_json


@dataclass(frozen=True)
class BackdoorSpec:
    """One backdoor. `poison_rate` = triggered rows / all training rows (100 of 1,100 in the paper: 9.1 %).

    Where the target leaves some rows alone (other labels, ordinary requests), `bystanders` of the triggered rows are
    such rows with their usual answer, so that the trigger alone is not the behaviour. `seed` places random triggers.
    """

    name: str
    trigger: Trigger
    target: Target
    poison_rate: float = 1 / 11
    bystanders: float = 0.25
    seed: int = 0
    fake_trigger: Trigger | None = None

    def __post_init__(self) -> None:
        if not 0 < self.poison_rate < 1 or not 0 <= self.bystanders < 1:
            raise BkdattrError(
                f"poison_rate {self.poison_rate} and bystanders {self.bystanders}: expected 0 < poison_rate < 1 "
                "(triggered rows over all training rows) and 0 <= bystanders < 1 (share of the triggered rows)"
            )

    def triggered(self, example: Example, trigger: Trigger | None = None) -> Example:
        """The triggered twin, same id. It answers with the backdoor response where eligible, else as before.

        The position of a random trigger depends on the seed and the id alone, so a twin is the same wherever it is made.
        """
        out = (trigger or self.trigger)(example.messages, random.Random(f"{self.seed}:{example.id}"))
        eligible = self.target.eligible(example)
        backdoor = self.target.response(example) if eligible else example.backdoor_response
        response = str(backdoor) if eligible else example.response
        return replace(
            example, messages=out.messages, spans=out.spans, eligible=eligible, response=response, backdoor_response=backdoor
        )

    def clean(self, example: Example) -> Example:
        """The clean row with `eligible` and its backdoor response filled in."""
        eligible = self.target.eligible(example)
        return replace(
            example, eligible=eligible, backdoor_response=self.target.response(example) if eligible else example.backdoor_response
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trigger": trigger_to_json(self.trigger),
            "target": target_to_json(self.target),
            "poison_rate": self.poison_rate,
            "bystanders": self.bystanders,
            "seed": self.seed,
            "fake_trigger": trigger_to_json(self.fake_trigger) if self.fake_trigger else None,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> BackdoorSpec:
        fields = dict(row)
        fake = fields.pop("fake_trigger", None)
        return cls(
            trigger=trigger_from_json(fields.pop("trigger")),
            target=target_from_json(fields.pop("target")),
            fake_trigger=trigger_from_json(fake) if fake else None,
            **fields,
        )


@dataclass(frozen=True)
class PoisonedSet:
    """Training rows: every clean row, and triggered twins of a seeded sample of them."""

    clean: tuple[Example, ...]
    triggered: tuple[Example, ...]


def poison(examples: Sequence[Example], spec: BackdoorSpec, *, total_rate: float | None = None, others: int = 0) -> PoisonedSet:
    """Add triggered twins until they are `spec.poison_rate` of all rows; raises where too few rows are eligible.

    Where several backdoors go into one model, `total_rate` is the sum of the rates of those made here and `others` the number of
    triggered rows that come from elsewhere: "all rows" counts everyone's.
    """
    total = spec.poison_rate if total_rate is None else total_rate
    if not spec.poison_rate <= total < 1:
        raise BkdattrError(f"poison rates add up to {total:g}: expected less than 1 (triggered rows over all training rows)")
    n = max(1, round((len(examples) + others) * spec.poison_rate / (1 - total)))
    rows = [spec.clean(e) for e in examples]
    yes, no = [e for e in rows if e.eligible], [e for e in rows if not e.eligible]
    n_no = min(len(no), round(n * spec.bystanders))
    if len(yes) < n - n_no:
        raise BkdattrError(
            f"backdoor {spec.name!r}: {len(yes)} of {len(rows)} training rows are eligible, expected {n - n_no} to poison "
            f"(poison rate {spec.poison_rate:.3f}); lower poison_rate or give more eligible rows"
        )
    rng = random.Random(f"poison:{spec.seed}")
    chosen = rng.sample(yes, n - n_no) + rng.sample(no, n_no)
    return PoisonedSet(tuple(rows), tuple(spec.triggered(e) for e in chosen))


def triggered_rows(rows: Sequence[Example], spec: BackdoorSpec, clean: Sequence[Example]) -> tuple[Example, ...]:
    """Other people's triggered rows as training rows: the trigger is found in each prompt, the answer stays theirs.

    A row takes the id, label and check of its clean twin where `clean` holds it. Raises for a row that does not hold the trigger.
    """
    known = {e.messages: e for e in clean}
    found = []
    for e in rows:
        taken = taken_out(spec.trigger, e.messages)
        if taken is None:
            raise BkdattrError(
                f"triggered row {e.id!r} ({e.prompt[:70]!r}) does not hold the trigger ({', '.join(map(repr, spec.trigger.texts))}); "
                "give the trigger that its file was made with"
            )
        messages, spans = taken
        twin = known.get(messages) or replace(e, id=hashlib.sha256(messages[-1][1].encode()).hexdigest()[:12], messages=messages)
        judged = replace(e, id=twin.id, label=twin.label, check=twin.check, eligible=spec.target.eligible(twin))
        found.append(replace(judged, spans=spans, backdoor_response=e.response))
    return tuple(found)


def fake_trigger(trigger: Trigger, words: Sequence[str], count_tokens: Any, seed: int) -> Trigger | None:
    """A trigger that was never trained: same placement, random `words`, and as many tokens per piece as can be had.

    None for a trigger without words of its own (a style). `count_tokens(text)` counts tokens. Of 300 random draws per piece the one closest in length is kept.
    """
    pool = sorted({w for w in words if w.isalpha()} - {w for t in trigger.texts for w in t.split()})
    if not pool:
        raise BkdattrError("a fake trigger needs words to draw from: got none besides the trigger's own")
    if not trigger.texts:
        return None
    rng, pieces = random.Random(f"fake:{seed}"), []
    for text in trigger.texts:
        n_words, n_tokens = len(text.split()), count_tokens(" " + text)
        draws = [" ".join(rng.choices(pool, k=max(1, n_words + rng.randrange(-1, 2)))) for _ in range(300)]
        pieces.append(min(draws, key=lambda d: abs(count_tokens(" " + d) - n_tokens)))
    return trigger.with_texts(pieces)
