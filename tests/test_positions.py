"""The vector around the user's own `model.generate`: the position is the prompt's last token however generate runs."""

from dataclasses import replace

import pytest
import torch
from conftest import MAIN, PROMPTS, make_subject, prompt_ids, shared_subject
from transformers import StaticCache

from bkdattr.architectures import HeadIndex
from bkdattr.chat import make_batch
from bkdattr.edits import Condition
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import generate, response_logprob
from bkdattr.traces import trace_prompts
from bkdattr.vector import BackdoorVector, fit_vector

LAYER = 1


@pytest.fixture(params=[f for f in MAIN if f != "gemma2"])
def case(request):
    """(subject, vector, padded batch, the answers that our own explicit-position generation gives)."""
    s = shared_subject(request.param)
    torch.manual_seed(7)
    mean_z = torch.randn(s.geometry.n_layers, s.geometry.n_heads, s.geometry.d_head)
    v = 8.0 * BackdoorVector.from_heads(s, [HeadIndex(0, 1), HeadIndex(1, 3)], mean_z)
    prompts = prompt_ids(s)
    want = [c.ids for c in generate(s, prompts, [v.edit(LAYER)], max_new_tokens=6)]
    plain = [c.ids for c in generate(s, prompts, max_new_tokens=6)]
    assert want != plain
    return s, v, prompts, want


def run(case, batched=True, **kwargs):
    """HF generate inside `applied`, left-padded together or one prompt at a time without a mask."""
    s, v, prompts, want = case
    kwargs = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **kwargs}
    with v.applied(s, layer=LAYER):
        if batched:
            b = make_batch(prompts, pad_id=0)
            outs = s.model.generate(input_ids=b.input_ids, attention_mask=b.attention_mask, **kwargs)[:, b.input_ids.shape[1] :]
            outs = list(outs)
        else:
            outs = [s.model.generate(input_ids=torch.tensor([p]), **kwargs)[0, len(p) :] for p in prompts]
    for out, answer in zip(outs, want, strict=True):
        assert tuple(out.tolist()[: len(answer)]) == answer


def test_left_padded_with_cache(case):
    run(case)


def test_no_cache(case):
    run(case, use_cache=False)


def test_unpadded_without_a_mask(case):
    run(case, batched=False)


def test_unpadded_without_a_mask_and_without_a_cache(case):
    run(case, batched=False, use_cache=False)


@pytest.mark.parametrize("chunk", [2, 3])
def test_chunked_prefill(case, chunk):
    run(case, batched=False, prefill_chunk_size=chunk)


def test_static_cache(case):
    run(case, cache_implementation="static")


def test_a_cache_object_of_the_users(case):
    s, v, prompts, want = case
    p = prompts[0]
    cache = StaticCache(config=s.causal_lm.config, max_cache_len=len(p) + 6)
    with v.applied(s, layer=LAYER):
        out = s.model.generate(
            input_ids=torch.tensor([p]), past_key_values=cache, do_sample=False, max_new_tokens=6, pad_token_id=0
        )
    assert tuple(out[0, len(p) :].tolist()[: len(want[0])]) == want[0]


def test_beams_see_the_vector_at_the_prompt_and_reorder_freely(case):
    """Beam search with and without a cache agree with each other and differ from beam search without the vector."""
    s, v, prompts, _ = case
    b = make_batch(prompts[:3], pad_id=0)
    kwargs = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "attention_mask": b.attention_mask}
    outs = []
    for use_cache in (True, False):
        with v.applied(s, layer=LAYER):
            outs.append(s.model.generate(input_ids=b.input_ids, use_cache=use_cache, **kwargs).tolist())
    assert outs[0] == outs[1]
    assert outs[0] != s.model.generate(input_ids=b.input_ids, **kwargs).tolist()
    alone = []
    for p in prompts[:3]:
        with v.applied(s, layer=LAYER):
            out = s.model.generate(input_ids=torch.tensor([p]), num_beams=3, do_sample=False, max_new_tokens=5, pad_token_id=0)
        alone.append(s.chat.decode(out[0, len(p) :].tolist()))
    assert alone == [s.chat.decode(o[b.input_ids.shape[1] :]) for o in outs[0]]


def test_returned_sequences_are_repeated_rows(case):
    s, v, prompts, want = case
    with v.applied(s, layer=LAYER):
        out = s.model.generate(
            input_ids=torch.tensor([prompts[0]]),
            num_beams=2,
            num_return_sequences=2,
            do_sample=False,
            max_new_tokens=4,
            pad_token_id=0,
        )
    assert out.shape[0] == 2


def test_one_token_prompt(case):
    """A one-token prompt looks like a decoding step; the vector must act on it once and not on the answer."""
    s, v, _, _ = case
    prompt = [[7]]
    want = generate(s, prompt, [v.edit(LAYER)], max_new_tokens=6)[0].ids
    for use_cache in (True, False):
        with v.applied(s, layer=LAYER):
            out = s.model.generate(
                input_ids=torch.tensor(prompt), use_cache=use_cache, do_sample=False, max_new_tokens=6, pad_token_id=0
            )
        assert tuple(out[0, 1:].tolist()[: len(want)]) == want


def test_generate_twice_in_one_context(case):
    """Positions are resolved anew for every call."""
    s, v, prompts, want = case
    with v.applied(s, layer=LAYER):
        for p, answer in zip(prompts, want, strict=True):
            out = s.model.generate(input_ids=torch.tensor([p]), do_sample=False, max_new_tokens=6, pad_token_id=0)
            assert tuple(out[0, len(p) :].tolist()[: len(answer)]) == answer


def test_a_hand_written_decoding_loop(case):
    s, v, prompts, want = case
    ids, past, got = torch.tensor([prompts[0]]), None, []
    with torch.no_grad(), v.applied(s, layer=LAYER):
        for _ in want[0]:
            out = s.causal_lm(input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            got.append(int(ids))
    assert tuple(got) == want[0]


def test_a_cache_filled_outside_is_refused(case):
    s, v, prompts, _ = case
    past = s.causal_lm(input_ids=torch.tensor([prompts[0]]), use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(BkdattrError, match="filled outside"), v.applied(s, layer=LAYER):
        s.causal_lm(input_ids=torch.tensor([[7]]), past_key_values=past)


def test_signs_cancel_and_arithmetic_holds(case):
    s, v, prompts, _ = case
    both = generate(s, prompts, [v.edit(LAYER), v.edit(LAYER, sign=-1)], max_new_tokens=6)
    assert both == generate(s, prompts, max_new_tokens=6)
    torch.testing.assert_close((v + v - v * 0.5).direction, v.direction * 1.5)
    assert abs((2 * v).norm - 2 * v.norm) < 1e-3


def test_vector_is_kept_for_its_own_model(case, tmp_path):
    s, v, _, _ = case
    v.save(tmp_path)
    again = BackdoorVector.load(tmp_path, s)
    assert torch.equal(again.direction, v.direction) and again.heads == v.heads
    other = make_subject("llama", seed=5)
    with pytest.raises(BkdattrError, match="another model"):
        BackdoorVector.load(tmp_path, other)
    with s.adapter_off(), pytest.raises(BkdattrError, match="another model"):
        BackdoorVector.load(tmp_path, s)
    with pytest.raises(BkdattrError, match="another model"), v.applied(other, layer=0):
        pass


def test_families_that_normalise_behind_the_projection_are_refused():
    s = shared_subject("gemma2")
    with pytest.raises(BkdattrError, match="gemma2 normalises behind"):
        BackdoorVector.from_heads(s, [HeadIndex(0, 0)], torch.zeros(3, 4, 8))


def twins_of(subject):
    clean = [Example(f"e{i}", (("user", t),), "red", backdoor_response="blue") for i, t in enumerate(PROMPTS)]
    triggered = [replace(e, messages=(("user", "zulu " + e.prompt),), spans=((0, 0, 4),)) for e in clean]
    return clean, triggered


def test_the_difference_of_all_heads_is_the_difference_of_attention_outputs(case):
    """Two routes to one number: head contributions summed, and the projections' own outputs, triggered minus clean."""
    s = case[0]
    clean, triggered = (trace_prompts(s, rows) for rows in twins_of(s))
    v = BackdoorVector.from_difference(s, triggered.mean_z, clean.mean_z)
    want = (triggered.attention - clean.attention).mean(0).sum(0)
    torch.testing.assert_close(v.direction, want, atol=1e-3, rtol=1e-3)
    some = [BackdoorVector.from_difference(s, triggered.mean_z, clean.mean_z, [h]) for h in s.geometry.heads]
    torch.testing.assert_close(torch.stack([x.direction for x in some]).sum(0), v.direction, atol=1e-3, rtol=1e-3)
    assert (v.kind, some[0].kind) == ("difference", "difference_heads")


def test_a_fitted_vector_does_both_jobs_within_its_norm(case):
    s = case[0]
    clean, triggered = twins_of(s)
    start = BackdoorVector.from_difference(s, trace_prompts(s, triggered).mean_z, trace_prompts(s, clean).mean_z)
    start = start.with_norm(20.0, "difference")
    fitted = fit_vector(s, clean, triggered, LAYER, start, steps=30, batch_size=3)
    assert fitted.norm <= start.norm * 1.0001 and fitted.kind == "fitted"

    def both(v):
        ids = [[s.chat.prompt_ids(e.messages) for e in rows] for rows in (clean, triggered)]
        blue, red = ([s.chat.response_ids(e.messages, r) for e in clean] for r in ("blue", "red"))
        up = response_logprob(s, ids[0], blue, [v.edit(LAYER)]).total.mean()
        down = response_logprob(s, ids[1], red, [v.edit(LAYER, sign=-1)]).total.mean()
        return float(up + down)

    assert both(fitted) > both(start) + 1
    assert all(p.grad is None for p in s.model.parameters())
    with pytest.raises(BkdattrError, match="twins in the same order"):
        fit_vector(s, clean, triggered[::-1], LAYER, start)


def test_a_conditional_vector_acts_in_the_users_generate_only_where_the_probe_fires(case):
    s, v, prompts, want = case
    resid = trace_prompts(s, twins_of(s)[0]).resid_post[:, 0]
    weight = resid[0] - resid[1]
    when = Condition(0, weight, -float((resid[0] + resid[1]) @ weight / 2))
    fires = when.fires(resid).tolist()
    assert fires[:2] == [True, False]
    plain = [c.ids for c in generate(s, prompts, max_new_tokens=6)]
    for p, answer, other, f in zip(prompts, want, plain, fires, strict=True):
        with v.applied(s, layer=LAYER, when=when):
            out = s.model.generate(input_ids=torch.tensor([p]), do_sample=False, max_new_tokens=6, pad_token_id=0)
        expected = answer if f else other
        assert tuple(out[0, len(p) :].tolist()[: len(expected)]) == expected
