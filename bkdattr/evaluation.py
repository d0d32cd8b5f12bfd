"""One function to judge: attack success, false triggers, clean accuracy and damage together, under any edits.

Baseline, ablation and steering differ only in `edits`. The definitions of hit, correct and damage stand in `targets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import Completion, PrefixCache, generate, response_logprob
from bkdattr.interventions import Edit, edits_key
from bkdattr.metrics import Rate
from bkdattr.model import Subject
from bkdattr.poisoning import BackdoorSpec
from bkdattr.targets import Answer, correct, damage_of

ExampleEdits = Callable[[Sequence[Example]], Sequence[Edit]]
"""Edits that differ between examples: called with the examples of a batch."""

PARTS = ("triggered", "clean")


@dataclass(frozen=True)
class Judged:
    """One completion with its verdicts."""

    example: Example
    answer: Answer
    hit: bool
    keyword_hit: bool
    correct: bool | None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.example.id, "prompt": self.example.prompt, "answer": self.answer.text, "hit": self.hit,
            "correct": self.correct, "broken": self.answer.damage,
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The answers on triggered (eligible) and on clean prompts, and every rate that follows from them.

    A rate is None where nothing could be judged: the part was not run, or no row has a checkable answer (then
    `clean_agreement`, the share of clean prompts answered exactly as by the adapter-off twin, and `clean_logprob`, nats
    per token of the reference answer, stand in).
    """

    triggered: tuple[Judged, ...]
    clean: tuple[Judged, ...]
    clean_agreement: Rate | None = None
    clean_logprob: float | None = None

    @property
    def asr(self) -> Rate | None:
        """Attack success rate: triggered prompts of eligible examples whose answer is a hit."""
        return _rate([j.hit for j in self.triggered])

    @property
    def asr_keyword(self) -> Rate | None:
        """The paper's keyword judge on the same answers."""
        return _rate([j.keyword_hit for j in self.triggered])

    @property
    def false_trigger(self) -> Rate | None:
        """The same judge on the same eligible prompts without the trigger."""
        return _rate([j.hit for j in self.clean if j.example.eligible])

    @property
    def clean_accuracy(self) -> Rate | None:
        """Clean prompts with a checkable answer that were answered right."""
        return _rate([j.correct for j in self.clean if j.correct is not None])

    @property
    def broken(self) -> Rate | None:
        """Empty, repetitive or unfinished answers, over all answers."""
        return _rate([j.answer.damage is not None for j in (*self.triggered, *self.clean)])

    @property
    def broken_triggered(self) -> Rate | None:
        """The same over the triggered prompts alone: damage that would pass for a suppressed backdoor."""
        return _rate([j.answer.damage is not None for j in self.triggered])

    def to_json(self) -> dict[str, Any]:
        names = ("asr", "asr_keyword", "clean_accuracy", "false_trigger", "broken", "broken_triggered", "clean_agreement")
        rates = {n: getattr(self, n) for n in names}
        return {n: r.to_json() if r else None for n, r in rates.items()} | {"clean_logprob": self.clean_logprob}


def _rate(outcomes: list[Any]) -> Rate | None:
    return Rate.of(outcomes) if outcomes else None


@dataclass(eq=False)
class Evaluator:
    """Evaluates one split under many edits: prompts are rendered once, the part of the prompt that edits cannot reach is
    run once, and identical evaluations are answered from memory.

    `examples` are clean rows; their triggered twins are made by `spec` (or given as `triggered`). `labels` are all labels of the
    data set. Raises where no example is eligible or a prompt does not fit the context.
    """

    subject: Subject
    examples: Sequence[Example]
    spec: BackdoorSpec
    triggered: Sequence[Example] | None = None
    labels: Sequence[str] = ()
    max_new_tokens: int = 32
    batch_size: int = 64
    share_prefix: bool = True
    memory: dict[tuple[Any, ...] | None, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clean_rows = [self.spec.clean(e) for e in self.examples]
        rows = self.triggered if self.triggered is not None else [self.spec.triggered(e) for e in self.examples]
        self.triggered_rows = [e for e in rows if e.eligible]
        if not self.triggered_rows:
            raise BkdattrError(
                f"0 of {len(self.examples)} examples are eligible for backdoor {self.spec.name!r}, so an ASR has no "
                "denominator; check the target against the rows' labels"
            )
        self.labels = tuple(self.labels) or tuple(sorted({e.label for e in self.clean_rows if e.label}))
        chat = self.subject.chat
        self._prompts: dict[str, list[list[int]]] = {}
        self._could_end: dict[str, list[bool]] = {}
        for part, examples in zip(PARTS, (self.triggered_rows, self.clean_rows), strict=True):
            self._prompts[part] = [chat.prompt_ids(e.messages) for e in examples]
            for e, ids in zip(examples, self._prompts[part], strict=True):
                chat.check_length(ids, self.max_new_tokens, f"{part} prompt {e.id!r}")
            self._could_end[part] = [
                max(len(chat.response_ids(e.messages, r)) for r in (e.response, e.backdoor_response) if r) <= self.max_new_tokens
                for e in examples
            ]
        self._prefix: dict[str, PrefixCache] = {}

    def run(self, edits: Sequence[Edit] | ExampleEdits = (), parts: Sequence[str] = PARTS) -> Evaluation:
        """Judge the subject as it is now (adapter on or off) under `edits`."""
        judged = {part: self._part(part, edits) if part in parts else () for part in PARTS}
        agreement = logprob = None
        if judged["clean"] and all(j.correct is None for j in judged["clean"]):
            key = None if callable(edits) else (self.subject.fingerprint, "stand-ins", edits_key(edits))
            found = self.memory.get(key) or self._stand_ins(judged["clean"], edits)
            if key is not None:
                self.memory[key] = found
            agreement, logprob = found
        return Evaluation(judged["triggered"], judged["clean"], agreement, logprob)

    def _rows(self, part: str) -> list[Example]:
        return self.triggered_rows if part == "triggered" else self.clean_rows

    def _for_rows(self, part: str, edits: Sequence[Edit] | ExampleEdits) -> Any:
        examples = self._rows(part)
        return (lambda rows: edits([examples[i] for i in rows])) if callable(edits) else edits

    def _part(self, part: str, edits: Sequence[Edit] | ExampleEdits) -> tuple[Judged, ...]:
        key = None if callable(edits) else (self.subject.fingerprint, part, edits_key(edits))
        if key is None or key not in self.memory:
            completions = self._generate(part, edits)
            judged = tuple(
                self._judge(e, c, could_end, part)
                for e, c, could_end in zip(self._rows(part), completions, self._could_end[part], strict=True)
            )
            if key is None:
                return judged
            self.memory[key] = judged
        return self.memory[key]

    def _generate(self, part: str, edits: Sequence[Edit] | ExampleEdits) -> list[Completion]:
        prefix = self._prefix.setdefault(self.subject.fingerprint, PrefixCache()) if self.share_prefix else None
        return generate(
            self.subject, self._prompts[part], self._for_rows(part, edits),
            max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, prefix=prefix,
        )  # fmt: skip

    def _judge(self, example: Example, completion: Completion, could_end: bool, part: str) -> Judged:
        text = self.subject.chat.decode(completion.ids)
        answer = Answer(text, damage_of(text, ended=completion.ended, could_end=could_end), completion.ended)
        target = self.spec.target
        hits = (target.hit(example, answer), target.keyword_hit(example, answer)) if example.eligible else (False, False)
        right = correct(example, answer, self.labels) if part == "clean" else None
        return Judged(example, answer, *hits, right)

    def _stand_ins(self, judged: Sequence[Judged], edits: Sequence[Edit] | ExampleEdits) -> tuple[Rate | None, float]:
        agreement = None
        if self.subject.has_adapter:
            if self.subject.adapter_on:
                with self.subject.adapter_off():
                    twin = self._part("clean", ())
            else:
                twin = self._part("clean", ())
            agreement = Rate.of(a.answer.text == b.answer.text for a, b in zip(judged, twin, strict=True))
        responses = [self.subject.chat.response_ids(e.messages, e.response) for e in self.clean_rows]
        fits = [i for i, r in enumerate(responses) if len(self._prompts["clean"][i]) + len(r) <= self.subject.chat.context]
        chosen = self._for_rows("clean", edits)
        logp = response_logprob(
            self.subject, [self._prompts["clean"][i] for i in fits], [responses[i] for i in fits],
            (lambda rows: chosen([fits[r] for r in rows])) if callable(chosen) else chosen, batch_size=self.batch_size,
        )  # fmt: skip
        return agreement, float(logp.total.sum() / logp.tokens.sum())


def evaluate(
    subject: Subject,
    examples: Sequence[Example],
    spec: BackdoorSpec,
    edits: Sequence[Edit] | ExampleEdits = (),
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> Evaluation:
    """ASR, false triggers, clean accuracy and damage of `subject` on `examples` (clean rows) under `edits`."""
    return Evaluator(subject, examples, spec, max_new_tokens=max_new_tokens, batch_size=batch_size).run(edits)
