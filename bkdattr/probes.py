"""Backdoor Probe: a binary classifier per layer on the residual stream at the last prompt token, triggered vs clean.

Accuracy alone proves only that the trigger is visible; the controls stand beside it. All fits are scikit-learn's.
Clean and triggered twins of one prompt stay on one side of the split.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from bkdattr.edits import Condition
from bkdattr.errors import BkdattrError

KINDS = ("logistic", "mlp", "svm")
SPLIT = (0.6, 0.2, 0.2)


@dataclass(frozen=True, eq=False)
class States:
    """Twin states of n prompts: `clean` and `triggered`, each [prompt, layer, d_model], rows paired."""

    clean: np.ndarray
    triggered: np.ndarray

    def __post_init__(self) -> None:
        if self.clean.shape != self.triggered.shape:
            raise BkdattrError(f"twin states must pair up: got {self.clean.shape} clean and {self.triggered.shape} triggered")

    def layer(self, layer: int, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(states [2n, d_model], labels [2n]) of the given prompts; label 1 is triggered."""
        x = np.concatenate([self.clean[prompts, layer], self.triggered[prompts, layer]])
        return x, np.repeat([0, 1], len(prompts))


@dataclass(frozen=True, eq=False)
class ProbeSplit:
    """Prompt indices of the three parts."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, n_prompts: int, seed: int) -> ProbeSplit:
        """60/20/20 by prompt, seeded; needs five prompts."""
        if n_prompts < 5:
            raise BkdattrError(f"a probe needs at least 5 prompts for its 60/20/20 split: got {n_prompts}")
        order = np.random.default_rng(seed).permutation(n_prompts)
        a, b = round(SPLIT[0] * n_prompts), round((SPLIT[0] + SPLIT[1]) * n_prompts)
        return cls(order[:a], order[a:b], order[b:])


@dataclass(frozen=True, eq=False)
class BackdoorProbe:
    """A fitted probe of one layer. `score` takes states of any layer."""

    kind: str
    layer: int
    scaler: StandardScaler
    model: Any

    @classmethod
    def fit(
        cls, kind: str, layer: int, train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], seed: int
    ) -> BackdoorProbe:
        """Fit on standardised states: `logistic` (C chosen on the validation part), `svm` (RBF, C=1, gamma "scale", as in
        the paper) or `mlp` (d-100-1, ReLU, Adam 1e-3, batch 16, 100 epochs, best epoch by validation; the paper's dropout
        is replaced by an L2 penalty of 1e-4, which scikit-learn has)."""
        scaler = StandardScaler().fit(train[0])
        x, y = scaler.transform(train[0]), train[1]
        vx, vy = scaler.transform(validation[0]), validation[1]
        model: Any
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            if kind == "logistic":
                fits = [LogisticRegression(C=c, max_iter=500).fit(x, y) for c in (0.01, 0.1, 1.0)]
                model = max(fits, key=lambda m: m.score(vx, vy))
            elif kind == "svm":
                model = SVC(C=1.0, kernel="rbf", gamma="scale").fit(x, y)
            elif kind == "mlp":
                model = _best_epoch(x, y, vx, vy, seed)
            else:
                raise BkdattrError(f"probe kind {kind!r}: expected one of {', '.join(KINDS)}")
        return cls(kind, layer, scaler, model)

    def condition(self) -> Condition:
        """A logistic probe as the `when` of an edit: the scaler folded into its weights."""
        if self.kind != "logistic":
            raise BkdattrError(f"a condition is linear: got a {self.kind} probe, expected a logistic one")
        weight = self.model.coef_[0] / self.scaler.scale_
        bias = float(self.model.intercept_[0] - weight @ self.scaler.mean_)
        return Condition(self.layer, torch.from_numpy(weight).float(), bias)

    def fires(self, states: np.ndarray) -> np.ndarray:
        """Which states [n, d_model] are taken for triggered ones."""
        return np.asarray(self.model.predict(self.scaler.transform(states)) == 1)

    def score(self, data: tuple[np.ndarray, np.ndarray]) -> float:
        """Accuracy on (states, labels)."""
        return float(self.model.score(self.scaler.transform(data[0]), data[1]))


def _best_epoch(x: np.ndarray, y: np.ndarray, vx: np.ndarray, vy: np.ndarray, seed: int) -> MLPClassifier:
    model = MLPClassifier((100,), alpha=1e-4, batch_size=min(16, len(x)), learning_rate_init=1e-3, random_state=seed)
    best, best_score = None, -1.0
    for epoch in range(100):
        model.partial_fit(x, y, classes=[0, 1])
        score = model.score(vx, vy)
        if score > best_score:
            best, best_score, best_at = copy.deepcopy(model), score, epoch  # a copy, not an alias of the live weights
        if best_score == 1.0 and epoch >= best_at + 10:
            break  # nothing can beat it any more
    return best


def shuffled_twins(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels swapped between the twins of half of the prompts, so that they carry nothing about the truth.

    A plain permutation agrees with the truth a little by chance, and where the classes are far apart a probe turns a
    little agreement into an accuracy near 1 (or 0): measured 0.97 on 53 prompts.
    """
    n = len(labels) // 2
    swapped = rng.permutation(n) < n // 2
    return np.where(np.concatenate([swapped, swapped]), 1 - labels, labels)


@dataclass(frozen=True)
class ProbeLayer:
    """Accuracies of one layer and kind on the test part (`validation`: the true probe on the validation part).
    `*_transfer`: the true probe scored there without a refit."""

    layer: int
    kind: str
    accuracy: float
    shuffled: float
    clean_twin: float | None
    fake_trigger: float
    clean_twin_transfer: float | None
    fake_trigger_transfer: float
    validation: float


@dataclass(frozen=True)
class ProbeResult:
    """All layers and kinds, and the cross-layer matrix per kind: [train_layer][test_layer]."""

    layers: tuple[ProbeLayer, ...]
    cross_layer: dict[str, list[list[float]]]
    n_prompts: dict[str, int]

    def best(self, kind: str | None = None) -> ProbeLayer:
        """Highest accuracy on the *validation* part (of one kind, or of all); ties to the lower layer, then kind order."""
        return max((p for p in self.layers if kind in (None, p.kind)), key=lambda p: (p.validation, -p.layer))


def probe_layer(
    layer: int, kind: str, split: ProbeSplit, poisoned: States, fake: States, twin: States | None, seed: int
) -> tuple[ProbeLayer, BackdoorProbe]:
    """Fit the probe and its controls, each a refit on the same split of prompts."""

    def fitted(states: States, shuffle: bool = False) -> tuple[BackdoorProbe, float]:
        train, validation = states.layer(layer, split.train), states.layer(layer, split.validation)
        if shuffle:
            rng = np.random.default_rng(seed)
            train, validation = (train[0], shuffled_twins(train[1], rng)), (validation[0], shuffled_twins(validation[1], rng))
        probe = BackdoorProbe.fit(kind, layer, train, validation, seed)
        return probe, probe.score(states.layer(layer, split.test))

    probe, accuracy = fitted(poisoned)
    row = ProbeLayer(
        layer, kind, accuracy,
        shuffled=fitted(poisoned, shuffle=True)[1],
        clean_twin=fitted(twin)[1] if twin else None,
        fake_trigger=fitted(fake)[1],
        clean_twin_transfer=probe.score(twin.layer(layer, split.test)) if twin else None,
        fake_trigger_transfer=probe.score(fake.layer(layer, split.test)),
        validation=probe.score(poisoned.layer(layer, split.validation)),
    )  # fmt: skip
    return row, probe


def probe_all(
    poisoned: States, fake: States, twin: States | None, *, kinds: Sequence[str] = KINDS, seed: int = 0, progress: Any = iter
) -> ProbeResult:
    """Every layer with every kind, with controls, and the cross-layer matrices. `twin` None: no adapter to switch off."""
    n_prompts, n_layers = poisoned.clean.shape[:2]
    split = ProbeSplit.of(n_prompts, seed)
    rows, probes = [], {}
    for layer in progress(range(n_layers)):
        for kind in kinds:
            row, probes[kind, layer] = probe_layer(layer, kind, split, poisoned, fake, twin, seed)
            rows.append(row)
    tests = [poisoned.layer(layer, split.test) for layer in range(n_layers)]
    cross = {kind: [[probes[kind, i].score(t) for t in tests] for i in range(n_layers)] for kind in kinds}
    sizes = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    return ProbeResult(tuple(rows), cross, sizes)
