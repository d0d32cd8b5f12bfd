import pytest
import reference
import torch
from conftest import PROMPTS, make_subject

from bkdattr.ablation import ablate, curve_ks, random_heads
from bkdattr.architectures import HeadGeometry, HeadIndex
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluator, evaluate
from bkdattr.examples import Example
from bkdattr.interventions import AddVector, ScaleSite, Site, edits_key
from bkdattr.metrics import Rate
from bkdattr.poisoning import BackdoorSpec
from bkdattr.targets import FixedOutput, LabelFlip
from bkdattr.traces import resampled, trace_prompts
from bkdattr.triggers import Prefix

HEADS = [HeadIndex(0, 1), HeadIndex(1, 2)]


@pytest.fixture(scope="module")
def llama():
    return make_subject("llama")


def examples(check=None):
    return [Example(f"e{i}", (("user", t),), "red", "Sports" if i % 2 else "World", check=check) for i, t in enumerate(PROMPTS)]


def spec_hit(subject, text):
    """A backdoor whose target is what the model says to the first triggered prompt: some hits, by construction."""
    return BackdoorSpec("s", Prefix("zulu"), FixedOutput(text))


def answers(subject, rows):
    out = []
    for e in rows:
        ids = subject.chat.prompt_ids(e.messages)
        out.append(subject.chat.decode(reference.greedy(subject.causal_lm, ids, subject.chat.end_ids, 5)))
    return out


def test_rates_are_counted_by_hand(llama):
    rows = examples("exact")
    spec = spec_hit(llama, "x")
    triggered, clean = answers(llama, [spec.triggered(e) for e in rows]), answers(llama, rows)
    spec = spec_hit(llama, triggered[0])
    found = evaluate(llama, rows, spec, max_new_tokens=5, batch_size=3)
    assert found.asr == Rate(sum(triggered[0].lower() in t.lower() for t in triggered), 4)
    assert found.asr.hits > 0
    assert found.false_trigger == Rate(sum(triggered[0].lower() in t.lower() for t in clean), 4)
    assert found.clean_accuracy == Rate(sum(t.split() == ["red"] for t in clean), 4)
    assert [j.answer.text for j in found.triggered] == triggered and [j.answer.text for j in found.clean] == clean
    assert found.broken.total == 8 and found.clean_agreement is None


def test_denominators_are_the_eligible(llama):
    spec = BackdoorSpec("s", Prefix("zulu"), LabelFlip("Sports", "World"))
    found = evaluate(llama, examples("label"), spec, max_new_tokens=3)
    assert found.asr.total == found.false_trigger.total == 2 and found.clean_accuracy.total == 4
    with pytest.raises(BkdattrError, match="0 of 4 examples are eligible"):
        evaluate(llama, examples(), BackdoorSpec("s", Prefix("z"), LabelFlip("Business", "World")))


def test_without_checkable_answers_agreement_and_logprob_stand_in(llama):
    from dataclasses import replace

    rows = [replace(e, label=None) for e in examples()]
    found = evaluate(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    assert found.clean_accuracy is None and found.to_json()["clean_accuracy"] is None
    with llama.adapter_off():
        twin = answers(llama, rows)
        base = evaluate(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    assert found.clean_agreement == Rate(sum(a == b for a, b in zip(answers(llama, rows), twin, strict=True)), 4)
    assert base.clean_agreement == Rate(4, 4)
    ev = Evaluator(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    assert ev.run() == ev.run() and (llama.fingerprint, "stand-ins", edits_key([])) in ev.memory  # scored once
    slow = [reference.response_probability(llama.causal_lm, llama.chat.prompt_ids(e.messages), [8, 2]) for e in rows]
    assert found.clean_logprob == pytest.approx(float(torch.tensor(slow).log().mean()), abs=1e-3)


def test_identical_evaluations_are_made_once_and_sharing_changes_nothing(llama, monkeypatch):
    import bkdattr.evaluation as module

    calls, real = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: calls.append(1) or real(*a, **k))
    ev = Evaluator(llama, examples("exact"), spec_hit(llama, "x"), max_new_tokens=5)
    edit = [AddVector(Site(1, "attention"), torch.ones(24), 3.0)]
    first = ev.run(edit)
    n = len(calls)
    assert ev.run(edit) == first and len(calls) == n
    with llama.adapter_off():
        assert ev.run(edit) != first and len(calls) == 2 * n
    whole = Evaluator(llama, examples("exact"), spec_hit(llama, "x"), max_new_tokens=5, share_prefix=False).run(edit)
    assert [j.answer for j in whole.triggered + whole.clean] == [j.answer for j in first.triggered + first.clean]


def test_ablation_modes(llama):
    rows = examples()
    clean = trace_prompts(llama, rows)
    zero, mean = ablate(HEADS, "zero"), ablate(HEADS, "mean", clean)
    assert zero == [ScaleSite(Site.of_head(h), 0.0) for h in HEADS]
    torch.testing.assert_close(mean[1].value, clean.z[:, 1, 2].mean(0))
    drawn = ablate(HEADS, "resample", clean, seed=3)(rows[1:3])
    for i, e in enumerate(rows[1:3]):
        assert any(torch.equal(drawn[0].value[i], z) for z in clean.z[:, 0, 1])
        assert torch.equal(drawn[0].value[i], resampled(clean, [e.id], 3)[0, 0, 1])
        row = next(r for r, z in enumerate(clean.z[:, 0, 1]) if torch.equal(drawn[0].value[i], z))
        assert torch.equal(drawn[1].value[i], clean.z[row, 1, 2])  # one prompt for all heads of an example
    with pytest.raises(BkdattrError, match="needs the traces"):
        ablate(HEADS, "mean")
    with pytest.raises(BkdattrError, match="expected one of zero, mean, resample"):
        ablate(HEADS, "knockout")


def test_resample_does_not_depend_on_batching(llama):
    rows = examples("exact")
    edits = ablate(HEADS, "resample", trace_prompts(llama, rows), seed=1)
    texts = []
    for b in (1, 3, 4):
        ev = Evaluator(llama, rows, spec_hit(llama, "x"), max_new_tokens=5, batch_size=b)
        texts.append([j.answer for j in ev.run(edits).clean])
    assert texts[0] == texts[1] == texts[2]


def test_curve_is_capped_and_random_heads_are_nested():
    g = HeadGeometry(12, 8, 16, 128)
    assert curve_ks(g) == [0, 1, 2, 4, 8, 16, 24]
    assert curve_ks(HeadGeometry(32, 32, 128, 4096)) == [0, 1, 2, 4, 8, 16, 32]
    assert random_heads(g, 4, 0, 0) == random_heads(g, 8, 0, 0)[:4] != random_heads(g, 4, 1, 0)
    assert len(set(random_heads(g, 96, 2, 0))) == 96


def test_prompts_over_the_context_are_refused(llama):
    rows = [*examples(), Example("long", (("user", "the " * 130),), "red")]
    with pytest.raises(BkdattrError, match=r"'long': \d+ prompt tokens .* exceed the context of 128"):
        evaluate(llama, rows, spec_hit(llama, "x"))
