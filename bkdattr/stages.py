"""The stages of a run after `poison`, one method each: evaluate, probe, attribute, ablate, steer.

Each takes the run's data and model, calls the methods, shows progress, keeps finished pieces in the run's ledger and
writes one result file. A finished result with the same inputs and options is kept unless `force`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bkdattr.ablation import CURVE, MODES, ablate, curve_ks, random_heads
from bkdattr.architectures import HeadIndex
from bkdattr.attribution import EFFECTS, SITES, Attribution, Recipients, site_effects, sites_of, summarise_effects
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluation, Evaluator, Judged
from bkdattr.examples import Example
from bkdattr.metrics import Rate
from bkdattr.model import Subject, load_subject
from bkdattr.planting import model_path
from bkdattr.poisoning import BackdoorSpec
from bkdattr.probes import KINDS, ProbeSplit, States, probe_all
from bkdattr.run import Run
from bkdattr.traces import Traces, trace_prompts
from bkdattr.triggers import Trigger, near_misses
from bkdattr.vector import BackdoorVector, default_k

PROBE_PROMPTS = 256
STRENGTHS = (1.0, 2.0, 4.0)
DRAWS = 5


@dataclass(eq=False)
class Study:
    """A run opened for analysis: data and model are loaded once and shared by the stages.

    Heads, layers and strengths are chosen on the attribution and selection splits; ASR and clean accuracy are reported on the
    test split. Probes choose nothing for other stages and pool the held-out prompts of all three under a split of their own.
    """

    run: Run
    say: Callable[[str], None] = print
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def subject(self) -> Subject:
        config = self.run.config
        if not self.run.adapter.exists():
            raise BkdattrError(
                f"{self.run.adapter} is missing: planting did not finish; run `bkdattr poison` with the same options"
            )
        return load_subject(
            model_path(config["model"]), self.run.adapter, dtype=getattr(torch, config.get("dtype", "float32")),
            device=config.get("device", "cpu"), pad_token=config.get("pad_token"),
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

    @contextmanager
    def _stage(self, name: str, options: dict[str, Any], force: bool) -> Iterator[dict[str, Any] | None]:
        """Yield the dict to fill, or None where the result on disk has the same inputs and options."""
        if self.run.has(name) and not force:
            old = self.run.result(name)
            if old.get("inputs") == self.inputs and old.get("options") == options:
                self.say(f"{name}: up to date (--force runs it again)")
                yield None
                return
        start, result = time.time(), dict[str, Any]()
        yield result
        head = {"inputs": self.inputs, "options": options, "seconds": round(time.time() - start, 2)}
        self.run.save_result(name, head | result)

    # ------------------------------------------------------------------------------------------ evaluate
    def evaluate(self, *, force: bool = False) -> dict[str, Any]:
        """Poisoned model and base side by side on the test split, and the poisoned model under the fake trigger."""
        with self._stage("evaluate", {}, force) as result:
            if result is not None:
                evaluator = self.evaluator("test")
                near = near_misses(self.spec.trigger, self._words(), self.run.config["seed"])
                with tqdm(total=3 + len(near), desc="evaluate") as bar:
                    poisoned = evaluator.run()
                    bar.update()
                    with self.subject.adapter_off():
                        base = evaluator.run()
                    bar.update()
                    fake = self._with_trigger(self.spec.fake_trigger)
                    bar.update()
                    missed = {}
                    for name, trigger in near.items():
                        rate = self._with_trigger(trigger)
                        missed[name] = {"texts": list(trigger.texts), "asr": rate.to_json() if rate else None}
                        bar.update()
                result |= poisoned.to_json() | {
                    "asr_fake_trigger": fake.to_json() if fake else None,
                    "near_misses": missed,
                    "base": base.to_json(),
                    "samples": _samples(poisoned, base),
                }
        return self.run.result("evaluate", self.inputs)

    def _with_trigger(self, trigger: Trigger | None) -> Rate | None:
        """ASR on the test split with another trigger in the place of the true one; None where there is none."""
        if trigger is None:
            return None
        rows = [self.spec.triggered(e, trigger) for e in self.splits["test"]]
        return replace(self.evaluator("test"), triggered=rows, memory={}).run(parts=["triggered"]).asr

    def _words(self) -> list[str]:
        """Words of the clean prompts: what near misses draw from."""
        return [w for e in self.splits["test"] for w in e.prompt.split()]

    # ------------------------------------------------------------------------------------------ probe
    def probe(self, *, kinds: Sequence[str] = KINDS, force: bool = False) -> dict[str, Any]:
        """Probes per layer with controls, on held-out eligible prompts (none of them trained on)."""
        unknown = [k for k in kinds if k not in KINDS]
        if unknown:
            raise BkdattrError(f"probe kind {unknown[0]!r}: expected one of {', '.join(KINDS)}")
        with self._stage("probe", {"kinds": list(kinds)}, force) as result:
            if result is not None:
                pairs = [self.eligible(s) for s in ("attribution", "selection", "test")]
                clean = [e for c, _ in pairs for e in c][:PROBE_PROMPTS]
                triggered = [e for _, t in pairs for e in t][:PROBE_PROMPTS]
                ProbeSplit.of(len(clean), self.run.config["seed"])  # too few prompts: say so before the captures
                other = self.spec.fake_trigger
                if other is None:
                    raise BkdattrError(
                        "the probe's fake-trigger control needs a trigger with words of its own; this one has none"
                    )
                fake = [self.spec.triggered(e, other) for e in clean]
                poisoned = States(self._resid(clean), self._resid(triggered))
                faked = States(poisoned.clean, self._resid(fake))
                with self.subject.adapter_off():
                    twin = States(self._resid(clean), self._resid(triggered))
                found = probe_all(
                    poisoned, faked, twin, kinds=kinds, seed=self.run.config["seed"], progress=partial(tqdm, desc="probe")
                )
                result["layers"] = [vars(p) for p in found.layers]
                result["cross_layer"] = found.cross_layer
                result["best"] = vars(found.best())
                result["n_prompts"] = found.n_prompts
                result["triggers"] = {"trained": list(self.spec.trigger.texts), "fake": list(other.texts)}
        return self.run.result("probe", self.inputs)

    def _resid(self, examples: list[Example]) -> np.ndarray:
        return trace_prompts(self.subject, examples, batch_size=self.run.config["batch_size"]).resid_post.numpy()

    # ------------------------------------------------------------------------------------------ attribute
    def attribute(self, *, force: bool = False) -> dict[str, Any]:
        """BAHA on the attribution split, sufficiency and necessity of heads, attention blocks and MLP blocks; finished sites
        are kept, an interrupted run goes on from them."""
        with self._stage("attribute", {}, force) as result:
            if result is not None:
                clean, triggered = self.eligible("attribution")
                subject, ledger = self.subject, self.run.ledger("attribute", self.inputs)
                kinds = [(effect, kind) for kind in SITES for effect in EFFECTS]
                total = len(EFFECTS) * sum(len(sites_of(subject.geometry, kind)) for kind in SITES)
                found = []
                if len(ledger.rows):
                    self.say(f"attribute: {len(ledger.rows)} of {total} sites were finished before")
                with tqdm(desc="attribute", total=total, initial=len(ledger.rows)) as bar:
                    for effect, kind in kinds:
                        sites = sites_of(subject.geometry, kind)
                        todo = [x for x in sites if f"{effect} {x}" not in ledger]
                        if todo:
                            recipients = Recipients.of(subject, clean if effect == "sufficiency" else triggered)
                            donors = self.donors if effect == "sufficiency" else self.clean_donors
                            batch_size = self.run.config["batch_size"]
                            for x, cie in site_effects(subject, recipients, donors, todo, effect=effect, batch_size=batch_size):
                                ledger.put(f"{effect} {x}", cie.tolist())
                                bar.update()
                        effects = {x: torch.tensor(ledger[f"{effect} {x}"]) for x in sites}
                        found.append(
                            summarise_effects(
                                effects, subject.geometry, len(triggered), subject.fingerprint, effect=effect, site=kind
                            ).to_json()
                        )
                result["attributions"] = found
        return self.run.result("attribute", self.inputs)

    @property
    def attribution(self) -> Attribution:
        """The paper's: sufficiency of heads."""
        return Attribution.from_json(self.run.result("attribute", self.inputs)["attributions"][0])

    # ------------------------------------------------------------------------------------------ ablate
    def ablate(self, *, ks: Sequence[int] = CURVE, draws: int = DRAWS, force: bool = False) -> dict[str, Any]:
        """ASR, clean accuracy, false triggers and damage against k, attributed heads in three modes and random heads."""
        if draws < 1 or any(k < 0 for k in ks):
            raise BkdattrError(f"ablation curve: got ks={list(ks)} and {draws} draws, expected k >= 0 and at least 1 draw")
        top, geometry, seed = self.attribution, self.subject.geometry, self.run.config["seed"]
        curve = curve_ks(geometry, ks)
        options = {"ks": curve, "draws": draws, "top": [str(h) for h in top.top(max(curve))]}
        with self._stage("ablate", options, force) as result:
            if result is not None:
                points: list[tuple[str, str, int | None, list[HeadIndex]]] = []
                for k in curve:
                    points += [(mode, "attributed", None, top.top(k)) for mode in MODES]
                    points += [("zero", "random", d, random_heads(geometry, k, d, seed)) for d in range(draws)]
                ledger = self.run.ledger("ablate", {**self.inputs, **options})
                rows = []
                for mode, kind, draw, heads in tqdm(points, desc="ablate"):
                    name = f"{mode}-{kind}-{draw}-{len(heads)}"
                    if name not in ledger:
                        clean = self.clean_traces if mode != "zero" else None
                        rates = self.evaluator("test").run(ablate(heads, mode, clean, seed)).to_json()
                        ledger.put(name, rates)
                    head = {"mode": mode, "heads": kind, "draw": draw, "k": len(heads), "head_list": [str(h) for h in heads]}
                    rows.append(head | ledger[name])
                result["rows"] = rows
        return self.run.result("ablate", self.inputs)

    # ------------------------------------------------------------------------------------------ steer
    def steer(
        self, *, k: int | None = None, strengths: Sequence[float] = STRENGTHS, draws: int = DRAWS, force: bool = False
    ) -> dict[str, Any]:
        """Build the Backdoor Vector, choose layer and strength per sign on the selection split, report on the test split,
        with random-head vectors (as they are, and at the vector's norm) and random directions at the same layer and strength."""
        if not strengths or any(s <= 0 or not math.isfinite(s) for s in strengths) or draws < 1:
            raise BkdattrError(
                f"steer: got strengths {list(strengths)} and {draws} draws, expected positive numbers (the sign is the sweep's "
                "own) and at least 1 draw"
            )
        top, subject = self.attribution, self.subject
        k = default_k(len(subject.geometry.heads)) if k is None else k
        options = {"k": k, "strengths": list(strengths), "draws": draws, "top": [str(h) for h in top.top(k)]}
        with self._stage("steer", options, force) as result:
            if result is not None:
                vector = BackdoorVector.from_heads(subject, top.top(k), self.donors.mean_z)
                sweep = self._sweep(vector, strengths, options)
                chosen = {sign: best_point(sweep, sign) for sign in (1, -1)}
                result |= {"kind": vector.kind, "k": k, "heads": [str(h) for h in vector.heads], "norm": vector.norm}
                result |= self._both_signs(vector, chosen)
                seed = self.run.config["seed"]
                controls: dict[str, list[dict[str, Any]]] = {
                    "random_heads": [],
                    "random_heads_matched": [],
                    "random_direction": [],
                }
                for d in tqdm(range(draws), desc="steer controls"):
                    heads = random_heads(subject.geometry, k, d, seed)
                    other = BackdoorVector.from_heads(subject, heads, self.donors.mean_z, "random_heads")
                    twins = [
                        other,
                        other.with_norm(vector.norm, "random_heads_matched"),
                        vector.random_twin(np.random.default_rng([seed, d])),
                    ]
                    for twin in twins:
                        row = {"draw": d, "heads": [str(h) for h in twin.heads], "norm": twin.norm}
                        controls[twin.kind].append(row | self._both_signs(twin, chosen))
                result |= {"controls": controls, "sweep": sweep, "samples": self._steered_samples(vector, chosen)}
                vector.save(self.run.folder / "vector")
        return self.run.result("steer", self.inputs)

    def _sweep(self, vector: BackdoorVector, strengths: Sequence[float], options: dict[str, Any]) -> list[dict[str, Any]]:
        ledger = self.run.ledger("steer", {**self.inputs, **options})
        rows = []
        points = [(l, s, g) for l in range(self.subject.geometry.n_layers) for s in strengths for g in (1, -1)]
        for layer, strength, sign in tqdm(points, desc="steer sweep"):
            name = f"{layer}-{strength}-{sign}"
            if name not in ledger:
                found = self._steered("selection", vector, layer, strength, sign)
                ledger.put(name, {x: y for x, y in found.items() if x != "broken"})
            rows.append({"layer": layer, "strength": strength, "sign": sign, "split": "selection"} | ledger[name])
        return rows

    def _run_vector(self, split: str, vector: BackdoorVector, layer: int, strength: float, sign: int) -> Evaluation:
        parts = ("clean",) if sign > 0 else ("triggered", "clean")
        return self.evaluator(split).run([vector.edit(layer, strength=strength, sign=sign)], parts)

    def _steered(self, split: str, vector: BackdoorVector, layer: int, strength: float, sign: int) -> dict[str, Any]:
        """Sign +1: ASR on clean eligible prompts; -1: on triggered ones. Clean accuracy under the same edit."""
        found = self._run_vector(split, vector, layer, strength, sign)
        rates = found.to_json()
        asr, broken = (rates["false_trigger"], rates["broken"]) if sign > 0 else (rates["asr"], rates["broken_triggered"])
        return {
            "asr": asr, "clean_accuracy": rates["clean_accuracy"], "clean_agreement": rates["clean_agreement"],
            "clean_logprob": rates["clean_logprob"], "broken": broken,
        }  # fmt: skip

    def _both_signs(self, vector: BackdoorVector, chosen: dict[int, dict[str, Any]]) -> dict[str, Any]:
        out = {}
        for sign, name in ((1, "activate"), (-1, "suppress")):
            layer, strength = chosen[sign]["layer"], chosen[sign]["strength"]
            out[name] = {"layer": layer, "strength": strength} | self._steered("test", vector, layer, strength, sign)
        return out

    def _steered_samples(self, vector: BackdoorVector, chosen: dict[int, dict[str, Any]]) -> dict[str, Any]:
        found = {s: self._run_vector("test", vector, chosen[s]["layer"], chosen[s]["strength"], s) for s in (1, -1)}
        eligible = [j for j in found[1].clean if j.example.eligible]
        return {"activate": [_sample(j) for j in eligible[:5]], "suppress": [_sample(j) for j in found[-1].triggered[:5]]}


def best_point(sweep: Sequence[dict[str, Any]], sign: int) -> dict[str, Any]:
    """Highest ASR for +1, lowest for -1; ties to clean accuracy (or agreement), then the lower layer and strength."""

    def rank(row: dict[str, Any]) -> tuple[float, float, int, float]:
        clean = row["clean_accuracy"] or row["clean_agreement"]
        return (-sign * row["asr"]["value"], -clean["value"] if clean else 0.0, row["layer"], row["strength"])

    return min((r for r in sweep if r["sign"] == sign), key=rank)


def _sample(judged: Judged) -> dict[str, Any]:
    return judged.to_json()


def _samples(poisoned: Evaluation, base: Evaluation, n: int = 5) -> dict[str, Any]:
    return {
        "triggered": [
            _sample(j) | {"base_answer": b.answer.text} for j, b in zip(poisoned.triggered[:n], base.triggered, strict=False)
        ],
        "clean": [_sample(j) | {"base_answer": b.answer.text} for j, b in zip(poisoned.clean[:n], base.clean, strict=False)],
    }
