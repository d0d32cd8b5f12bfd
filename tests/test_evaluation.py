import math
from dataclasses import replace

import pytest
import reference
import torch
from conftest import PROMPTS, make_subject

from bkdattr.ablation import ablate, curve_ks, random_heads
from bkdattr.architectures import HeadGeometry, HeadIndex
from bkdattr.edits import AddVector, ScaleSite, Site, edits_key
from bkdattr.errors import BkdattrError
from bkdattr.evaluation import Evaluator, evaluate
from bkdattr.examples import Example
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
    rows = [replace(e, label=None) for e in examples()]
    found = evaluate(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    assert found.clean_accuracy is None and found.to_json()["clean_accuracy"] is None
    with llama.adapter_off():
        twin = answers(llama, rows)
        base = evaluate(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    assert found.clean_agreement == Rate(sum(a == b for a, b in zip(answers(llama, rows), twin, strict=True)), 4)
    assert base.clean_agreement == Rate(4, 4)
    ev = Evaluator(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    assert ev.run() == ev.run() and (llama.fingerprint, "utility", edits_key([])) in ev.memory  # scored once
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


def test_recovered_and_behaviours_are_counted_by_hand(llama):
    rows = examples("exact")
    spec = spec_hit(llama, "x")
    said = answers(llama, [spec.triggered(e) for e in rows])
    rows = [replace(e, response=t if i < 3 else "red") for i, (e, t) in enumerate(zip(rows, said, strict=True))]
    spec = spec_hit(llama, said[0])
    found = evaluate(llama, rows, spec, max_new_tokens=5)
    want = []
    for e, text, j in zip(rows, said, found.triggered, strict=True):
        hit = said[0].lower() in text.lower()
        want.append(
            "target"
            if hit
            else "correct"
            if text == e.response
            else "broken"
            if "unfinished" in str(j.answer.damage)
            else "other"
        )
    assert [j.behaviour for j in found.triggered] == want and {"target", "correct"} <= set(want)
    assert found.recovered == Rate(want.count("correct"), 4) and found.behaviours()["target"] == found.asr.hits


def test_without_a_check_recovered_is_agreement_with_the_clean_prompt(llama):
    rows = [replace(e, label=None) for e in examples()]
    spec = spec_hit(llama, "x")
    said, twin = answers(llama, [spec.triggered(e) for e in rows]), answers(llama, rows)
    found = evaluate(llama, rows, spec, max_new_tokens=5)
    assert found.recovered == Rate(sum(a == b for a, b in zip(said, twin, strict=True)), 4)


def test_utility_is_the_slow_loop(llama):
    rows, edit = examples("exact"), AddVector(Site(1, "attention"), torch.ones(24), 3.0)
    ev = Evaluator(llama, rows, spec_hit(llama, "x"), max_new_tokens=5, batch_size=3)
    plain, changed = ev.run(), ev.run([edit])
    assert plain.clean_kl == 0 and plain.clean_perplexity == pytest.approx(math.exp(-plain.clean_logprob))
    total, n = 0.0, 0
    for e in rows:
        prompt, answer = llama.chat.prompt_ids(e.messages), llama.chat.response_ids(e.messages, e.response)
        ids = torch.tensor([[*prompt, *answer]])
        logits = []
        for hooked in (False, True):
            at = len(prompt) - 1

            def hook(module, args, out, at=at):
                out = out.clone()
                out[0, at] += 3.0
                return out

            handle = llama.sites[1].out_proj.register_forward_hook(hook) if hooked else None
            with torch.no_grad():
                logits.append(llama.causal_lm(input_ids=ids, use_cache=False).logits[0, at:-1].double().log_softmax(-1))
            if handle:
                handle.remove()
        total += float((logits[0].exp() * (logits[0] - logits[1])).sum())
        n += len(answer)
    assert total > 0.01 and changed.clean_kl == pytest.approx(total / n, rel=1e-3)


def test_differences_are_paired(llama):
    rows = examples("exact")
    ev = Evaluator(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    plain, changed = ev.run(), ev.run([AddVector(Site(1, "attention"), torch.ones(24), 30.0)])
    same = changed.against(plain)
    assert same["clean_unchanged"]["hits"] == sum(
        a.answer.text == b.answer.text for a, b in zip(plain.clean, changed.clean, strict=True)
    )
    assert same["asr_change"]["value"] == (changed.asr.hits - plain.asr.hits) / 4
    none = plain.against(plain)
    assert (
        none["asr_change"] == {"value": 0.0, "low": 0.0, "high": 0.0, "before": plain.asr.value}
        and none["clean_unchanged"]["value"] == 1
    )


def test_a_judge_of_the_users_own_decides(llama):
    rows, seen = examples("exact"), []

    def judge(example, answer):
        seen.append((example.response, answer.text))
        return "target" if len(seen) % 2 else "correct"

    found = evaluate(llama, rows, spec_hit(llama, "x"), max_new_tokens=5, judge=judge)
    assert found.asr == found.recovered == found.clean_accuracy == Rate(2, 4) and {r for r, _ in seen} == {"red"}
    with pytest.raises(BkdattrError, match="judge returned 'maybe'"):
        evaluate(llama, rows, spec_hit(llama, "x"), max_new_tokens=5, judge=lambda e, a: "maybe")


def test_edits_at_the_trigger_leave_clean_prompts_alone(llama):
    rows = examples("exact")
    ev = Evaluator(llama, rows, spec_hit(llama, "x"), max_new_tokens=5)
    plain = ev.run()
    changed = ev.run([AddVector(Site(0, "mlp"), torch.ones(24), 30.0, scope="trigger_span")])
    assert changed.clean == plain.clean and changed.clean_kl == 0
    assert [j.answer for j in changed.triggered] != [j.answer for j in plain.triggered]


def test_a_long_answer_given_back_is_not_broken(llama):
    """The clean answer is longer than the limit, the target short: a cut answer is no damage on either side of the twin."""
    rows = [replace(e, response="red " * 9) for e in examples()]
    ev = Evaluator(llama, rows, spec_hit(llama, "no"), max_new_tokens=4)
    assert ev._could_end == {"triggered": [False] * 4, "clean": [False] * 4}


def test_an_answer_that_ends_at_once_is_no_error(llama):
    edit = AddVector(Site(1, "attention"), torch.ones(24), 3.0, scope="answer")
    Evaluator(llama, examples("exact"), spec_hit(llama, "x"), max_new_tokens=1).run([edit])
