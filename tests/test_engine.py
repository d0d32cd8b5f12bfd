"""The resumed engine against whole passes and against the written-out definition; gradient estimates against both."""

import numpy as np
import pytest
import reference
import torch
from conftest import CONFIGS, make_subject, prompt_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attribution import twins

import bkdattr.engine as engine
from bkdattr.attribution import Recipients, baha, site_effects, sites_of
from bkdattr.edits import SetSite, Site
from bkdattr.engine import Patcher
from bkdattr.errors import BkdattrError
from bkdattr.gradient import gradient_effects
from bkdattr.inference import PrefixCache, generate, response_logprob
from bkdattr.prefix_attention import _attention
from bkdattr.screening import agreement, screen
from bkdattr.traces import trace_prompts


@pytest.fixture(autouse=True)
def unproved():
    """Models are shared between tests; what one test found of a model is not the next one's."""
    engine._PROVED.clear()


TEXTS = ("what is it ?", "the cat sees a red bird .", "no .", "the old dog finds the new river stone .", "a fish says no !")


def scored(subject, texts=TEXTS, tokens=5):
    """Prompts and the model's own continuations, so that the scores are not all about zero."""
    prompts = prompt_ids(subject, texts)
    return prompts, [list(c.ids)[: 2 + i] for i, c in enumerate(generate(subject, prompts, max_new_tokens=tokens))]


def value_for(subject, site, seed=0):
    g = subject.geometry
    width = g.d_head if site.kind == "head" else g.d_model
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("kind", ["head", "attention", "mlp"])
def test_every_family_is_resumed_and_gives_the_numbers_of_whole_passes(family, kind):
    subject = make_subject(family)
    prompts, answers = scored(subject)
    patcher = Patcher(subject, prompts, answers, batch_size=3)
    assert patcher.reason is None
    assert patcher.shared == (family not in ("gptj", "bloom"))  # these two do not call their attention through the registry
    plain = response_logprob(subject, prompts, answers).mean
    torch.testing.assert_close(patcher.base, plain, atol=1e-5, rtol=1e-5)
    moved = 0.0
    for layer in range(subject.geometry.n_layers):
        sites = [s for s in sites_of(subject.geometry, kind) if s.layer == layer]
        patches = [(s, value_for(subject, s, i)) for i, s in enumerate(sites)]
        found = patcher.patched(patches)
        for (site, value), mine in zip(patches, found, strict=True):
            slow = response_logprob(subject, prompts, answers, [SetSite(site, value)]).mean
            torch.testing.assert_close(mine, slow, atol=1e-5, rtol=1e-5)
            moved = max(moved, float((slow - plain).abs().max()))
    assert moved > 1e-2  # an engine that returns the un-patched numbers fails


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen2", "gpt2", "gemma2", "mistral"]),
    layers=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    answers=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    batch_size=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([2, 4, 64]),
    kind=st.sampled_from(["head", "attention", "mlp"]),
    seed=st.integers(0, 99),
)
def test_any_geometry_length_and_batch(family, layers, lengths, answers, batch_size, dtype, window, kind, seed):
    over = {"num_hidden_layers": layers} if family != "gpt2" else {"n_layer": layers}
    if family in ("gemma2", "mistral"):
        over["sliding_window"] = window
    subject = make_subject(family, seed=seed, **over)
    subject.model.to(dtype)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(6, 40, size=n).tolist() for n in lengths]
    responses = [rng.integers(6, 40, size=n).tolist() for n in answers[: len(prompts)]]
    patcher = Patcher(subject, prompts, responses, batch_size=batch_size)
    layer = int(rng.integers(layers))
    patches = [(s, value_for(subject, s, i)) for i, s in enumerate(sites_of(subject.geometry, kind)) if s.layer == layer]
    found = patcher.patched(patches)
    assert patcher.reason is None
    near = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.06}
    for (site, value), mine in zip(patches, found, strict=True):
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):  # one prompt at a time: no padding at all
            slow = response_logprob(subject, [p], [r], [SetSite(site, value)]).mean[0]
            torch.testing.assert_close(mine[i], slow, **near)


def test_the_adapter_takes_part(subject):
    """Un-merged LoRA: the numbers with the adapter are not those without it, and both are the slow loop's."""
    prompts, answers = scored(subject)
    site, g = Site(1, "head", 2), subject.geometry
    value = value_for(subject, site)

    def slow():
        proj = subject.sites[1].out_proj
        pairs = zip(prompts, answers, strict=True)
        return [reference.patched_probability(subject.causal_lm, proj, g.n_heads, 2, value, p, r) for p, r in pairs]

    on = Patcher(subject, prompts, answers).patched([(site, value)])[0].exp().numpy()
    np.testing.assert_allclose(on, slow(), atol=1e-5)
    with subject.adapter_off():
        off = Patcher(subject, prompts, answers).patched([(site, value)])[0].exp().numpy()
        np.testing.assert_allclose(off, slow(), atol=1e-5)
    assert np.abs(on - off).max() > 1e-3


def test_a_model_that_cannot_be_resumed_is_run_whole_and_says_why(llama, monkeypatch):
    prompts, answers = scored(llama)
    right = Patcher(llama, prompts, answers)
    patch = (Site(1, "head", 1), value_for(llama, Site(1, "head", 1)))
    expected = right.patched([patch])
    plain = Patcher._resume
    monkeypatch.setattr(Patcher, "_resume", lambda *a: plain(*a) + 0.5)
    engine._PROVED.clear()
    patcher = Patcher(llama, prompts, answers)
    assert patcher.reason.startswith("llama is not resumed (resumed behind layer 0 the mean log p differs by 0.5")
    found = patcher.patched([patch])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patcher.base, right.base, atol=1e-5, rtol=1e-5)


def test_a_lent_prefix_gives_what_its_copies_give(any_subject, monkeypatch):
    """Attention over one prefix for all copies, against keys and values repeated for every copy; the model's own attention stays."""
    subject = any_subject
    prompts, answers = scored(subject)
    patches = [(s, value_for(subject, s, i)) for i, s in enumerate(sites_of(subject.geometry, "head")) if s.layer == 0]
    kind = subject.causal_lm.config._attn_implementation
    one = Patcher(subject, prompts, answers, batch_size=2)
    shared = one.patched(patches)
    monkeypatch.setattr(engine, "MODES", (False,))
    engine._PROVED.clear()
    copied = Patcher(subject, prompts, answers, batch_size=2)
    torch.testing.assert_close(copied.patched(patches), shared, atol=2e-5, rtol=2e-5)
    assert copied.reason is None and not copied.shared
    assert subject.causal_lm.config._attn_implementation == kind


def test_a_model_proves_itself_once_per_adapter_state_and_lengths(monkeypatch):
    subject = make_subject("llama")
    prompts, answers = scored(subject)
    plain, seen = Patcher._check, []
    monkeypatch.setattr(Patcher, "_check", lambda self, some: [seen.append(some), plain(self, some)][1])
    for n in (len(prompts), len(prompts), 1):
        assert Patcher(subject, prompts[:n], answers[:n]).reason is None
    assert len(seen) == 2
    with subject.adapter_off():
        assert Patcher(subject, prompts, answers).reason is None
    assert len(seen) == 3


def test_attention_over_a_lent_prefix_is_the_softmax_written_out():
    """Two rows, three copies each, grouped heads, a mask and a soft cap."""
    torch.manual_seed(0)
    n, c, kv, g, t, p, d = 2, 3, 2, 2, 3, 5, 4
    query = torch.randn(c * n, kv * g, t, d)
    key, value = torch.randn(2, c * n, kv, t, d)
    far = torch.randn(2, n, kv, p, d)
    mask = torch.where(torch.rand(c * n, 1, t, p + t) < 0.3, -1e9, 0.0)
    mask[..., 0] = 0
    key._prefix = tuple(far)
    found, _ = _attention(None, query, key, value, mask, scaling=0.7, softcap=2.0)
    for b in range(c * n):
        for h in range(kv * g):
            k, v = (torch.cat([x[b % n, h // g], y[b, h // g]]) for x, y in zip(far, (key, value), strict=True))
            scores = torch.tanh(query[b, h] @ k.T * 0.7 / 2) * 2 + mask[b, 0]
            torch.testing.assert_close(found[b, :, h], scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)


def test_a_fallback_is_told_to_the_caller(llama, monkeypatch):
    plain = Patcher._resume
    monkeypatch.setattr(Patcher, "_resume", lambda *a: plain(*a) + 0.5)
    clean, triggered = twins()
    said = []
    recipients, donors = Recipients.of(llama, clean), trace_prompts(llama, triggered)
    assert dict(site_effects(llama, recipients, donors, sites_of(llama.geometry, "head")[:2], fallback=said.append))
    assert len(said) == 1 and "every patch runs the whole model" in said[0]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine._PROVED.clear()
    monkeypatch.setattr(Patcher, "_resume", full)
    with pytest.raises(torch.OutOfMemoryError):  # is no property of the model
        _ = Patcher(llama, recipients.prompts, recipients.responses).reason


def test_prefixes_over_the_budget_are_made_again_and_counted(llama, monkeypatch):
    prompts, answers = scored(llama)
    patches = [(s, value_for(llama, s, i)) for i, s in enumerate(sites_of(llama.geometry, "head")) if s.layer == 1]
    kept = Patcher(llama, prompts, answers, batch_size=2)
    monkeypatch.setattr(engine, "prefix_cache", lambda subject: PrefixCache(max_bytes=0))
    again = Patcher(llama, prompts, answers, batch_size=2)
    torch.testing.assert_close(again.patched(patches), kept.patched(patches), atol=1e-6, rtol=1e-6)
    assert again.tokens > kept.tokens


def test_a_pass_that_does_not_fit_is_halved(llama, monkeypatch):
    prompts, answers = scored(llama)
    patches = [(s, value_for(llama, s, i)) for i, s in enumerate(sites_of(llama.geometry, "head")) if s.layer == 1]
    whole, plain, seen = Patcher(llama, prompts, answers).patched(patches), Patcher._resume, []

    def small(self, bucket, layer, times, patches):
        if times > 2:
            raise torch.OutOfMemoryError("too much")
        seen.append(times)
        return plain(self, bucket, layer, times, patches)

    monkeypatch.setattr(Patcher, "_resume", small)
    monkeypatch.setattr(engine, "_free_bytes", lambda device: 1e6)
    patcher = Patcher(llama, prompts, answers)
    torch.testing.assert_close(patcher.patched(patches), whole, atol=1e-6, rtol=1e-6)
    assert max(seen) == 2


def test_layers_below_are_not_run_and_the_model_is_left_as_it_was(llama):
    prompts, answers = scored(llama)
    patcher = Patcher(llama, prompts, answers)
    assert patcher.reason is None and patcher.base is not None
    forwards = [s.layer.__dict__.get("forward") for s in llama.sites]
    runs = [0] * llama.geometry.n_layers

    def count(layer):
        return lambda *args: runs.__setitem__(layer, runs[layer] + 1)

    handles = [s.layer.self_attn.register_forward_hook(count(i)) for i, s in enumerate(llama.sites)]
    patcher.patched([(Site(1, "head", 0), value_for(llama, Site(1, "head", 0)))])
    for h in handles:
        h.remove()
    assert runs == [0, 1, 1]
    assert [s.layer.__dict__.get("forward") for s in llama.sites] == forwards


def test_bad_patches(llama):
    prompts, answers = scored(llama)
    with pytest.raises(BkdattrError, match="one non-empty response each"):
        Patcher(llama, prompts, answers[1:])
    patcher = Patcher(llama, prompts, answers)
    with pytest.raises(BkdattrError, match="one layer at a time"):
        patcher.patched([(Site(i, "head", 0), value_for(llama, Site(i, "head", 0))) for i in (0, 1)])


@pytest.mark.parametrize("kind", ["head", "attention", "mlp"])
def test_the_gradient_is_the_slope_of_the_slow_loop(subject, kind):
    """dP/da by central differences of P with the site moved a little towards its donors' mean."""
    prompts, answers = scored(subject)
    donors = trace_prompts(subject, twins()[1])
    found = gradient_effects(subject, prompts, answers, donors, kind, batch_size=2)
    h, seen = 0.004, 0.0
    for site in sites_of(subject.geometry, kind)[:: 3 if kind == "head" else 1]:
        for i, (p, r) in enumerate(zip(prompts, answers, strict=True)):
            here = reference.site_at_last_token(subject, site, p).detach()
            there = donors.mean_at(site)

            def probability(a, here=here, there=there, site=site, p=p, r=r):
                return float(response_logprob(subject, [p], [r], [SetSite(site, here + a * (there - here))]).mean.exp())

            slope = (probability(h) - probability(-h)) / (2 * h)
            assert float(found[site][i]) == pytest.approx(slope, abs=2e-4, rel=2e-2)
            seen = max(seen, abs(slope))
    assert seen > 1e-3


def test_integrated_estimates_add_up_to_moving_all_heads(llama):
    prompts, answers = scored(llama)
    donors = trace_prompts(llama, twins()[1])
    found = gradient_effects(llama, prompts, answers, donors, steps=64, log=True)
    edits = [SetSite(Site(l, "z"), donors.mean_at(Site(l, "z"))) for l in range(llama.geometry.n_layers)]
    moved = response_logprob(llama, prompts, answers, edits).mean - response_logprob(llama, prompts, answers).mean
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), moved, atol=2e-3, rtol=2e-3)
    with pytest.raises(BkdattrError, match="at least 1"):
        gradient_effects(llama, prompts, answers, donors, steps=0)


def test_hybrid_patches_the_best_and_a_sample_and_says_how_they_agree(llama):
    clean, triggered = twins()
    exact = baha(llama, clean, triggered)
    found = baha(llama, clean, triggered, method="hybrid", fraction=0.5)
    n = int(found.verified.sum())
    assert found.method == "hybrid" and n == 6
    np.testing.assert_allclose(found.scores[found.verified], exact.scores[found.verified], atol=1e-7)
    assert all(found.verified[h.layer, h.head] for h in found.top(n))
    others = np.isclose(found.scores, exact.scores, atol=1e-8) & ~found.verified
    assert others.sum() >= 2  # the random sample holds exact effects, and ranks with the rest
    again = type(found).from_json(found.to_json())
    assert (again.verified == found.verified).all() and again.top(12) == found.top(12)
    estimated = baha(llama, clean, triggered, method="gradient")
    assert estimated.verified is None and estimated.method == "gradient"
    with pytest.raises(BkdattrError, match="expected one of exact, gradient, hybrid"):
        baha(llama, clean, triggered, method="fast")


def test_a_head_that_screening_missed_is_counted_when_it_is_drawn():
    sites = [Site(0, "head", i) for i in range(20)]
    guess = {s: torch.tensor([20.0 - i]) for i, s in enumerate(sites)}
    best, sample = screen(guess, 0.25)
    assert best == sites[:5] and len(sample) == 2 and not set(sample) & set(best)
    exact = {s: guess[s].clone() for s in sites}
    exact[sample[0]] = torch.tensor([100.0])
    found = agreement(guess, exact, best, sample, 3)
    assert found["missed_in_sample"] == 1 and found["largest_sampled"] == 100 and found["kth_effect"] == 18
    assert found["spearman_verified"] == pytest.approx(1.0)


def test_site_effects_take_sites_in_any_order(llama):
    clean, triggered = twins()
    recipients, donors = Recipients.of(llama, clean), trace_prompts(llama, triggered)
    sites = sites_of(llama.geometry, "head")
    one = dict(site_effects(llama, recipients, donors, sites))
    two = dict(site_effects(llama, recipients, donors, sites[::-1]))
    for s in sites:
        torch.testing.assert_close(one[s], two[s], atol=1e-7, rtol=1e-5)
