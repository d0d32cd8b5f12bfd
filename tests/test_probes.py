import numpy as np
import pytest
import torch

from bkdattr.errors import BkdattrError
from bkdattr.probes import KINDS, BackdoorProbe, ProbeSplit, States, probe_all, shuffled_twins


def states(shift, n=120, layers=2, d=12, seed=0):
    """Twins: triggered = clean + shift along one axis at layer 1, nothing at layer 0."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(n, layers, d))
    triggered = clean + rng.normal(size=clean.shape) * 0.3
    triggered[:, 1, 0] += shift
    return States(clean, triggered)


def test_probe_finds_a_planted_direction_and_the_controls_do_not():
    found = probe_all(states(9.0), fake=states(0.0, seed=1), twin=states(0.0, seed=2), kinds=KINDS)
    for row in found.layers:
        if row.layer == 1:
            assert row.accuracy >= 0.95
            assert row.shuffled < 0.8 and row.fake_trigger < 0.8 and row.clean_twin < 0.8
            assert row.clean_twin_transfer < 0.7 and row.fake_trigger_transfer < 0.7
        else:
            assert row.accuracy < 0.8
    assert found.best().layer == 1
    assert all(len(m) == 2 and len(m[0]) == 2 for m in found.cross_layer.values())
    for kind in KINDS:
        own = next(r for r in found.layers if r.kind == kind and r.layer == 1)
        assert found.cross_layer[kind][1][1] == own.accuracy


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_labels_stay_at_chance_where_the_classes_are_far_apart(seed):
    far = states(40.0, seed=seed)
    found = probe_all(far, fake=far, twin=None, kinds=["logistic", "svm"], seed=seed)
    assert all(0.2 <= row.shuffled <= 0.8 for row in found.layers)
    y = shuffled_twins(np.repeat([0, 1], 10), np.random.default_rng(seed))
    assert (y[:10] + y[10:] == 1).all() and y[:10].sum() == 5


def test_split_keeps_twins_together_and_is_seeded():
    a = ProbeSplit.of(50, 0)
    parts = [set(p.tolist()) for p in (a.train, a.validation, a.test)]
    assert [len(p) for p in parts] == [30, 10, 10] and len(set.union(*parts)) == 50
    assert not np.array_equal(a.train, ProbeSplit.of(50, 1).train)
    x, y = states(1.0).layer(1, a.test)
    assert len(x) == 20 and y.sum() == 10


def test_an_interaction_needs_more_than_a_line():
    """XOR: the MLP and the RBF SVM separate it, logistic regression cannot; so the kinds are what they say."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    scores = {
        k: BackdoorProbe.fit(k, 0, (x[:240], y[:240]), (x[240:320], y[240:320]), 0).score((x[320:], y[320:])) for k in KINDS
    }
    assert scores["logistic"] < 0.7 and scores["mlp"] > 0.85 and scores["svm"] > 0.85


def test_bad_probe_inputs():
    with pytest.raises(BkdattrError, match="at least 5 prompts"):
        ProbeSplit.of(4, 0)
    with pytest.raises(BkdattrError, match="must pair up"):
        States(np.zeros((3, 1, 2)), np.zeros((2, 1, 2)))
    with pytest.raises(BkdattrError, match="expected one of logistic"):
        x = np.zeros((4, 2)), np.array([0, 1, 0, 1])
        BackdoorProbe.fit("tree", 0, x, x, 0)


def test_a_logistic_probe_is_a_condition():
    """The folded weights decide as the probe does, row by row."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + [5, 0, 2, -4, 0]
    y = (x[:, 0] - 0.2 * x[:, 1] + rng.normal(size=60) > 5).astype(int)
    probe = BackdoorProbe.fit("logistic", 2, (x[:40], y[:40]), (x[40:], y[40:]), 0)
    condition = probe.condition()
    fired = condition.fires(torch.from_numpy(x).float()).numpy()
    assert (fired == (probe.model.predict(probe.scaler.transform(x)) == 1)).all() and 0 < fired.sum() < 60
    assert condition.layer == 2
    with pytest.raises(BkdattrError, match="expected a logistic one"):
        BackdoorProbe.fit("svm", 2, (x[:40], y[:40]), (x[40:], y[40:]), 0).condition()
