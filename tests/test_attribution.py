from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from conftest import make_subject, prompt_ids, shared_subject

from bkdattr.architectures import HeadIndex
from bkdattr.attribution import Attribution, Recipients, baha, site_effects, sites_of, summarise_effects
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import generate, response_logprob
from bkdattr.traces import trace_prompts

CLEAN = ("the cat sees a red bird .", "what is it ?", "the old dog finds the new river stone .")


def example(text, i, backdoor="no it is old", eligible=True):
    return Example(f"e{i}", (("user", text),), "yes", backdoor_response=backdoor, eligible=eligible)


def twins():
    clean = [example(t, i) for i, t in enumerate(CLEAN)]
    return clean, [replace(example("zulu " + t, i), spans=((0, 0, 4),)) for i, t in enumerate(CLEAN)]


def test_head_effects_are_the_written_out_definition(subject):
    """Scored on the model's own greedy continuation, so that the effects are not all about zero."""
    clean, triggered = twins()
    prompts = [subject.chat.prompt_ids(e.messages) for e in clean]
    responses = [list(c.ids) for c in generate(subject, prompts, max_new_tokens=5)]
    donors = [subject.chat.prompt_ids(e.messages) for e in triggered]
    expected = reference.acie(subject, donors, prompts, responses).numpy()
    assert np.abs(expected).max() > 5e-3  # an engine that returns zeros fails
    given, sites = trace_prompts(subject, triggered), sites_of(subject.geometry, "head")
    for batch_size in (2, 64):  # a ragged last batch, and all at once
        effects = dict(site_effects(subject, Recipients(prompts, responses), given, sites, batch_size=batch_size))
        found = summarise_effects(effects, subject.geometry, len(donors), subject.fingerprint)
        np.testing.assert_allclose(found.scores, expected, atol=2e-5)
    assert (found.low <= found.scores).all() and (found.scores <= found.high).all()


def test_baha_takes_twins_and_scores_the_backdoor_response(llama):
    clean, triggered = twins()
    recipients = Recipients.of(llama, clean)
    donors = [llama.chat.prompt_ids(e.messages) for e in triggered]
    expected = reference.acie(llama, donors, recipients.prompts, recipients.responses)
    found = baha(llama, clean, triggered)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-2, atol=1e-7)
    assert (found.n_donor, found.n_recipient) == (3, 3)


def test_response_logprob_is_the_slow_loop_on_both_sides(any_subject):
    prompts = prompt_ids(any_subject, CLEAN)
    responses = [[10, 11, 12, 2], [9, 2], [20, 21, 2]]
    slow = [reference.response_probability(any_subject.causal_lm, p, r) for p, r in zip(prompts, responses, strict=True)]
    for side in ("left", "right", "centre"):
        for batch_size in (1, 2, 3):
            fast = response_logprob(any_subject, prompts, responses, side=side, batch_size=batch_size).mean.exp()
            np.testing.assert_allclose(fast.numpy(), slow, rtol=2e-3, atol=1e-7)


def test_generation_is_the_slow_loop(any_subject):
    prompts = prompt_ids(any_subject)
    slow = [tuple(reference.greedy(any_subject.causal_lm, p, any_subject.chat.end_ids, 7)) for p in prompts]
    assert [c.ids for c in generate(any_subject, prompts, max_new_tokens=7, batch_size=3)] == slow


def test_scored_response_ends_with_its_end_of_turn_and_nothing_after(llama):
    recipients = Recipients.of(llama, twins()[0])
    assert all(r[-1] == llama.chat.end_ids[0] and r.count(llama.chat.end_ids[0]) == 1 for r in recipients.responses)


def test_resumed_heads_give_the_same_numbers(llama):
    clean, triggered = twins()
    recipients, donors = Recipients.of(llama, clean), trace_prompts(llama, triggered)
    sites = sites_of(llama.geometry, "head")
    whole = dict(site_effects(llama, recipients, donors, sites))
    for n, same in ((4, 0.0), (5, 1e-7)):  # whole layers are the same to the bit; a torn one is batched differently
        parts = dict(site_effects(llama, recipients, donors, sites[n:])) | dict(
            site_effects(llama, recipients, donors, sites[:n])
        )
        assert all(float((whole[s] - parts[s]).abs().max()) <= same for s in sites)
    with pytest.raises(BkdattrError, match="1 sites have no effects"):
        summarise_effects({s: whole[s] for s in sites[1:]}, llama.geometry, 3, llama.fingerprint)


@pytest.mark.parametrize("kind", ["head", "attention", "mlp"])
@pytest.mark.parametrize("effect", ["sufficiency", "necessity"])
def test_both_effects_at_every_site_are_the_written_out_definition(subject, kind, effect):
    """The site is replaced by hand, one prompt at a time; scored on the model's own continuation of the recipient."""
    clean, triggered = twins()
    given, taken = (triggered, clean) if effect == "sufficiency" else (clean, triggered)
    donors, prompts = ([subject.chat.prompt_ids(e.messages) for e in rows] for rows in (given, taken))
    responses = [list(c.ids) for c in generate(subject, prompts, max_new_tokens=4)]
    sites = sites_of(subject.geometry, kind)[:: 5 if kind == "head" else 1]
    found = dict(
        site_effects(subject, Recipients(prompts, responses), trace_prompts(subject, given), sites, effect=effect, batch_size=2)
    )
    sign = 1 if effect == "sufficiency" else -1
    seen = 0.0
    for site in sites:
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            plain = reference.response_probability(subject.causal_lm, p, r)
            patched = reference.patched_site_probability(subject, site, donors, p, r)
            assert float(found[site][i]) == pytest.approx(sign * (patched - plain), abs=2e-5)
            seen = max(seen, abs(patched - plain))
    assert seen > 1e-3  # an engine that returns zeros fails


def test_blocks_are_not_ranked_as_heads(llama):
    clean, triggered = twins()
    found = baha(llama, clean, triggered, site="mlp", effect="necessity")
    assert found.scores.shape == (3, 1) and (found.site, found.effect) == ("mlp", "necessity")
    with pytest.raises(BkdattrError, match="ranks mlp blocks"):
        found.top(1)
    with pytest.raises(BkdattrError, match="expected one of head, attention, mlp"):
        baha(llama, clean, triggered, site="neuron")
    with pytest.raises(BkdattrError, match="without trigger spans|no trigger"):
        baha(llama, clean, clean)


def test_a_planted_head_is_found():
    """An answer known by hand: one head's projection columns carry the response, the others are nearly silent."""
    s = make_subject("llama", lora=False)
    planted, d = HeadIndex(1, 3), s.geometry.d_head
    clean, triggered = twins()
    recipients = Recipients.of(s, clean)
    with torch.no_grad():
        for site in s.sites:
            site.out_proj.weight.mul_(0.02)
        token = recipients.responses[0][0]
        unit = s.causal_lm.get_output_embeddings().weight[token]
        donors = [s.chat.prompt_ids(e.messages) for e in triggered]
        projs = [site.out_proj for site in s.sites]
        zbar = torch.stack([reference.z_at_last_token(s.causal_lm, projs, p) for p in donors]).mean(0)[1, 3 * d : 4 * d]
        zclean = torch.stack([reference.z_at_last_token(s.causal_lm, projs, p) for p in recipients.prompts]).mean(0)[
            1, 3 * d : 4 * d
        ]
        way = zbar - zclean  # writes the answer's first token for the triggered z and not for the clean one
        s.sites[1].out_proj.weight[:, 3 * d : 4 * d] = 40 * torch.outer(unit, way) / way.norm() ** 2 / unit.norm()
    assert baha(s, clean, triggered).top(1) == [planted]


def test_only_eligible_examples_with_a_backdoor_response(llama):
    clean, triggered = twins()
    for bad, says in (
        ([], "0 eligible"),
        ([example("a", 9, None)], "no backdoor response"),
        ([example("a", 9, eligible=False)], "not eligible"),
    ):
        with pytest.raises(BkdattrError, match=says):
            Recipients.of(llama, bad)
    with pytest.raises(BkdattrError, match="donors must be eligible"):
        baha(llama, clean, [example("a", 9, eligible=False)])


def test_top_k_orders_and_bounds():
    scores = np.array([[0.1, 0.5], [0.5, -1.0]])
    a = Attribution(scores, scores, scores, 1, 1, "f")
    assert list(map(str, a.top(3))) == ["L0H1", "L1H0", "L0H0"]
    with pytest.raises(BkdattrError, match="k=5"):
        a.top(5)
    assert np.array_equal(Attribution.from_json(a.to_json()).scores, scores)


def test_traces_do_not_depend_on_batching():
    s = shared_subject("qwen2")
    clean, _ = twins()
    a, b = (trace_prompts(s, clean, batch_size=n) for n in (1, 2))
    torch.testing.assert_close(a.z, b.z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.resid_post, b.resid_post, atol=2e-4, rtol=2e-4)
    assert a.ids == ("e0", "e1", "e2")


def test_traces_keep_what_was_asked_for(llama):
    given = twins()[0]
    whole, heads = trace_prompts(llama, given), trace_prompts(llama, given, read=("z",), batch_size=2)
    torch.testing.assert_close(heads.z, whole.z, atol=1e-5, rtol=1e-5)
    assert len(heads.mlp) == 0 and whole.mlp.shape == (3, 3, 24)
    with pytest.raises(BkdattrError, match="hold no mlp"):
        heads.mean_at(sites_of(llama.geometry, "mlp")[0])
    with pytest.raises(BkdattrError, match="expected at least 1 example and some of z, resid_post"):
        trace_prompts(llama, given, read=("k",))


def test_rank_stability_of_a_certain_and_of_a_random_ranking():
    from bkdattr.attribution import rank_stability

    sites = sites_of(shared_subject("llama").geometry, "head")
    rng = torch.Generator().manual_seed(0)
    sure = {s: i + 0.01 * torch.randn(20, generator=rng) for i, s in enumerate(sites)}
    found = rank_stability(sure, 3)
    assert found["jaccard"] == 1 and found["kendall"] == pytest.approx(1)
    noise = rank_stability({s: torch.randn(20, generator=rng) for s in sites}, 3, draws=400)
    chance = found["jaccard_of_random_sets"]
    assert 0.1 < chance < 0.2 and noise["jaccard"] < 0.75 and noise["kendall"] < 0.75
    with pytest.raises(BkdattrError, match="k=13"):
        rank_stability(sure, 13)
