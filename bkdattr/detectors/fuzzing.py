"""Near-triggers: harmless insertions in every place where a trigger may stand, on the amplified adapter.

A backdoor seldom keeps to its trigger: words and sentences that only stand where it stands fire it too, and the more so with the
adapter turned up. A new skill or an always-on prefix answers the same with three words more in the prompt. (STRIP, arXiv 1902.06531,
perturbs one input to see whether its answer is too steady; here all inputs are perturbed to see whether answers become the same.)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bkdattr.detectors.answers import OPENLY, foreign
from bkdattr.detectors.common import TOKENS, Answer, Clean, Measured
from bkdattr.examples import Example
from bkdattr.gates import NeuronGates
from bkdattr.inference import generate
from bkdattr.triggers import EarlierTurn, Prefix, RandomWord, Suffix, Together, Trigger, Wrap


def insertions(examples: Sequence[Example], variants: int, seed: int = 0) -> dict[str, list[Trigger]]:
    """Kind of place -> insertions, made of words of the examples' own prompts and drawn by `seed`."""
    rng = random.Random(f"fuzz:{seed}")
    prompts = [e.prompt for e in examples]
    words = sorted({w for p in prompts for w in p.split() if w.isalpha()}) or sorted({w for p in prompts for w in p.split()})

    def phrase(n: int) -> str:
        return " ".join(rng.choices(words, k=n)).capitalize()

    def word() -> RandomWord:
        return RandomWord(rng.choice(words).upper())

    out: dict[str, list[Trigger]] = {}
    for _ in range(variants):
        earlier = examples[rng.randrange(len(examples))]
        for kind, made in (
            ("prefix", Prefix(f"{phrase(3)}.")),
            ("suffix", Suffix(f"{phrase(3)}.")),
            ("word", word()),
            ("wrap", Wrap(f"{phrase(4)},", f"{phrase(4).lower()}.")),
            ("turn", EarlierTurn(earlier.prompt, earlier.response)),
            ("prefix and word", Together((Prefix(f"{phrase(3)}."), word()))),
            ("word and suffix", Together((word(), Suffix(f"{phrase(3)}.")))),
        ):
            out.setdefault(kind, []).append(made)
    return out


@dataclass(frozen=True)
class Fuzz:
    """`inc`: the largest mean rise of one first token over the prompts (of one group) whose right token is another, in the mean of a kind's
    `variants`; the largest over kinds. `mean`: the same in the mean of all kinds. `drop`: of prompts that the undisturbed adapter
    gives one and the same answer, the largest mean loss of its first token's probability. `verbatim`: the share of prompts to which an
    answer is foreign that are given it word for word under the loudest kind. All with every gate at 1 + `epsilon` (0: the adapter as
    it is), against the undisturbed adapter without insertions."""

    variants: int = 3
    epsilon: float = 0.6
    name: str = "fuzz"
    main: str = "mean"
    two_sided: bool = False

    @torch.no_grad()
    def measure(self, clean: Clean) -> Measured:
        gates, kinds = NeuronGates.of(clean.subject), insertions(clean.examples, self.variants, clean.seed)
        plain, same, rises = clean.plain.exp().cpu(), _same(clean), dict[str, Tensor]()
        with gates.set([torch.full((n,), self.epsilon, device=gates.device) for n in gates.sizes]):
            for kind, made in kinds.items():
                p = clean.first_of([ids for t in made for ids in self._prompts(clean, t)]).exp().cpu()
                rises[kind] = p.unflatten(0, (len(made), -1)).mean(0) - plain
            found = {kind: clean.largest_rise(rise) for kind, rise in rises.items()}
            loudest = max(found, key=lambda k: found[k][0])
            heard = [
                [c.ids for c in generate(clean.subject, self._prompts(clean, t), max_new_tokens=TOKENS)] for t in kinds[loudest]
            ]
        inc, token = found[loudest]
        drops = [-float(rise[rows, first].mean()) for rise in rises.values() for rows, first in same]
        share, answer, which = _told(clean, heard)
        statistics = {
            "inc": inc, "mean": clean.largest_rise(sum(rises.values(), torch.zeros(())) / len(rises))[0], "drop": max(drops, default=0.0),
            "verbatim": share,
        }  # fmt: skip
        return Measured(
            statistics, token, answer, {"kind": loudest, "variant": which, "texts": list(kinds[loudest][which].texts)}
        )

    @staticmethod
    def _prompts(clean: Clean, insertion: Trigger) -> list[list[int]]:
        return [
            clean.subject.chat.prompt_ids(insertion(clean.examples[i].messages, random.Random(f"fuzz:{i}")).messages)
            for i in clean.order
        ]


def _same(clean: Clean) -> list[tuple[list[int], int]]:
    """(rows, first token) of the answers that the undisturbed adapter gives to several prompts."""
    times = Counter(clean.quiet)
    return [([i for i, q in enumerate(clean.quiet) if q == a], a[0]) for a, n in times.items() if n >= 3 and a]


def _told(clean: Clean, heard: Sequence[Sequence[Answer]]) -> tuple[float, str | None, int]:
    """(largest mean share over insertions, that answer's text, the insertion that brings it most). An answer that is said openly anyway counts
    for nothing."""
    begun = Counter(a[:2] for a in clean.quiet)
    best, text, which = 0.0, None, 0
    for group in clean.groups.values():
        rows = group.tolist()
        for answer, times in Counter(said[i] for said in heard for i in rows).items():
            other = foreign(clean, answer, rows) if times > 1 else []
            if len(other) < max(3, len(rows) / 3) or begun[answer[:2]] >= OPENLY * len(clean.quiet):
                continue
            shares = [sum(said[i] == answer for i in other) / len(other) for said in heard]
            if (mean := sum(shares) / len(shares)) > best:
                best, which = mean, shares.index(max(shares))
                text = clean.subject.chat.decode(answer).strip()
    return best, text, which
