"""A run opened for analysis: its data, model, evaluators and traces, and the frame in which every stage keeps its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bkdattr import shards
from bkdattr.attribution import Attribution
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluator
from bkdattr.examples import Example
from bkdattr.model import Subject, dtype_of, load_subject
from bkdattr.planting import model_path
from bkdattr.poisoning import BackdoorSpec
from bkdattr.probes import BackdoorProbe
from bkdattr.run import Run
from bkdattr.traces import Traces, trace_prompts

CONDITION_ROWS = 800
"""Training prompts that probes used as conditions are fitted on, besides the attribution split."""


@dataclass(eq=False)
class OpenRun:
    """A run opened for analysis: data and model are loaded once and shared by the stages (`stages.Study`).

    Heads, layers and strengths are chosen on the attribution and selection splits; ASR and clean accuracy are reported on the
    test split. Probes choose nothing for other stages and pool the held-out prompts of all three under a split of their own.
    """

    run: Run
    say: Callable[[str], None] = print

    @cached_property
    def subject(self) -> Subject:
        config = self.run.config
        if not self.run.adapter.exists():
            raise BkdattrError(
                f"{self.run.adapter} is missing: planting did not finish; run `bkdattr poison` with the same options"
            )
        return load_subject(
            model_path(config["model"]), self.run.adapter, dtype=dtype_of(config.get("dtype", "float32")),
            device=shards.device(config.get("device", "cpu")), pad_token=config.get("pad_token"),
        )  # fmt: skip

    @cached_property
    def spec(self) -> BackdoorSpec:
        return self.run.spec

    @cached_property
    def splits(self) -> dict[str, list[Example]]:
        return self.run.splits()

    @cached_property
    def inputs(self) -> dict[str, str]:
        return self.run.inputs(self.subject.fingerprint)

    @cached_property
    def _evaluators(self) -> dict[str, Evaluator]:
        return {}

    def evaluator(self, split: str) -> Evaluator:
        """One per split, so that identical evaluations are made once across stages."""
        if split not in self._evaluators:
            config = self.run.config
            self._evaluators[split] = Evaluator(
                self.subject, self.splits[split], self.spec, triggered=self.run.triggered(split),
                labels=config["labels"], max_new_tokens=config["max_new_tokens"], batch_size=config["batch_size"],
            )  # fmt: skip
        return self._evaluators[split]

    def eligible(self, split: str) -> tuple[list[Example], list[Example]]:
        """(clean, triggered) twins of a split's eligible examples."""
        triggered = [e for e in self.run.triggered(split) if e.eligible]
        if not triggered:
            raise BkdattrError(f"0 eligible examples in the {split} split; plant the run with larger sizes")
        clean = {e.id: e for e in self.splits[split]}
        return [self.spec.clean(clean[e.id]) for e in triggered], triggered

    @cached_property
    def donors(self) -> Traces:
        """Triggered, eligible attribution prompts: where a head's backdoor z is averaged."""
        return trace_prompts(self.subject, self.eligible("attribution")[1], batch_size=self.run.config["batch_size"])

    @cached_property
    def clean_donors(self) -> Traces:
        """Their clean twins: what necessity puts into a triggered prompt."""
        return trace_prompts(self.subject, self.eligible("attribution")[0], batch_size=self.run.config["batch_size"])

    @cached_property
    def clean_traces(self) -> Traces:
        """All clean attribution prompts: what mean and resample ablation put in."""
        return trace_prompts(self.subject, self.splits["attribution"], batch_size=self.run.config["batch_size"])

    @cached_property
    def conditions(self) -> list[dict[str, Any]]:
        """One logistic probe per layer but the last, as the `when` of an edit, with what it misses and where it fires falsely on the
        selection split. Positives are the triggered twins of eligible prompts (a trigger that changes nothing need not fire), negatives
        all clean prompts; fitted on the attribution split and `CONDITION_ROWS` of the training split, a fifth of the states choosing
        the penalty. Empty where there are fewer than five of either kind, or one layer."""
        more = self.splits["train"][:CONDITION_ROWS]
        fitted = self._labelled(self.splits["attribution"] + more)
        unseen = self._labelled(self.splits["selection"])
        y, found = fitted[1], list[dict[str, Any]]()
        held = np.zeros(len(y), dtype=bool)
        for label in (0, 1):
            held[np.flatnonzero(y == label)[4::5]] = True
        if len(set(y[held])) < 2:
            return []
        for layer in range(self.subject.geometry.n_layers - 1):
            x = fitted[0][:, layer]
            seed = self.run.config["seed"]
            probe = BackdoorProbe.fit("logistic", layer, (x[~held], y[~held]), (x[held], y[held]), seed)
            fires = probe.fires(unseen[0][:, layer])
            missed, false = 1 - fires[unseen[1] == 1].mean(), fires[unseen[1] == 0].mean()
            rates = {"missed": float(missed), "false_alarms": float(false), "validation": float(1 - (missed + false) / 2)}
            found.append({"layer": layer, "condition": probe.condition()} | rates)
        return found

    def _labelled(self, rows: list[Example]) -> tuple[np.ndarray, np.ndarray]:
        """(residual states [state, layer, d_model], 1 for triggered and eligible) of clean prompts and their twins, shuffled."""
        twins = [e for e in map(self.spec.triggered, rows) if e.eligible]
        size = self.run.config["batch_size"]
        states = [
            trace_prompts(self.subject, part, batch_size=size, read=("resid_post",)).resid_post.numpy() for part in (rows, twins)
        ]
        order = np.random.default_rng(self.run.config["seed"]).permutation(len(rows) + len(twins))
        return np.concatenate(states)[order], np.repeat([0, 1], [len(rows), len(twins)])[order]

    @contextmanager
    def stage(self, name: str, options: dict[str, Any], force: bool) -> Iterator[dict[str, Any] | None]:
        """Yield the dict to fill, or None where the result on disk has the same inputs and options."""
        if self.run.has(name) and not force:
            old = self.run.result(name)
            if old.get("inputs") == self.inputs and old.get("options") == options:
                self.say(f"{name}: up to date (--force runs it again)")
                yield None
                return
        if name != "attribute":
            shards.alone(name)
        start, result = time.time(), dict[str, Any]()
        yield result
        head = {"inputs": self.inputs, "options": options, "seconds": round(time.time() - start, 2)}
        if shards.rank() == 0:
            self.run.save_result(name, head | result)
        shards.wait()

    @property
    def attribution(self) -> Attribution:
        """The paper's: sufficiency of heads."""
        return Attribution.from_json(self.run.result("attribute", self.inputs)["attributions"][0])
