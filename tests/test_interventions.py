"""The laws of reading and writing, over every architecture row, with an un-merged LoRA."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROMPTS, add_lora, make_model, make_subject, make_tokenizer, prompt_ids, shared_subject

from bkdattr.architectures import HeadIndex
from bkdattr.chat import make_batch
from bkdattr.edits import AddVector, BlendSite, Condition, ScaleSite, SetSite, Site, Where, edits_key
from bkdattr.errors import BkdattrError
from bkdattr.inference import forward, generate, response_logprob
from bkdattr.interventions import capture, edited
from bkdattr.lens import merged_copy
from bkdattr.model import Subject
from bkdattr.traces import contributions, head_contribution

H = HeadIndex(1, 2)


def batch_of(subject, side="left", texts=PROMPTS):
    return make_batch(prompt_ids(subject, texts), pad_id=subject.chat.pad_id, side=side)


def last_logits(subject, batch, edits=()):
    with torch.no_grad(), edited(subject, edits, Where.of(batch)):
        logits = forward(subject, batch, use_cache=False).logits
    return logits[torch.arange(len(batch.last_prompt)), batch.last_prompt].float()


def hooks(subject) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


def read(subject, batch):
    layers = range(subject.geometry.n_layers)
    with torch.no_grad(), capture(subject, Where.of(batch), z=layers, resid_post=layers) as trace:
        forward(subject, batch, use_cache=False)
    return trace


def some_edits(subject):
    g = subject.geometry
    torch.manual_seed(3)
    return [
        SetSite(Site.of_head(H), torch.randn(g.d_head)),
        ScaleSite(Site.of_head(HeadIndex(0, 1)), 0.0),
        AddVector(Site(2, "attention"), torch.randn(g.d_model), 2.0),
    ]


def test_contributions_sum_to_the_projection_minus_bias(any_subject):
    """Un-merged LoRA and grouped KV heads included: the projection's own output is the oracle."""
    s = any_subject
    batch, seen = batch_of(s), {}
    handles = [
        site.out_proj.register_forward_hook(lambda m, a, out, i=i: seen.update({i: (a[0], out)}))
        for i, site in enumerate(s.sites)
    ]
    with torch.no_grad():
        forward(s, batch, use_cache=False)
    for h in handles:
        h.remove()
    for layer, (z, out) in seen.items():
        shape = (*z.shape[:2], s.geometry.n_heads, s.geometry.d_head)
        parts = contributions(s, layer, z.reshape(shape))
        with torch.no_grad():
            bias = s.sites[layer].out_proj(torch.zeros_like(z[:, :1]))
        torch.testing.assert_close(parts.sum(-2), out - bias, atol=1e-4, rtol=1e-4)
        assert parts.abs().amax((0, 1, 3)).min() > 1e-3  # every head contributes, so the sum is not carried by one


def test_slicing_the_base_weight_would_drop_the_adapter(llama):
    z = torch.randn(llama.geometry.d_head)
    base = llama.sites[1].out_proj.base_layer.weight
    d = llama.geometry.d_head
    sliced = base[:, 2 * d : 3 * d] @ z
    assert (head_contribution(llama, H, z) - sliced).abs().max() > 0.05
    with llama.adapter_off():
        torch.testing.assert_close(head_contribution(llama, H, z), sliced.detach(), atol=1e-5, rtol=1e-5)


def test_a_head_set_to_its_own_z_changes_nothing(any_subject):
    batch = batch_of(any_subject)
    trace, plain = read(any_subject, batch), last_logits(any_subject, batch)
    for head in (H, HeadIndex(0, 0), HeadIndex(2, 3)):
        own = SetSite(Site.of_head(head), trace.z[head.layer][:, head.head])
        torch.testing.assert_close(last_logits(any_subject, batch, [own]), plain, atol=1e-5, rtol=1e-5)


def test_zero_ablation_matches_a_projection_without_those_columns(subject):
    """An oracle that shares no code with the edit: zero the head's input columns in every weight of the projection."""
    s = make_subject(subject.causal_lm.config.model_type)
    batch, d = batch_of(s, texts=PROMPTS[:1]), s.geometry.d_head
    ids = batch.input_ids
    patched = last_logits(s, batch, [ScaleSite(Site.of_head(H), 0.0, "all")])
    module = s.sites[H.layer].out_proj
    columns = slice(H.head * d, (H.head + 1) * d)
    with torch.no_grad():
        base = module.base_layer.weight
        (base[columns] if s.causal_lm.config.model_type == "gpt2" else base[:, columns]).zero_()
        module.lora_A["default"].weight[:, columns].zero_()
        expected = s.causal_lm(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(patched, expected, atol=1e-4, rtol=1e-4)
    assert (patched - last_logits(subject, batch)).abs().max() > 1e-3


def test_edits_act_and_leaving_restores_bitwise(any_subject):
    batch = batch_of(any_subject)
    before, n = last_logits(any_subject, batch), hooks(any_subject)
    for edit in some_edits(any_subject):
        assert (last_logits(any_subject, batch, [edit]) - before).abs().max() > 1e-3
    assert torch.equal(last_logits(any_subject, batch), before)
    with pytest.raises(RuntimeError, match="boom"), edited(any_subject, some_edits(any_subject), Where.of(batch)):
        raise RuntimeError("boom")
    assert torch.equal(last_logits(any_subject, batch), before)
    assert hooks(any_subject) == n
    assert "generate" not in any_subject.causal_lm.__dict__


def test_batch_of_one_is_batch_of_n(any_subject):
    together = last_logits(any_subject, batch_of(any_subject), some_edits(any_subject))
    alone = [last_logits(any_subject, batch_of(any_subject, texts=(t,)), some_edits(any_subject))[0] for t in PROMPTS]
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-4, rtol=2e-4)


def test_left_padding_is_right_padding(any_subject):
    edits = some_edits(any_subject)
    left, right = (last_logits(any_subject, batch_of(any_subject, side), edits) for side in ("left", "right"))
    torch.testing.assert_close(left, right, atol=2e-4, rtol=2e-4)
    a, b = (read(any_subject, batch_of(any_subject, side)) for side in ("left", "right"))
    for layer in a.z:
        torch.testing.assert_close(a.z[layer], b.z[layer], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(a.resid_post[layer], b.resid_post[layer], atol=5e-4, rtol=5e-4)


def test_rowwise_values_reach_their_own_row(llama):
    batch = batch_of(llama)
    values = torch.randn(len(PROMPTS), llama.geometry.d_head)
    together = last_logits(llama, batch, [SetSite(Site.of_head(H), values)])
    for i, text in enumerate(PROMPTS):
        alone = last_logits(llama, batch_of(llama, texts=(text,)), [SetSite(Site.of_head(H), values[i])])
        torch.testing.assert_close(together[i], alone[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("scope", ["last_prompt", "answer", "all", "trigger_span"])
def test_cached_is_uncached_generation_under_edits(any_subject, scope):
    prompts = prompt_ids(any_subject)
    spans = [list(range(1, len(p) - 2)) for p in prompts]
    edits = [replace(e, scope=scope) for e in some_edits(any_subject)]
    edits[-1] = replace(edits[-1], site=Site(0, "attention"), strength=30.0)  # strong enough to change some answer everywhere
    runs = [
        generate(any_subject, prompts, edits, max_new_tokens=8, use_cache=c, batch_size=b, trigger_tokens=spans)
        for c in (True, False)
        for b in (3, 1)  # three and a short last batch of one; then all alone
    ]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    plain = generate(any_subject, prompts, max_new_tokens=8)
    assert runs[0] != plain


def test_shared_prefix_gives_the_same_answers(any_subject):
    from bkdattr.inference import PrefixCache

    prefix, prompts = PrefixCache(), prompt_ids(any_subject)
    for edits in (some_edits(any_subject), [], some_edits(any_subject)[:1]):
        for _ in range(2):
            shared = generate(any_subject, prompts, edits, max_new_tokens=8, batch_size=3, prefix=prefix)
            assert shared == generate(any_subject, prompts, edits, max_new_tokens=8, batch_size=3)
    assert len(prefix.kept) == 2
    if any_subject.has_adapter:
        with any_subject.adapter_off(), pytest.raises(BkdattrError, match="belongs to"):
            generate(any_subject, prompts, max_new_tokens=2, batch_size=3, prefix=prefix)


def test_unmerged_is_merged(any_subject):
    merged = Subject.of(merged_copy(any_subject), any_subject.chat.tokenizer)
    assert not merged.has_adapter
    batch, edits = batch_of(any_subject), some_edits(any_subject)
    torch.testing.assert_close(last_logits(any_subject, batch, edits), last_logits(merged, batch, edits), atol=5e-4, rtol=5e-4)
    z = torch.randn(any_subject.geometry.n_heads, any_subject.geometry.d_head)
    torch.testing.assert_close(contributions(any_subject, 1, z), contributions(merged, 1, z), atol=1e-4, rtol=1e-4)


def test_bf16_edits_take_the_models_dtype():
    s = Subject.of(add_lora(make_model("llama").to(torch.bfloat16)).to(torch.bfloat16), make_tokenizer())
    batch, edits = batch_of(s), some_edits(s)
    full = last_logits(shared_subject("llama"), batch, edits)
    assert torch.nn.functional.cosine_similarity(last_logits(s, batch, edits), full).min() > 0.95
    trace = read(s, batch)
    assert trace.z[0].dtype == torch.float32
    logp = response_logprob(s, prompt_ids(s), [[10, 11, 2]] * 4).mean
    assert logp.dtype == torch.float32 and torch.isfinite(logp).all()


def test_an_edit_that_was_never_hit_raises(llama):
    batch = batch_of(llama)
    with pytest.raises(BkdattrError, match="never hit"), edited(llama, some_edits(llama), Where.of(batch)):
        pass
    with pytest.raises(BkdattrError, match="never hit"):
        last_logits(llama, batch, [ScaleSite(Site.of_head(H), 0.0, "answer")])


def test_training_mode_is_refused():
    s = make_subject("llama")
    s.model.train()
    with pytest.raises(BkdattrError, match=r"training mode.*eval"), edited(s, some_edits(s)):
        pass
    with pytest.raises(BkdattrError, match="training mode"), capture(s, Where.of(batch_of(s)), z=[0]):
        pass


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (ScaleSite(Site(9, "head", 0)), "layer 9 is out of range"),
        (ScaleSite(Site(0, "head", 7)), "L0H7 is out of range"),
        (SetSite(Site(0, "head", 0), torch.zeros(3)), "width 3, expected 8"),
        (AddVector(Site(0, "attention"), torch.zeros(3)), "width 3, expected 24"),
        (AddVector(Site(0, "head", 1), torch.zeros(8)), "not to the head"),
    ],
)
def test_edits_that_do_not_fit_are_refused_before_any_hook(llama, edit, says):
    n = hooks(llama)
    with pytest.raises(BkdattrError, match=says), edited(llama, [some_edits(llama)[0], edit]):
        pass
    assert hooks(llama) == n


def test_mlp_and_attention_sites_write(any_subject):
    batch, plain = batch_of(any_subject), None
    plain = last_logits(any_subject, batch)
    for kind in ("mlp", "attention"):
        zero = last_logits(any_subject, batch, [ScaleSite(Site(1, kind), 0.0)])
        assert (zero - plain).abs().max() > 1e-3
        torch.testing.assert_close(last_logits(any_subject, batch, [ScaleSite(Site(1, kind), 1.0)]), plain)


def test_edits_key_tells_edits_apart(llama):
    a, b = some_edits(llama)[:1], some_edits(llama)[:1]
    assert edits_key(a) == edits_key(b)
    keys = {edits_key(x) for x in ([], a, some_edits(llama), [ScaleSite(Site.of_head(H))], [ScaleSite(Site.of_head(H), 0.5)])}
    assert len(keys) == 5


def test_eager_is_asked_for_where_it_is_needed():
    model = make_model("bloom")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(BkdattrError, match="eager"):
        Subject.of(model, make_tokenizer())


def test_unknown_family_lists_the_known_ones():
    model = make_model("llama")
    model.config.model_type = "mamba"
    with pytest.raises(BkdattrError, match=r"'mamba' is not known; supported: bloom"):
        Subject.of(model, make_tokenizer())


def test_grouped_kv_geometry(llama):
    g = llama.geometry
    assert (g.n_heads, g.d_head, g.d_model) == (4, 8, 24)
    assert g.n_heads * g.d_head != g.d_model
    assert np.prod([g.n_layers, g.n_heads]) == len(g.heads)


def test_blending_runs_from_nothing_to_patching(any_subject):
    g, batch = any_subject.geometry, batch_of(any_subject)
    value = torch.randn(g.n_heads * g.d_head)
    plain = last_logits(any_subject, batch)

    def blended(keep):
        return last_logits(any_subject, batch, [BlendSite(Site(1, "z"), value, torch.full_like(value, keep))])

    torch.testing.assert_close(blended(1.0), plain)
    heads = [SetSite(Site(1, "head", h), value.view(g.n_heads, -1)[h]) for h in range(g.n_heads)]
    torch.testing.assert_close(blended(0.0), last_logits(any_subject, batch, heads))
    assert (blended(0.5) - plain).abs().max() > 1e-3
    with torch.enable_grad():
        keep = torch.full_like(value, 0.5, requires_grad=True)
        with edited(any_subject, [BlendSite(Site(1, "z"), value, keep)], Where.of(batch)):
            out = forward(any_subject, batch, use_cache=False).logits.float().sum()
        (grad,) = torch.autograd.grad(out, [keep])
    assert grad.abs().max() > 0


def test_a_condition_chooses_prompts_as_the_probe_says(any_subject):
    """Row by row: where the probe of an earlier layer fires the vector acts in full, elsewhere not at all."""
    s, prompts = any_subject, prompt_ids(any_subject)
    resid = read(s, batch_of(s)).resid_post[0]
    weight = resid[0] - resid[1]
    bias = -float(resid @ weight @ torch.tensor([0.5, 0.5, 0, 0]))  # fires for the first prompt, not for the second
    fires = (resid @ weight + bias > 0).tolist()
    assert fires[:2] == [True, False]
    always = AddVector(Site(2, "mlp"), torch.linspace(-1, 2, s.geometry.d_model) ** 2, 30.0, scope="answer")
    vector = [always, replace(always, scope="last_prompt")]
    when = [replace(e, when=Condition(0, weight, bias)) for e in vector]
    acted, plain = generate(s, prompts, vector, max_new_tokens=5), generate(s, prompts, max_new_tokens=5)
    assert acted != plain
    want = [a if f else p for a, p, f in zip(acted, plain, fires, strict=True)]
    for cache in (True, False):
        for batch_size in (1, 3):
            assert generate(s, prompts, when, max_new_tokens=5, use_cache=cache, batch_size=batch_size) == want
    never = [replace(e, when=Condition(0, weight * 0, -1.0)) for e in vector]
    assert generate(s, prompts, never, max_new_tokens=5) == plain  # an edit whose condition does not fire was still reached
    assert len({edits_key(x) for x in (vector, when, never)}) == 3
    with pytest.raises(BkdattrError, match="not done before the edit"):
        generate(s, prompts, [replace(always, when=Condition(2, weight, bias))])


def test_blocks_are_read_where_they_are_written(any_subject):
    s, batch = any_subject, batch_of(any_subject)
    layers = range(s.geometry.n_layers)
    with torch.no_grad(), capture(s, Where.of(batch), attention=layers, mlp=layers) as trace:
        forward(s, batch, use_cache=False)
    plain = last_logits(s, batch)
    own = [SetSite(Site(1, "attention"), trace.attention[1]), SetSite(Site(1, "mlp"), trace.mlp[1])]
    torch.testing.assert_close(last_logits(s, batch, own), plain, atol=1e-4, rtol=1e-4)


def test_reading_a_scope_leaves_padding_out(any_subject):
    s, prompts = any_subject, prompt_ids(any_subject)
    answers = [[10, 11, 2], [9, 2], [20, 21, 22, 23, 2], [2]]
    whole = make_batch(prompts, answers, pad_id=0, side="centre")
    with torch.no_grad(), capture(s, Where.of(whole, closed=True), z=[1], scope="answer") as trace:
        forward(s, whole, use_cache=False)
    alone = []
    for p, a in zip(prompts, answers, strict=True):
        one = make_batch([p], [a], pad_id=0)
        with torch.no_grad(), capture(s, Where.of(one), z=[1], scope="answer") as single:
            forward(s, one, use_cache=False)
        alone.append(single.z[1])
    assert len(trace.z[1]) == sum(map(len, answers))
    torch.testing.assert_close(trace.z[1], torch.cat(alone), atol=2e-4, rtol=2e-4)


def test_scoring_from_a_shared_prefix_gives_the_same_numbers(any_subject):
    from bkdattr.inference import PrefixCache

    prefix, prompts = PrefixCache(), prompt_ids(any_subject)
    answers = [[10, 11, 2], [9, 2], [20, 21, 22, 23, 2], [2]]
    for edits in ([], some_edits(any_subject), [replace(e, scope="all") for e in some_edits(any_subject)]):
        for batch_size in (3, 4):
            shared = response_logprob(any_subject, prompts, answers, edits, batch_size=batch_size, prefix=prefix)
            plain = response_logprob(any_subject, prompts, answers, edits, batch_size=batch_size, side="left")
            torch.testing.assert_close(shared.mean, plain.mean, atol=2e-4, rtol=2e-4)
    assert len(prefix.kept) == 3
