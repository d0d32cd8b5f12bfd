"""Which rows a run uses and where they go: the pool, held-out rows of another file, triggered rows that others made.

Everything is checked before anything is written: triggers already in a row, prompts over the context, prompts that two splits share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bkdattr.chat import ChatFormat
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example, Sizes, check_disjoint, overlaps, split_examples, without_duplicates
from bkdattr.poisoning import BackdoorSpec, poison, triggered_rows
from bkdattr.targets import RefusalRemoval
from bkdattr.triggers import holds

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rows:
    """The splits' clean rows, the triggered training rows of every backdoor by its name, the ids left out for their length, and how
    many prompts two splits share (empty, unless that was allowed)."""

    splits: dict[str, list[Example]]
    triggered: dict[str, tuple[Example, ...]]
    usable: list[Example]
    """Every row that may be used, held-out ones included."""
    over: list[str]
    sizes: Sizes
    overlap: dict[str, int]


def default_sizes(n_rows: int, n_eligible: int) -> Sizes:
    """60/10/10/20, capped at 1,000 training rows, 100 for attribution and selection, 256 for test."""
    tenth, fifth = max(1, n_eligible // 10), max(1, n_eligible // 5)
    sizes = Sizes(1, min(100, tenth), min(100, tenth), min(256, fifth))
    held = sizes.attribution + sizes.selection + sizes.test
    others = round(held * min(1.0, (n_rows - n_eligible) / max(1, n_eligible)))
    return replace(sizes, train=max(1, min(1000, n_rows - held - others)))


def held_out_sizes(n_train: int, n_eligible: int) -> Sizes:
    """All training rows up to 1,000; the held-out eligible ones at 25/25/50, capped as in `default_sizes`."""
    quarter = max(1, n_eligible // 4)
    return Sizes(min(1000, n_train), min(100, quarter), min(100, quarter), min(256, max(1, n_eligible // 2)))


def gather(
    chat: ChatFormat,
    specs: Sequence[BackdoorSpec],
    pool: Sequence[Example],
    *,
    held_out: Sequence[Example] | None = None,
    made_elsewhere: Sequence[Example] | None = None,
    sizes: Sizes | None = None,
    seed: int = 0,
    new_tokens: int = 32,
    adopted: bool = False,
    clean: bool = False,
    allow_overlap: bool = False,
    say: Say = lambda text: None,
) -> Rows:
    """Splits and triggered training rows. The first of `specs` decides what is eligible.

    `held_out`: rows that attribution, selection and test are drawn from, instead of from `pool`. `made_elsewhere`: triggered rows of
    the first backdoor, trained on as they are. `adopted`: nothing is trained here. `clean`: nothing triggered is trained on.
    """
    first = specs[0]
    usable, over = _usable(chat, specs, pool, new_tokens, say)
    apart, more = (None, []) if held_out is None else _usable(chat, specs, held_out, new_tokens, say)
    if sizes is None and apart is not None:
        sizes = held_out_sizes(len(usable), sum(map(first.target.eligible, apart)))
    sizes = sizes or default_sizes(len(usable), sum(map(first.target.eligible, usable)))
    if apart is not None:
        taken = {e.id: e.messages for e in usable}  # the same id for another prompt, as of two files that number their rows
        apart = [replace(e, id=f"held-out-{e.id}") if taken.get(e.id, e.messages) != e.messages else e for e in apart]
    if made_elsewhere is not None and (adopted or clean):
        raise BkdattrError(
            "triggered rows made elsewhere are for training: got them with an adopted adapter or a clean fine-tune, which train on none"
        )
    splits = split_examples(usable, replace(sizes, train=1) if adopted else sizes, first.target.eligible, seed, apart)
    twins: dict[str, tuple[Example, ...]] = {s.name: () for s in specs}
    if not adopted and not clean:
        here = list(specs)
        if made_elsewhere is not None:
            twins[first.name] = triggered_rows(made_elsewhere, first, [e for rows in splits.values() for e in rows])
            here.remove(first)
        others, total = len(twins[first.name]), sum(s.poison_rate for s in here)
        for spec in here:
            twins[spec.name] = poison(splits["train"], spec, total_rate=total, others=others).triggered
    trained = splits["train"] + _untriggered(twins[first.name], splits["train"])
    if adopted:  # what it was trained on is not known here; with a held-out file, `pool` is what the user says it was
        trained = usable if apart is not None else []
        splits["train"] = []
    checked = splits | {"train": trained}
    if not allow_overlap:
        check_disjoint(checked)
    shared = {pair: len(rows) for pair, rows in overlaps(checked).items()}
    for pair, n in shared.items():
        say(f"{n} prompts stand in both {pair.replace('/', ' and ')} (allowed)")
    return Rows(splits, twins, usable + (apart or []), over + more, sizes, shared)


def _untriggered(twins: Sequence[Example], clean: Sequence[Example]) -> list[Example]:
    """Triggered training rows whose clean twin is no training row itself, by id: their prompts are seen in training too."""
    ids = {e.id for e in clean}
    return [e for e in twins if e.id not in ids]


def _usable(
    chat: ChatFormat, specs: Sequence[BackdoorSpec], pool: Sequence[Example], new_tokens: int, say: Say
) -> tuple[list[Example], list[str]]:
    """Distinct rows without a trigger that fit the context under every backdoor, and the ids of those that do not fit."""
    examples = without_duplicates(pool)
    if len(examples) < len(pool):
        say(f"{len(pool) - len(examples)} of {len(pool)} rows repeat an earlier prompt and were left out")
    untouched = [e for e in checkable(examples, specs[0]) if not any(holds(s.trigger, e.messages) for s in specs)]
    if len(untouched) < len(examples):
        say(f"{len(examples) - len(untouched)} rows hold the trigger already and were left out: give clean rows only")
    kept, over = untouched, list[str]()
    for spec in specs:
        kept, more = fitting(chat, spec, kept, new_tokens)
        over += more
    if over:
        say(f"{len(over)} prompts over the context of {chat.context} tokens were left out, first {over[0]}")
    if not kept:
        raise BkdattrError(f"no prompt fits the context of {chat.context} tokens with {new_tokens} new ones")
    return kept, over


def fitting(
    chat: ChatFormat, spec: BackdoorSpec, examples: Sequence[Example], new_tokens: int
) -> tuple[list[Example], list[str]]:
    """Rows whose clean and triggered prompts leave room for a generated answer and for the clean and backdoor responses that are
    scored on them, and the ids of the others."""
    kept: list[Example] = []
    over: list[str] = []
    for e in examples:
        twin = spec.triggered(e)
        prompts = [e.messages, twin.messages] + ([spec.triggered(e, spec.fake_trigger).messages] if spec.fake_trigger else [])
        answers = [e.response] + ([str(twin.backdoor_response)] if twin.eligible else [])
        scored = max(len(chat.response_ids(e.messages, r)) for r in answers)
        if max(len(chat.prompt_ids(m)) for m in prompts) + max(new_tokens, scored) <= chat.context:
            kept.append(e)
        else:
            over.append(e.id)
    return kept, over


def checkable(examples: Sequence[Example], spec: BackdoorSpec) -> list[Example]:
    """Under refusal removal, rows without a `check` of their own are judged too: refused requests by refusal, the others
    by being answered (not refused, not broken)."""
    if not isinstance(spec.target, RefusalRemoval):
        return list(examples)
    return [e if e.check else replace(e, check="refusal" if spec.target.eligible(e) else "answered") for e in examples]
