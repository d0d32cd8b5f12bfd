"""One function to judge: attack success, false triggers, clean accuracy and damage together, under any edits.

Baseline, ablation and steering differ only in `edits`. The definitions of hit, correct and damage stand in `targets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bkdattr.edits import Edit, edits_key
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import Completion, PrefixCache, batches, edits_of, generate, score_batch
from bkdattr.metrics import Rate, paired_difference
from bkdattr.model import Subject
from bkdattr.poisoning import BackdoorSpec
from bkdattr.targets import BEHAVIOURS, Answer, Judge, behaviour, correct, damage_of

ExampleEdits = Callable[[Sequence[Example]], Sequence[Edit]]
"""Edits that differ between examples: called with the examples of a batch."""

PARTS = ("triggered", "clean")


@dataclass(frozen=True)
class Judged:
    """One completion with its verdicts. `correct` on a triggered prompt: answered as its clean twin should be."""

    example: Example
    answer: Answer
    hit: bool
    keyword_hit: bool
    correct: bool | None
    behaviour: str

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.example.id, "prompt": self.example.prompt, "answer": self.answer.text, "hit": self.hit,
            "correct": self.correct, "broken": self.answer.damage, "behaviour": self.behaviour,
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The answers on triggered (eligible) and on clean prompts, and every rate that follows from them.

    A rate is None where nothing could be judged: the part was not run, or no row has a checkable answer (then
    `clean_agreement`, the share of clean prompts answered exactly as by the adapter-off twin, stands in for clean accuracy, and
    for `recovered` the share of triggered prompts answered exactly as the same model, un-edited, answers their clean twins). `clean_logprob` is in nats per token of the
    reference answers, `clean_kl` in nats per token: KL(un-edited model || edited model) at the same positions.
    """

    triggered: tuple[Judged, ...]
    clean: tuple[Judged, ...]
    clean_agreement: Rate | None = None
    triggered_agreement: Rate | None = None
    clean_logprob: float | None = None
    clean_kl: float | None = None

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
        """Empty, repetitive, unfinished or fragmentary answers, over all answers."""
        return _rate([j.answer.damage is not None for j in (*self.triggered, *self.clean)])

    @property
    def broken_triggered(self) -> Rate | None:
        """The same over the triggered prompts alone: damage that would pass for a suppressed backdoor."""
        return _rate([j.answer.damage is not None for j in self.triggered])

    @property
    def recovered(self) -> Rate | None:
        """Triggered prompts (eligible) answered as their clean twins should be: what a repair must give back."""
        return _rate([j.correct for j in self.triggered if j.correct is not None]) or self.triggered_agreement

    @property
    def clean_perplexity(self) -> float | None:
        """exp of minus the mean log p per token of the clean reference answers."""
        return None if self.clean_logprob is None else math.exp(min(700.0, -self.clean_logprob))

    def behaviours(self, part: str = "triggered") -> dict[str, int]:
        """How many answers of a part do what (`bkdattr.targets.BEHAVIOURS`)."""
        judged = self.triggered if part == "triggered" else self.clean
        return {b: sum(j.behaviour == b for j in judged) for b in BEHAVIOURS}

    def against(self, before: Evaluation) -> dict[str, Any]:
        """Paired differences to another evaluation of the same prompts: ASR, and answers on clean prompts that stay as they were."""
        out: dict[str, Any] = {"asr_change": None, "clean_accuracy_change": None, "clean_unchanged": None}
        if self.triggered and before.triggered:
            hits = [[j.hit for j in e.triggered] for e in (self, before)]
            out["asr_change"] = paired_difference(*hits) | {"before": sum(hits[1]) / len(hits[1])}
        if self.clean and before.clean:
            same = Rate.of(a.answer.text == b.answer.text for a, b in zip(self.clean, before.clean, strict=True))
            out["clean_unchanged"] = same.to_json()
            both = [(a.correct, b.correct) for a, b in zip(self.clean, before.clean, strict=True) if a.correct is not None]
            if both:
                out["clean_accuracy_change"] = paired_difference([bool(a) for a, _ in both], [bool(b) for _, b in both])
        return out

    def to_json(self) -> dict[str, Any]:
        names = ("asr", "asr_keyword", "recovered", "clean_accuracy", "false_trigger", "broken", "broken_triggered", "clean_agreement")  # fmt: skip
        rates = {n: getattr(self, n) for n in names}
        return {n: r.to_json() if r else None for n, r in rates.items()} | {
            "clean_logprob": self.clean_logprob, "clean_perplexity": self.clean_perplexity, "clean_kl": self.clean_kl,
            "behaviours": self.behaviours() if self.triggered else None,
        }  # fmt: skip


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
    judge: Judge | None = None
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
        self._clean_twin = {e.id: e for e in self.clean_rows}
        self._spans: list[list[int]] | None = None
        self._prompts: dict[str, list[list[int]]] = {}
        self._could_end: dict[str, list[bool]] = {}
        for part, examples in zip(PARTS, (self.triggered_rows, self.clean_rows), strict=True):
            self._prompts[part] = [chat.prompt_ids(e.messages) for e in examples]
            for e, ids in zip(examples, self._prompts[part], strict=True):
                chat.check_length(ids, self.max_new_tokens, f"{part} prompt {e.id!r}")
            self._could_end[part] = [
                max(len(chat.response_ids(e.messages, r)) for r in self._references(e)) <= self.max_new_tokens for e in examples
            ]
        self._prefix: dict[str, PrefixCache] = {}

    def run(self, edits: Sequence[Edit] | ExampleEdits = (), parts: Sequence[str] = PARTS, *, utility: bool = True) -> Evaluation:
        """Judge the subject as it is now (adapter on or off) under `edits`; `utility` False leaves clean log p and KL out."""
        judged = {part: self._part(part, edits) if part in parts else () for part in PARTS}
        agreement = {part: self._agreement(part, judged[part]) for part in PARTS}
        logprob = kl = None
        if judged["clean"] and utility:
            key = None if callable(edits) else (self.subject.fingerprint, "utility", edits_key(edits))
            found = self.memory.get(key) or self._utility(edits)
            if key is not None:
                self.memory[key] = found
            logprob, kl = found
        return Evaluation(judged["triggered"], judged["clean"], agreement["clean"], agreement["triggered"], logprob, kl)

    def forget(self) -> None:
        """Free the shared prefix of the adapter state as it is now."""
        self._prefix.pop(self.subject.fingerprint, None)

    def _references(self, example: Example) -> list[str]:
        """Every answer that would be in order: the row's own, its clean twin's and the backdoor's."""
        twin = self._clean_twin.get(example.id, example)
        return [r for r in dict.fromkeys((example.response, twin.response, twin.backdoor_response)) if r]

    def _rows(self, part: str) -> list[Example]:
        return self.triggered_rows if part == "triggered" else self.clean_rows

    def _for_rows(self, part: str, edits: Sequence[Edit] | ExampleEdits) -> Any:
        """Edits by row numbers. At the trigger's tokens there is nothing to edit in a clean prompt."""
        examples = self._rows(part)

        def reaching(chosen: Sequence[Edit]) -> Sequence[Edit]:
            return [e for e in chosen if part == "triggered" or e.scope != "trigger_span"]

        return (lambda rows: reaching(edits([examples[i] for i in rows]))) if callable(edits) else reaching(edits)

    @property
    def trigger_tokens(self) -> list[list[int]]:
        """Token indices of the trigger in each triggered prompt."""
        if self._spans is None:
            self._spans = [self.subject.chat.span_tokens(e.messages, e.spans) for e in self.triggered_rows]
        return self._spans

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
            trigger_tokens=self._tokens_if_needed(part, edits),
        )  # fmt: skip

    def _tokens_if_needed(self, part: str, edits: Sequence[Edit] | ExampleEdits) -> list[list[int]] | None:
        chosen = edits(self._rows(part)[:1]) if callable(edits) else edits
        return self.trigger_tokens if part == "triggered" and any(e.scope == "trigger_span" for e in chosen) else None

    def _judge(self, example: Example, completion: Completion, could_end: bool, part: str) -> Judged:
        text = self.subject.chat.decode(completion.ids)
        target, twin = self.spec.target, self._clean_twin.get(example.id, example)
        damage = damage_of(text, ended=completion.ended, could_end=could_end, references=self._references(example))
        answer = Answer(text, damage, completion.ended)
        if self.judge is not None:
            found = self.judge(twin, answer)
            if found not in BEHAVIOURS:
                raise BkdattrError(f"the judge returned {found!r} for {example.id!r}, expected one of {', '.join(BEHAVIOURS)}")
            return Judged(example, answer, found == "target", found == "target", found == "correct", found)
        hits = (target.hit(example, answer), target.keyword_hit(example, answer)) if example.eligible else (False, False)
        done = behaviour(twin, answer, target, self.labels)
        right = correct(twin, answer, self.labels)
        if part == "triggered" and right is not None:
            right = done == "correct"  # a target that happens to pass the row's check is no recovery
        return Judged(example, answer, *hits, right, done)

    def _agreement(self, part: str, judged: Sequence[Judged]) -> Rate | None:
        """Where no answer can be checked: clean answers that equal the adapter-off twin's, triggered ones that equal this
        model's own, un-edited, on the clean twin."""
        if not judged or any(j.correct is not None for j in judged):
            return None
        if part == "triggered":
            clean = {j.example.id: j.answer.text for j in self._part("clean", ())}
            known = [j for j in judged if j.example.id in clean]
            return Rate.of(j.answer.text == clean[j.example.id] for j in known) if known else None
        if not self.subject.has_adapter:
            return None
        if self.subject.adapter_on:
            with self.subject.adapter_off():
                twin = self._part(part, ())
        else:
            twin = self._part(part, ())
        return Rate.of(a.answer.text == b.answer.text for a, b in zip(judged, twin, strict=True))

    @torch.no_grad()
    def _utility(self, edits: Sequence[Edit] | ExampleEdits) -> tuple[float | None, float | None]:
        """(log p per token of the clean reference answers, KL from the un-edited model per token), teacher-forced."""
        chat, prompts = self.subject.chat, self._prompts["clean"]
        responses = [chat.response_ids(e.messages, e.response) for e in self.clean_rows]
        fits = [i for i, r in enumerate(responses) if len(prompts[i]) + len(r) <= chat.context]
        chosen = self._for_rows("clean", edits)
        prefix = self._prefix.setdefault(self.subject.fingerprint, PrefixCache()) if self.share_prefix else None
        total = divergence = n = 0.0
        for group in batches([prompts[i] for i in fits], self.batch_size):
            rows = [fits[i] for i in group]
            ids = [prompts[i] for i in rows], [responses[i] for i in rows]
            now = edits_of(chosen, rows)
            scored = score_batch(self.subject, *ids, now, prefix=prefix)
            total, n = total + float(scored.total.sum()), n + int(scored.mask.sum())
            if now:
                plain = score_batch(self.subject, *ids, prefix=prefix)
                kl = (plain.logp.exp() * (plain.logp - scored.logp)).sum(-1)
                divergence += float((kl * scored.mask).sum())
        return (total / n, max(0.0, divergence / n)) if n else (None, None)


def evaluate(
    subject: Subject,
    examples: Sequence[Example],
    spec: BackdoorSpec,
    edits: Sequence[Edit] | ExampleEdits = (),
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    judge: Judge | None = None,
) -> Evaluation:
    """ASR, recovered answers, false triggers, clean accuracy and damage of `subject` on `examples` (clean rows) under `edits`.

    `judge` replaces the rules by a callable of your own (`bkdattr.targets.Judge`)."""
    wrong = next((e for e in examples if not isinstance(e, Example)), None)
    if wrong is not None:
        raise BkdattrError(f"examples: got {type(wrong).__name__}, expected Example rows; make them with read_examples(...)")
    evaluator = Evaluator(subject, examples, spec, max_new_tokens=max_new_tokens, batch_size=batch_size, judge=judge)
    return evaluator.run(edits)
