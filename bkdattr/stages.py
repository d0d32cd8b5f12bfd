"""The stages of a run after `poison`, one method each: evaluate, probe, attribute, ablate, steer.

Each takes the run's data and model, calls the methods, shows progress, keeps finished pieces in the run's ledger and
writes one result file. A finished result with the same inputs and options is kept unless `force`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bkdattr import joint, restoration, shards, steering
from bkdattr.ablation import CURVE, MODES, ablate, curve_ks, random_heads
from bkdattr.architectures import HeadIndex
from bkdattr.attribution import (
    EFFECTS,
    SITES,
    Recipients,
    estimate_effects,
    rank_stability,
    site_effects,
    sites_of,
    summarise_effects,
)  # fmt: skip
from bkdattr.edits import Site
from bkdattr.engine import prefix_cache
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluation, Judged
from bkdattr.examples import Example
from bkdattr.misses import near_misses
from bkdattr.poisoning import BackdoorSpec
from bkdattr.probes import KINDS, ProbeSplit, States, probe_all
from bkdattr.run import Ledger
from bkdattr.screening import FRACTION, agreement, check_method, screen
from bkdattr.study import OpenRun
from bkdattr.traces import Traces, trace_prompts
from bkdattr.triggers import Trigger
from bkdattr.vector import default_k

PROBE_PROMPTS = 256


@dataclass(eq=False)
class Study(OpenRun):
    """The stages of an opened run."""

    _whole_passes: list[str] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------ evaluate
    def evaluate(self, *, force: bool = False) -> dict[str, Any]:
        """Poisoned model and base side by side on the test split, and the poisoned model under the fake trigger."""
        with self.stage("evaluate", {}, force) as result:
            if result is not None:
                evaluator = self.evaluator("test")
                near = near_misses(self.spec.trigger, self._words(), self.run.config["seed"])
                with tqdm(total=3 + len(near), desc="evaluate") as bar:
                    poisoned = evaluator.run()
                    bar.update()
                    fake = self._with_trigger(self.spec.fake_trigger)
                    bar.update()
                    missed = {
                        name: {"texts": list(trigger.texts), "asr": self._with_trigger(trigger)} for name, trigger in near.items()
                    }
                    backdoors = map(BackdoorSpec.from_json, self.run.config["backdoors"][1:])
                    others = {other.name: self._with_trigger(other.trigger) for other in backdoors}
                    bar.update(len(near))
                    with self.subject.adapter_off():  # what these prompts give without any backdoor
                        twin = evaluator.run()
                        base = twin.to_json() | {"asr_fake_trigger": self._with_trigger(self.spec.fake_trigger)}
                        for name, trigger in near.items():
                            missed[name]["base_asr"] = self._with_trigger(trigger)
                    bar.update()
                result |= poisoned.to_json() | {
                    "asr_fake_trigger": fake,
                    "near_misses": missed,
                    "other_backdoors": others,
                    "base": base,
                    "samples": _samples(poisoned, twin),
                }
        return self.run.result("evaluate", self.inputs)

    def _with_trigger(self, trigger: Trigger | None) -> dict[str, Any] | None:
        """ASR on the test split with another trigger in the place of the true one; None where there is none. Prompts that it makes too
        long for the context are not in its denominator."""
        if trigger is None:
            return None
        chat, room = self.subject.chat, self.subject.chat.context - self.run.config["max_new_tokens"]
        rows = [self.spec.triggered(e, trigger) for e in self.splits["test"]]
        rows = [e for e in rows if len(chat.prompt_ids(e.messages)) <= room]
        if not any(e.eligible for e in rows):
            return None
        rate = replace(self.evaluator("test"), triggered=rows, memory={}).run(parts=["triggered"]).asr
        return rate.to_json() if rate else None

    def _words(self) -> list[str]:
        """Words of the clean prompts: what near misses draw from."""
        return [w for e in self.splits["test"] for w in e.prompt.split()]

    # ------------------------------------------------------------------------------------------ probe
    def probe(self, *, kinds: Sequence[str] = KINDS, force: bool = False) -> dict[str, Any]:
        """Probes per layer with controls, on held-out eligible prompts (none of them trained on)."""
        unknown = [k for k in kinds if k not in KINDS]
        if unknown:
            raise BkdattrError(f"probe kind {unknown[0]!r}: expected one of {', '.join(KINDS)}")
        with self.stage("probe", {"kinds": list(kinds)}, force) as result:
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
        return trace_prompts(
            self.subject, examples, batch_size=self.run.config["batch_size"], read=("resid_post",)
        ).resid_post.numpy()

    # ------------------------------------------------------------------------------------------ attribute
    def attribute(self, *, method: str = "exact", fraction: float = FRACTION, force: bool = False) -> dict[str, Any]:
        """BAHA on the attribution split, its prompts shared out where several processes were launched: sufficiency and necessity of heads, attention blocks and MLP blocks; finished layers
        are kept, an interrupted run goes on from them. `method` is that of `baha`; "hybrid" screens heads alone."""
        check_method(method, fraction)
        options: dict[str, Any] = {} if method == "exact" else {"method": method, "fraction": fraction}
        with self.stage("attribute", options, force) as result:
            if result is not None:
                clean, triggered = self.eligible("attribution")
                given = {"sufficiency": (self.donors, clean), "necessity": (self.clean_donors, triggered)}
                ledger = self.run.ledger("attribute", {**self.inputs, **options}, read_only=shards.rank() > 0)
                ledger.rows = shards.from_first(ledger.rows)
                self._whole_passes = []
                total = len(EFFECTS) * sum(len(sites_of(self.subject.geometry, kind)) for kind in SITES)
                if len(ledger.rows):
                    self.say(f"attribute: {len(ledger.rows)} of {total} sites were finished before")
                with tqdm(desc="attribute", total=total, initial=len(ledger.rows), disable=shards.rank() > 0) as bar:
                    found = [
                        self._attributed(kind, effect, *given[effect], method, fraction, ledger, bar)
                        for kind in SITES
                        for effect in EFFECTS
                    ]
                result["attributions"] = found
                if self._whole_passes:
                    result["not_resumed"] = self._whole_passes[0]
        return self.run.result("attribute", self.inputs)

    def _attributed(
        self, kind: str, effect: str, donors: Traces, taken: list[Example], method: str, fraction: float, ledger: Ledger, bar: Any
    ) -> dict[str, Any]:
        subject, size = self.subject, self.run.config["batch_size"]
        method = "exact" if method == "hybrid" and kind != "head" else method
        sites, n, mine = sites_of(subject.geometry, kind), len(taken), shards.mine(len(taken))
        recipients = Recipients.of(subject, taken).part(mine)
        guess, best, sample, patched = dict[Site, torch.Tensor](), list[Site](), list[Site](), sites
        prefix = prefix_cache(subject)
        if method != "exact":
            guess = estimate_effects(subject, recipients, donors, kind, effect=effect, batch_size=size, prefix=prefix)
            whole = shards.gathered(torch.stack(list(guess.values())), n)
            guess = dict(zip(guess, whole, strict=True))
            best, sample = screen(guess, fraction, self.run.config["seed"]) if method == "hybrid" else ([], [])
            patched = [*best, *sample]
        left = {x.layer for x in patched if f"{effect} {x}" not in ledger}  # whole layers, so that batches are always the same
        todo = [x for x in patched if x.layer in left]
        if todo:
            for x, cie in site_effects(
                subject,
                recipients,
                donors,
                todo,
                effect=effect,
                batch_size=size,
                prefix=prefix,
                fallback=self._whole_passes.append,
            ):
                bar.update(f"{effect} {x}" not in ledger)
                ledger.put(f"{effect} {x}", shards.gathered(cie, n).tolist())
        exact = {x: torch.tensor(ledger[f"{effect} {x}"]) for x in patched}
        bar.update(len(sites) - len(patched))
        summary = summarise_effects(
            guess | exact, subject.geometry, len(donors.ids), subject.fingerprint, effect=effect, site=kind, method=method,
            verified=best if method == "hybrid" else None,
        ).to_json()  # fmt: skip
        if kind == "head":
            k = default_k(len(sites))
            summary["stability"] = rank_stability({x: exact[x] for x in best} if best else guess | exact, min(k, len(best) or k))
            if method == "hybrid":
                summary["agreement"] = agreement(guess, exact, best, sample, k)
        return summary

    # ------------------------------------------------------------------------------------------ ablate
    def ablate(self, *, ks: Sequence[int] = CURVE, draws: int = steering.DRAWS, force: bool = False) -> dict[str, Any]:
        """ASR, clean accuracy, false triggers and damage against k, attributed heads in three modes and random heads."""
        if draws < 1 or any(k < 0 for k in ks):
            raise BkdattrError(f"ablation curve: got ks={list(ks)} and {draws} draws, expected k >= 0 and at least 1 draw")
        top, geometry, seed = self.attribution, self.subject.geometry, self.run.config["seed"]
        curve = curve_ks(geometry, ks)
        options = {"ks": curve, "draws": draws, "top": [str(h) for h in top.top(max(curve))]}
        with self.stage("ablate", options, force) as result:
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

    # ------------------------------------------------------------------------------------------ select
    def select(
        self,
        *,
        ks: Sequence[int] | None = None,
        settings: Sequence[str] = joint.SETTINGS,
        sparsity: Sequence[float] = joint.SPARSITY,
        steps: int = joint.STEPS,
        draws: int = 3,
        force: bool = False,
    ) -> dict[str, Any]:
        """Heads chosen jointly beside ACIE's and random ones, at equal k (`bkdattr.joint`)."""
        return joint.select(self, ks=ks, settings=settings, sparsity=sparsity, steps=steps, draws=draws, force=force)

    # ------------------------------------------------------------------------------------------ restore
    def restore(self, *, force: bool = False) -> dict[str, Any]:
        """The adapter undone in parts of the model (`bkdattr.restoration`)."""
        return restoration.restore(self, force=force)

    # ------------------------------------------------------------------------------------------ steer
    def steer(
        self,
        *,
        k: int | None = None,
        strengths: Sequence[float] = steering.STRENGTHS,
        draws: int = steering.DRAWS,
        kinds: Sequence[str] = ("raw",),
        scopes: Sequence[str] = ("last_prompt",),
        force: bool = False,
    ) -> dict[str, Any]:
        """Backdoor Vectors, their layers and strengths chosen on the selection split, both signs on the test split
        (`bkdattr.steering`)."""
        return steering.steer(self, k=k, strengths=strengths, draws=draws, kinds=kinds, scopes=scopes, force=force)


def _sample(judged: Judged) -> dict[str, Any]:
    return judged.to_json()


def _samples(poisoned: Evaluation, base: Evaluation, n: int = 5) -> dict[str, Any]:
    return {
        "triggered": [
            _sample(j) | {"base_answer": b.answer.text} for j, b in zip(poisoned.triggered[:n], base.triggered, strict=False)
        ],
        "clean": [_sample(j) | {"base_answer": b.answer.text} for j, b in zip(poisoned.clean[:n], base.clean, strict=False)],
    }
