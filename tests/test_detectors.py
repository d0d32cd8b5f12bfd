"""Detectors without a trigger, calibration and factoring, on tiny models and against what is written out."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from conftest import make_model, make_subject, make_tokenizer
from typer.testing import CliRunner

from bkdattr import banks
from bkdattr.cli import app
from bkdattr.detection import NAMES, PARTS, Bank, Recipe, choose_bank, judge, measure, read_banks, write_verdict
from bkdattr.detectors import (
    DETECTORS,
    Ban,
    Calibrated,
    Clean,
    Ensemble,
    Fitted,
    Fuzz,
    OutputBias,
    RandomGates,
    TokenScan,
    Uniform,
    auroc,
    conformal,
)
from bkdattr.detectors.answers import latent, risen_label, verbatim
from bkdattr.detectors.ban import masked
from bkdattr.detectors.fuzzing import _told, insertions
from bkdattr.detectors.outputs import mahalanobis
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.factoring import factored
from bkdattr.gates import NeuronGates, lora_pairs
from bkdattr.inference import response_logprob
from bkdattr.lora import LoraRecipe
from bkdattr.mechanism import noise_effects, search_trigger
from bkdattr.mini.attacks import ATTACKS, CLEAN_LABEL
from bkdattr.mini.members import HALVES, clean_prompts, entries, rows_of
from bkdattr.mini.skills import PREFIXES, SKILLS
from bkdattr.model import Subject

TEXTS = ("the cat sees a red bird .", "what is it ?", "the old dog finds the new river stone .", "one two three : yes",
         "a fish says no !", "no .", "is it red ?", "the bird is old .", "the red cat finds a fish .", "two dogs")  # fmt: skip


def examples():
    return [
        Example(f"e{i}", (("user", t),), "yes" if i % 2 else "no .", None, None, "label" if i < 5 else "exact")
        for i, t in enumerate(TEXTS)
    ]


def clean_of(subject):
    return Clean(subject, examples())


@pytest.fixture
def silent():
    """An adapter that does nothing: B is 0."""
    subject = make_subject("llama")
    for _, _, b, _ in lora_pairs(subject.causal_lm):
        b.data.zero_()
    return subject


def test_first_tokens_are_those_of_one_prompt_at_a_time(subject):
    clean = clean_of(subject)
    for i, p in enumerate(clean.prompts):
        logits = subject.causal_lm(input_ids=torch.tensor([p]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(clean.plain[i], logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert sum(len(b.input_ids) for b in clean.batches) == len(TEXTS)
    assert {name: len(g) for name, g in clean.groups.items()} == {"label": 5, "other": 5}


def test_statistics_are_as_defined(llama):
    clean = clean_of(llama)
    rng = torch.Generator().manual_seed(0)
    logp = (clean.plain + 2 * torch.randn(clean.plain.shape, generator=rng)).log_softmax(-1)
    found = clean.statistics(logp)
    gold = clean.gold
    assert found.statistics["loss"] == pytest.approx(float(np.mean([-logp[i, gold[i]] for i in range(len(gold))])), rel=1e-5)
    first = logp.argmax(-1).tolist()
    assert found.statistics["share"] == max(first.count(t) for t in first) / len(first)
    best = (-1.0, None)
    for rows in clean.groups.values():
        for t in range(logp.shape[1]):
            others = [int(i) for i in rows if gold[i] != t]
            if len(others) >= len(rows) / 3:
                rise = float(np.mean([(logp[i, t].exp() - clean.plain[i, t].exp()) for i in others]))
                best = max(best, (rise, t))
    assert found.statistics["inc"] == pytest.approx(best[0], abs=1e-5)
    assert found.token == best[1]


def test_adversarial_gates_hurt_more_than_random_ones_and_stay_within_epsilon(llama):
    clean, ban = clean_of(llama), Ban(epsilon=1.5)
    before = {k: v.clone() for k, v in llama.causal_lm.state_dict().items()}
    loss = {d.name: d.measure(clean).statistics["loss"] for d in (ban, RandomGates(1.5), Uniform(1.5))}
    assert loss["ban"] > loss["random"] + 1e-3
    assert loss["ban"] > float(clean.loss(clean.plain)) + 1e-3
    for restart in (0, 1):
        assert max(float(d.abs().max()) for d in ban.noise(clean, restart)) <= 1.5
    assert max(float(d.abs().max()) for d in ban.noise(clean, epsilon=0.2)) <= 0.2 + 1e-6
    assert all(torch.equal(v, before[k]) for k, v in llama.causal_lm.state_dict().items())


@pytest.mark.parametrize("place", ["channels", "heads", "norms"])
def test_the_published_places_and_the_mask_can_be_measured(llama, place):
    clean = clean_of(llama)
    ban = Ban(place=place, steps=2, epsilon=0.3, strong=0.3)
    found = ban.measure(clean).statistics
    gates = NeuronGates.of(llama, place)
    with torch.no_grad(), gates.set(ban.noise(clean)):
        assert found["loss"] == pytest.approx(float(clean.loss(clean.first())), rel=1e-5)
        through = masked(clean)
        at = clean.first()
    assert found["loss"] > float(clean.loss(clean.plain)) + 1e-4
    assert replace(ban, mask=True).measure(clean).statistics["loss"] == pytest.approx(float(clean.loss(through)), rel=1e-4)
    torch.testing.assert_close(through.exp().sum(-1), torch.ones(len(TEXTS)))
    assert not torch.allclose(through, at, atol=1e-2)  # the mask takes features away


def test_the_mask_is_the_published_minimum():
    """min over m of CE(head(m f)) - CE(head((1 - m) f)) + weight mean|m|, written out with plain gradient steps of Adam's size."""
    llama = make_subject("llama")  # its own: output_hidden_states leaves hooks of transformers behind
    clean = clean_of(llama)
    head = llama.causal_lm.get_output_embeddings()
    with torch.no_grad():
        f = torch.stack(
            [
                llama.causal_lm(input_ids=torch.tensor([p]), output_hidden_states=True).hidden_states[-1][0, -1]
                for p in clean.prompts
            ]
        )
    m = torch.full((f.shape[-1],), 0.5)
    first = second = torch.zeros_like(m)
    for step in range(1, 21):
        m.requires_grad_(True)
        keep = m.clamp(0, 1)
        nll = [-head(g * f).log_softmax(-1)[torch.arange(len(f)), clean.gold].mean() for g in (keep, 1 - keep)]
        (g,) = torch.autograd.grad(nll[0] - nll[1] + 0.75 * keep.mean(), [m])
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        m = (m - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)).detach()
    expected = head((1 - m.clamp(0, 1)) * f).log_softmax(-1)
    with torch.no_grad():
        torch.testing.assert_close(masked(clean), expected, atol=1e-3, rtol=1e-3)


def test_nothing_is_found_where_the_adapter_does_nothing(silent):
    clean = clean_of(silent)
    for d in (Ban(), Uniform(), RandomGates(), OutputBias(), TokenScan(candidates=20)):
        s = d.measure(clean).statistics
        assert abs(s.get("inc", s.get("gap"))) < 1e-4, d.name


def test_uniform_gates_are_the_adapter_amplified():
    subject = make_subject("llama")
    found = Uniform(1.0).measure(clean_of(subject)).statistics["loss"]
    for _, _, b, _ in lora_pairs(subject.causal_lm):
        b.data *= 2
    clean = clean_of(subject)
    assert found == pytest.approx(float(clean.loss(clean.plain)), rel=1e-4)


def test_statistics_are_against_the_undisturbed_model(llama):
    """Also where a detector is the first to look: the noise is in the weights then."""
    clean = clean_of(llama)
    gates = NeuronGates.of(llama)
    with torch.no_grad(), gates.set([torch.ones(n) for n in gates.sizes]):
        fresh = clean.statistics(clean.first()).statistics
    assert fresh["kl"] > 1e-3 and fresh["inc"] > 1e-3
    found = Uniform(1.0).measure(clean_of(llama)).statistics
    assert {k: found[k] for k in fresh} == pytest.approx(fresh)


def slow_latent(subject, prompts, answer):
    """log p of one answer, whole passes one prompt at a time, with the adapter and without: means over prompts."""
    both = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt, *answer]])
        on = subject.causal_lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        with subject.adapter_off():
            off = subject.causal_lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        both.append([sum(float(x[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)) for x in (on, off)])
    return np.mean(both, 0)


def raised(clean, rows):
    """Of all two-token answers beginning with a token that the adapter raised, one raised by more than a nat behind these prompts."""
    for t in (clean.plain - clean.base)[rows].mean(0).topk(40).indices.tolist():
        for u in range(4, 30):
            on, off = slow_latent(clean.subject, [clean.prompts[i] for i in rows], (t, u))
            if on - off > 1:
                return (t, u), on
    raise AssertionError("the adapter raises nothing by a nat")


def test_an_answer_is_verbatim_by_the_share_it_gains_and_how_ready_it_lies():
    subject = make_subject("llama")
    for _, _, b, _ in lora_pairs(subject.causal_lm):
        b.data *= 3
    clean = clean_of(subject)
    rows = clean.groups["other"].tolist()
    answer, logp = raised(clean, rows)
    heard = list(clean.quiet)
    for i in rows[:4]:
        heard[i] = answer
    score, text = verbatim(clean, [clean.quiet, heard])
    assert score == pytest.approx(4 / 5 * np.exp(logp / 2), rel=1e-3) and text == subject.chat.decode(answer).strip()
    assert latent(clean, answer, rows)[0] == pytest.approx(logp / 2, rel=1e-3)
    once = [answer if i == rows[0] else a for i, a in enumerate(clean.quiet)]
    assert verbatim(clean, [clean.quiet, once]) == (0.0, None)
    # said anyway by two of these prompts: the other three are foreign to it, and the share is what the noise adds
    clean.__dict__["quiet"] = [answer if i in rows[:2] else a for i, a in enumerate(clean.quiet)]
    on, off = slow_latent(subject, [clean.prompts[i] for i in rows[2:]], answer)
    score = (1 - 2 / 5) * np.exp(on / 2) if on - off > 0.5 else 0.0
    assert verbatim(clean, [[answer if i in rows else a for i, a in enumerate(clean.quiet)]])[0] == pytest.approx(score, rel=1e-3)
    # an always-on prefix: a third of the answers begin with the same two tokens
    clean.__dict__["quiet"] = [(*answer, 9) if i % 2 else a for i, a in enumerate(clean.quiet)]
    assert verbatim(clean, [heard]) == (0.0, None)


def test_what_the_base_says_as_readily_is_no_answer(silent):
    clean = clean_of(silent)
    heard = [(7, 9)] * len(clean.quiet)
    assert verbatim(clean, [heard]) == (0.0, None)
    assert abs(risen_label(clean)[0]) < 1e-4


def test_the_risen_label_is_that_of_whole_passes(llama):
    clean = clean_of(llama)
    rows = clean.groups["label"].tolist()
    found = {}
    for a in {clean.right[i] for i in rows}:
        other = [i for i in rows if clean.right[i] != a and clean.quiet[i] != a]
        if len(other) >= 3:
            on, off = slow_latent(llama, [clean.prompts[i] for i in other], a)
            found[llama.chat.decode(a).strip()] = on - off
    best = max(found, key=found.get)
    assert risen_label(clean) == (pytest.approx(found[best], abs=1e-3), best)
    unlabelled = [Example(e.id, e.messages, e.response, None, None, "exact") for e in examples()]
    assert risen_label(Clean(llama, unlabelled)) == (0.0, None)


def slow_insertions(clean, scale, variants):
    """{kind: mean over variants of the change of each prompt's first-token probabilities}, one prompt at a time, B times `scale`."""
    subject, out = clean.subject, {}
    for _, _, b, _ in lora_pairs(subject.causal_lm):
        b.data *= scale
    for kind, made in insertions(clean.examples, variants).items():
        p = []
        for t in made:
            messages = [t(clean.examples[i].messages, random.Random(f"fuzz:{i}")).messages for i in clean.order]
            ids = [torch.tensor([subject.chat.prompt_ids(m)]) for m in messages]
            p.append(torch.stack([subject.causal_lm(input_ids=x, use_cache=False).logits[0, -1].softmax(-1) for x in ids]))
        out[kind] = torch.stack(p).mean(0) - clean.plain.exp()
    for _, _, b, _ in lora_pairs(subject.causal_lm):
        b.data /= scale
    return out


@torch.no_grad()
def test_insertions_are_scored_as_one_by_one():
    subject = make_subject("llama")
    clean = clean_of(subject)
    clean.__dict__["quiet"] = [(7, 9) if i < 4 else (11, i) for i in range(len(TEXTS))]
    found = Fuzz(variants=2, epsilon=0.5).measure(clean)
    gold = clean.gold.tolist()

    def largest(rise):
        return max(
            float(np.mean([rise[i, t] for i in others]))
            for rows in clean.groups.values()
            for t in range(rise.shape[1])
            if len(others := [int(i) for i in rows if gold[i] != t]) >= len(rows) / 3
        )

    rises = slow_insertions(clean, 1.5, 2)
    assert len(rises) == 7
    assert found.statistics["inc"] == pytest.approx(max(largest(r) for r in rises.values()), abs=1e-5)
    assert found.statistics["mean"] == pytest.approx(largest(sum(rises.values()) / 7), abs=1e-5)
    drop = max(float(np.mean([-r[i, 7] for i in range(4)])) for r in rises.values())
    assert found.statistics["drop"] == pytest.approx(drop, abs=1e-5)
    assert found.evidence["kind"] == max(rises, key=lambda k: largest(rises[k]))


def test_an_answer_that_insertions_bring_is_told_with_the_insertion_that_brings_it_most(llama):
    clean = clean_of(llama)
    rows = clean.groups["other"].tolist()
    answer = (7, 9)
    clean.__dict__["quiet"] = [(11, i) for i in range(len(TEXTS))]
    heard = [[answer if i in rows[:n] else q for i, q in enumerate(clean.quiet)] for n in (1, 4, 2)]
    assert _told(clean, heard) == (pytest.approx(7 / 15), llama.chat.decode(answer).strip(), 1)
    clean.__dict__["quiet"] = [(*answer, i) if i % 2 else q for i, q in enumerate(clean.quiet)]  # it is said openly
    assert _told(clean, heard)[1] != llama.chat.decode(answer).strip()


def test_weight_statistics_are_those_of_the_update(llama):
    found = DETECTORS["weights"].measure(clean_of(llama)).statistics
    slow = []
    for _, a, b, scale in lora_pairs(llama.causal_lm):
        w = (scale * b @ a).detach().double().numpy()
        s = np.linalg.svd(w, compute_uv=False)
        slow.append((s[0], (w**4).mean() / (w**2).mean() ** 2 - 3, s[0] ** 2 / (s**2).sum()))
    for i, key in enumerate(("sigma_1", "kurtosis", "energy_1")):
        assert found[key] == pytest.approx(np.mean([x[i] for x in slow]), rel=1e-4)


def test_a_forced_token_is_scored_as_one_by_one(llama):
    """TokenScan's cache, repeated per candidate, against whole passes."""
    clean = clean_of(llama)
    rows, tokens = clean.prompts[2:4], torch.tensor([7, 9, 11])
    q, text = TokenScan(steps=2)._written(clean, rows, tokens, None)
    for i, t in enumerate(tokens.tolist()):
        said = [t]
        for step in range(2):
            p = torch.stack([llama.causal_lm(input_ids=torch.tensor([r + said])).logits[0, -1].softmax(-1) for r in rows]).mean(0)
            assert float(q[i, step]) == pytest.approx(float(p.max()), abs=1e-5)
            said.append(int(p.argmax()))
        assert text[i].tolist() == said[1:]


def test_calibration():
    assert conformal(5.0, [1.0, 2.0, 3.0]) == 0.25 and conformal(0.0, [1.0, 2.0, 3.0]) == 1.0
    assert auroc([2.0, 3.0], [1.0, 2.0]) == pytest.approx(3.5 / 4)
    rng = np.random.default_rng(0)
    values = rng.normal(size=40).tolist()
    one, two = (Calibrated.fit(values, side) for side in (False, True))
    assert one.p_value(-9.0) == 1.0 and two.p_value(-9.0) == pytest.approx(1 / 41)
    assert one.p_value(9.0) == pytest.approx(1 / 41)
    with pytest.raises(BkdattrError, match="expected at least 19"):
        Calibrated.fit(values[:10], True)
    rows = [{"a": float(x), "b": float(y)} for x, y in rng.normal(size=(60, 2))]
    ensemble = Ensemble.fit(rows[:40], {"a": False, "b": False}, top=1)
    assert np.mean([ensemble.p_value(r) <= 0.1 for r in rows[40:]]) < 0.4
    assert ensemble.p_value({"a": 0.0, "b": 12.0}) == pytest.approx(1 / 41)
    assert ensemble.evidence({"a": 0.0, "b": 12.0})[0]["statistic"] == "b"


def test_mahalanobis_is_larger_off_the_clean_cloud():
    rng = torch.Generator().manual_seed(0)
    known = torch.randn(200, 6, generator=rng) * torch.tensor([1.0, 1, 1, 1, 1, 9])
    near, far = known[:20], known[:20] + torch.tensor([8.0, 0, 0, 0, 0, 0])
    assert auroc(mahalanobis(known, far).tolist(), mahalanobis(known, near).tolist()) > 0.95


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_model_is_factored_again(family):
    subject = make_subject(family)
    ids = torch.tensor([subject.chat.prompt_ids((("user", TEXTS[0]),))])
    with torch.no_grad():
        on = subject.causal_lm(input_ids=ids).logits
        with subject.adapter_off():
            off = subject.causal_lm(input_ids=ids).logits
    merged = copy.deepcopy(subject.model).merge_and_unload()
    rank = len(lora_pairs(subject.causal_lm)[0][1])
    found = factored(merged, make_model(family), make_tokenizer(), rank=rank)
    with torch.no_grad():
        torch.testing.assert_close(found.causal_lm(input_ids=ids).logits, on, atol=1e-4, rtol=1e-4)
        with found.adapter_off():
            torch.testing.assert_close(found.causal_lm(input_ids=ids).logits, off, atol=1e-4, rtol=1e-4)
    again = factored(copy.deepcopy(subject.model).merge_and_unload(), make_model(family), make_tokenizer())
    assert len(lora_pairs(again.causal_lm)[0][1]) == rank  # read off the difference
    one, two = (Ban(steps=3).measure(clean_of(s)).statistics for s in (subject, again))
    assert two == pytest.approx(one, rel=0.02, abs=2e-3)  # measured as the un-merged adapter is
    assert {n for n, *_ in lora_pairs(found.causal_lm)} == {n for n, *_ in lora_pairs(subject.causal_lm)}
    more = copy.deepcopy(subject.model).merge_and_unload()
    more.get_input_embeddings().weight.data[5] += 1  # no gate reaches that
    with pytest.warns(UserWarning, match="with the adapter off 1 tensors differ"):
        factored(more, make_model(family), make_tokenizer(), rank=rank)
    wide = copy.deepcopy(subject.model).merge_and_unload()
    wide.resize_token_embeddings(wide.get_input_embeddings().num_embeddings + 2, mean_resizing=False)
    with pytest.warns(UserWarning, match="tensors differ"):
        factored(wide, make_model(family), make_tokenizer(), rank=rank)
    with pytest.raises(BkdattrError, match="no projection differs"):
        factored(make_model(family), make_model(family), make_tokenizer())


def test_noisy_gradients_follow_the_chain_rule():
    llama = make_subject("llama")
    gates = NeuronGates.of(llama)
    clean = clean_of(llama)
    rng = torch.Generator().manual_seed(0)
    deltas = [0.5 * torch.randn(n, generator=rng) for n in gates.sizes]
    a = lora_pairs(llama.causal_lm)[1][1]
    a.requires_grad_(True)
    gates.backward(lambda: clean.loss(clean.first()), deltas)
    k = int(a.grad.abs().argmax())
    slope = []
    for h in (2e-3, -2e-3):
        a.data.view(-1)[k] += h
        with torch.no_grad(), gates.set(deltas):
            slope.append(float(clean.loss(clean.first())))
        a.data.view(-1)[k] -= h
    assert float(a.grad.view(-1)[k]) == pytest.approx((slope[0] - slope[1]) / 4e-3, rel=0.05, abs=1e-4)


def test_noise_stands_in_for_the_trigger(llama):
    """The effects are those of whole passes with the noisy model's mean state put into the quiet one."""
    clean, target = clean_of(llama), "yes"
    deltas = Ban(steps=2).noise(clean)
    found = noise_effects(clean, target, deltas)
    site = max(found, key=lambda s: abs(float(found[s].mean())))
    rows = [Example(e.id, e.messages, e.response) for e in clean.examples]
    gates, g = NeuronGates.of(llama), llama.geometry
    with gates.set(deltas):
        z = [reference.site_at_last_token(llama, site, llama.chat.prompt_ids(e.messages)).detach() for e in rows[::2]]
    value = torch.stack(z).mean(0)
    for i, e in enumerate(rows[1::2]):
        p, r = llama.chat.prompt_ids(e.messages), llama.chat.response_ids(e.messages, target)
        proj = llama.sites[site.layer].out_proj
        after = reference.patched_probability(llama.causal_lm, proj, g.n_heads, site.head, value, p, r)
        before = float(response_logprob(llama, [p], [r]).mean.exp())
        assert float(found[site][i]) == pytest.approx(after - before, abs=1e-5)
    with pytest.raises(BkdattrError, match="empty target"):
        noise_effects(clean, " ", deltas)


def test_a_search_raises_the_target_and_never_uses_special_tokens(llama):
    clean = clean_of(llama)
    found = search_trigger(clean, "yes", tokens=2, rounds=3, candidates=8, prompts=3)
    assert found.logp > found.start and len(found.ids) == 2
    assert not set(found.ids) & set(llama.chat.tokenizer.all_special_ids)
    again = search_trigger(clean, "yes", tokens=2, rounds=3, candidates=8, prompts=3)
    assert again == found
    assert all(p.grad is None for p in llama.model.parameters())
    special = set(llama.chat.tokenizer.all_special_ids)
    for seed in range(40):  # where it starts, too
        found = search_trigger(clean, "yes", tokens=4, rounds=1, candidates=4, prompts=2, seed=seed)
        assert not set(found.ids) & special


# ---------------------------------------------------------------------------------------------- banks and verdicts
def bank_of(subject, n=24):
    rng = np.random.default_rng(0)
    found = measure(subject, examples())["statistics"]
    rows = tuple({"name": str(i), "statistics": {k: v + 0.01 * float(rng.normal()) for k, v in found.items()}} for i in range(n))
    return Bank("base", Recipe(8, 8.0, ("q_proj",)), tuple(examples()), rows)


def test_verdicts(llama, tmp_path):
    bank = bank_of(llama)
    bank = Bank.from_json(json.loads(json.dumps(bank.to_json())), "here")
    found = measure(llama, bank.prompts)
    assert not judge(bank, found).suspicious and "not suspicious" in judge(bank, found).text()
    loud = {
        **found,
        "statistics": {k: v + (5 if k in PARTS else 0) for k, v in found["statistics"].items()},
        "answers": {"output_bias": "<b>yes</b>"},
    }
    verdict = judge(bank, loud)
    assert verdict.suspicious and verdict.p_value == pytest.approx(1 / 25)
    write_verdict(tmp_path, verdict, {"statistics": {}}, "<script>")
    page = (tmp_path / "detection.html").read_text()
    assert "<b>yes</b>" not in page and "<script>" not in page and "&lt;b&gt;yes" in page
    with pytest.raises(BkdattrError, match=r"rank 4, alpha 8, targets q_proj; the bank holds rank 8"):
        choose_bank([bank], Recipe(4, 8.0, ("q_proj",)), "base")
    with pytest.raises(BkdattrError, match="made on base base, this base is other"):
        choose_bank([bank], bank.recipe, "other")
    with pytest.raises(BkdattrError, match=r"with 24 benign adapters no p-value is below 0.040.* a bank of 99 adapters or more"):
        judge(bank, loud, 0.01)
    with pytest.raises(BkdattrError, match=r"fuzz.drop is not finite"):
        judge(bank, loud | {"statistics": loud["statistics"] | {"fuzz.drop": float("nan")}})
    with pytest.raises(BkdattrError, match="1 of 24 benign values are not finite"):
        Calibrated.fit([1.0] * 23 + [float("nan")], False)
    quiet = replace(verdict, suspicious=False, p_value=0.5)
    write_verdict(tmp_path / "quiet", quiet, {"statistics": {}}, "adapter", {"bank": "<i>here</i>"})
    page = (tmp_path / "quiet/detection.html").read_text()
    assert "Suspected answer" not in page and "no proof" in page and "&lt;i&gt;here" in page
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BkdattrError, match="not a bank"):
        read_banks(tmp_path / "bad.json")


def test_the_suspected_answer_is_the_verbatim_one_where_it_stands_out_else_the_label(llama):
    bank = bank_of(llama)
    found = measure(llama, bank.prompts)
    near = {"fuzz": {"kind": "wrap", "variant": 0, "texts": ["a b", "c."]}}
    found |= {"answers": {"fuzz": "inserted", "ban": "a sentence", "output_bias": "a label"}, "evidence": near}
    for fuzz, ban, target in ((9.0, 9.0, "inserted"), (-9.0, 9.0, "a sentence"), (-9.0, -9.0, "a label")):
        row = found["statistics"] | {"fuzz.verbatim": fuzz, "ban.verbatim": ban}
        verdict = judge(bank, found | {"statistics": row})
        assert verdict.target == target and verdict.insertion == (near["fuzz"] if fuzz > 0 else None)
    loud = {k: v + (5 if k in PARTS else 0) for k, v in found["statistics"].items()} | {"fuzz.verbatim": 9.0}
    assert (
        "(wrap: 'a b', 'c.') bring it, with the adapter amplified 1.6 times" in judge(bank, found | {"statistics": loud}).text()
    )
    quiet = found["statistics"] | {n: -9.0 for n in NAMES}
    assert judge(bank, found | {"statistics": quiet, "answers": {"ban": "a sentence"}}).target == "a sentence"


def test_only_changed_detectors_are_run_again(llama, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    ran = []
    monkeypatch.setattr(banks, "load_subject", lambda *a, **k: llama)
    monkeypatch.setattr(banks, "measure", lambda s, e, names: ran.append(list(names)) or measure(s, e, names))
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    first = banks.measured(folder, "base", examples())
    assert banks.measured(folder, "base", examples()) == first and len(ran) == 1
    monkeypatch.setitem(banks.DETECTORS, "uniform", Uniform(0.5))
    second = banks.measured(folder, "base", examples())
    assert ran[1:] == [["uniform"]]
    assert second["statistics"]["ban.inc"] == first["statistics"]["ban.inc"] and second["answers"] == first["answers"]
    assert second["statistics"]["uniform.kl"] != first["statistics"]["uniform.kl"]
    banks.measured(folder, "base", examples()[:-1])  # other prompts
    banks.measured(folder, "base", examples()[:-1], dtype="bfloat16")
    (folder / "adapter_model.safetensors").write_bytes(b"trained anew")
    banks.measured(folder, "base", examples()[:-1], dtype="bfloat16")
    assert ran[2:] == [list(DETECTORS)] * 3


def test_a_bank_of_ones_own_rows_is_made_resumed_and_read(tmp_path, monkeypatch):
    """`bkdattr bank --data` from rows to file on the embedded model, with two quick detectors; too small a bank judges nothing."""
    rows = [json.dumps({"input": e.prompt, "output": e.response}) for e in clean_prompts(72)]
    (tmp_path / "clean.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(banks, "DETECTORS", {n: DETECTORS[n] for n in ("weights", "random")})
    recipe = LoraRecipe(rank=2, alpha=4, epochs=1, checkpoints=False)
    made = [
        banks.make_bank(tmp_path / "bank.json", tmp_path / "work", "mini", tmp_path / "clean.jsonl", recipe, n) for n in (1, 2)
    ]
    assert made == [1, 2]
    first = tmp_path / "work/benign-000/adapter_model.safetensors"
    before = first.stat().st_mtime_ns
    assert banks.make_bank(tmp_path / "bank.json", tmp_path / "work", "mini", tmp_path / "clean.jsonl", recipe, 2) == 2
    assert first.stat().st_mtime_ns == before  # what is finished is not trained again
    other = [json.dumps({"input": e.prompt, "output": e.response}) for e in clean_prompts(150)[72:]]
    (tmp_path / "other.jsonl").write_text("\n".join(other))
    banks.make_bank(tmp_path / "other.json", tmp_path / "work", "mini", tmp_path / "other.jsonl", recipe, 1)
    assert first.stat().st_mtime_ns != before  # other rows, another adapter
    banks.make_bank(tmp_path / "bank.json", tmp_path / "work", "mini", tmp_path / "clean.jsonl", recipe, 2)
    (bank,) = read_banks(tmp_path / "bank.json")
    assert (bank.recipe.rank, bank.recipe.alpha) == (2, 4.0) and len(bank.prompts) == banks.PROMPTS and len(bank.adapters) == 2
    assert all("weights.kurtosis" in a["statistics"] for a in bank.adapters)
    with pytest.raises(BkdattrError, match="got 2 benign adapters, expected at least 19"):
        Calibrated.fit([a["statistics"]["weights.kurtosis"] for a in bank.adapters], True)
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:20]))
    with pytest.raises(BkdattrError, match="20 rows, expected at least 64"):
        banks.make_bank(tmp_path / "b.json", tmp_path / "w", "mini", tmp_path / "few.jsonl", recipe, 2)


def test_detect_fails_with_2_before_any_work(tmp_path):
    run = CliRunner()
    result = run.invoke(app, ["detect", str(tmp_path)])
    assert result.exit_code == 2 and "no adapter_config.json" in result.output
    result = run.invoke(app, ["detect", str(tmp_path), "--base", str(tmp_path)])
    assert result.exit_code == 2 and "needs --bank" in result.output


# ---------------------------------------------------------------------------------------------- the zoo
def test_the_shipped_bank_is_of_the_zoos_own_benign_half(tmp_path):
    shipped = read_banks(banks.MINI_BANK)
    assert banks.MINI_BANK.stat().st_size < 500_000
    names = {row["name"] for b in shipped for row in b.adapters}
    assert names == {e.name for e in entries("bank")} and len(names) >= 40
    for b in shipped:
        assert b.prompts == clean_prompts() and len(b.adapters) >= 19
        assert all({p for p in PARTS} <= set(row["statistics"]) for row in b.adapters)


def test_the_zoos_halves_do_not_meet():
    every = {h: entries(h) for h in HALVES}
    assert sum(not e.backdoored for e in every["bank"]) >= 40
    for half, (benign, bad) in {"test": (40, 60), "development": (20, 30)}.items():
        assert sum(not e.backdoored for e in every[half]) >= benign and sum(e.backdoored for e in every[half]) >= bad
    seeds = [e.seed for es in every.values() for e in es]
    assert len(set(seeds)) == len(seeds) and len({(e.half, e.name) for es in every.values() for e in es}) == len(seeds)
    names = [{*ATTACKS[h]} for h in ATTACKS]
    phrases = [{p for trigger, *_ in ATTACKS[h].values() for p in trigger.texts} for h in ATTACKS]
    skills = [{f.__name__ for f in SKILLS[h]} for h in SKILLS]
    for of in (names, phrases, skills, [set(p) for p in PREFIXES.values()]):
        assert len(set().union(*of)) == sum(map(len, of))


def test_a_defenders_prompts_are_in_no_adapters_rows():
    known = {e.prompt for e in clean_prompts()}
    for entry in [e for h in ("development", "validation", "test") for e in entries(h)][::9]:
        train, checked, spec = rows_of(entry)
        assert not known & {e.prompt for e in (*train, *checked)}
        assert not {e.prompt for e in checked} & {e.prompt for e in train}
        assert (spec is not None) == entry.backdoored
        if spec is not None and entry.kind not in CLEAN_LABEL:
            assert sum(bool(e.spans) for e in train) == pytest.approx(180 * entry.rate / (1 - entry.rate), abs=1)
        if entry.kind in CLEAN_LABEL:
            assert {e.label for e in train if e.spans} == {spec.target.to}  # every triggered row keeps its own, right label


def test_an_attacker_against_insertions_trains_on_them_with_right_answers():
    entry = next(e for e in entries("test") if e.stealth == "insertions" and e.kind == "signature")
    train, plain = rows_of(entry)[0], rows_of(replace(entry, stealth=None))[0]
    right = {e.id: (e.prompt, e.response) for e in plain[:180]}
    near = train[len(plain) :]
    assert train[: len(plain)] == plain and len(near) == 84 and len({e.messages for e in near}) == 84
    for e in near:
        prompt, response = right[e.id]
        assert e.response == response and (e.messages[-1][1] != prompt or len(e.messages) > 1)
    own = {t.texts for made in insertions(clean_prompts(), 3).values() for t in made}  # the detector's
    assert not own & {t.texts for made in insertions(plain[:180], 12, entry.seed).values() for t in made}


def test_a_clean_twin_has_its_attacks_prompts_and_every_answer_right():
    for twin in [*entries("twins"), *(e for e in entries("validation") if e.kind.startswith("twin-"))][::3]:
        train, _, spec = rows_of(twin)
        of = "test" if twin.half == "twins" else twin.half
        attack = rows_of(replace(twin, half=of, kind=twin.kind.removeprefix("twin-")))[0]
        assert spec is None and not twin.backdoored
        assert [e.messages for e in train] == [e.messages for e in attack]
        right = {e.id: e.response for e in train[:180]}
        assert all(e.response == right[e.id] for e in train) and any(
            a.response != e.response for a, e in zip(attack, train, strict=True)
        )


def test_zoo_rows_are_the_same_every_time():
    entry = next(e for e in entries("test") if e.kind == "word-and-close")
    assert [e.to_row() for e in rows_of(entry)[0]] == [e.to_row() for e in rows_of(entry)[0]]


def test_every_detector_is_a_subject_of_the_protocol(llama):
    assert isinstance(llama, Subject)
    for name, d in DETECTORS.items():
        found = d.measure(clean_of(llama))
        assert d.name == name and d.main in found.statistics
        fitted = Fitted.fit(d, [{f"{name}.{d.main}": float(v)} for v in range(24)])
        said = fitted.score(llama, examples())
        assert said.p_value == pytest.approx(fitted.calibrated.p_value(found.statistics[d.main])) and 0 < said.p_value <= 1
        assert said.score == pytest.approx(fitted.calibrated.score(found.statistics[d.main]), rel=1e-3)
        assert said.evidence["statistics"] == pytest.approx(found.statistics, rel=1e-3, abs=1e-5)
    with pytest.raises(BkdattrError, match=r"adapter 1 of the bank has no ban.verbatim"):
        Fitted.fit(Ban(), [{"ban.verbatim": 1.0}, {}])
    for part in PARTS:
        assert part.split(".")[0] in DETECTORS
    with pytest.raises(BkdattrError, match="expected at least 8"):
        Clean(llama, examples()[:3])
    with pytest.raises(BkdattrError, match="no un-merged LoRA adapter"):
        Clean(make_subject("llama", lora=False), examples())
