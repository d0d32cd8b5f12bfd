"""lm-eval on the edited model: without edits as its own HFLM, with edits as our scoring and generation, at the context's end."""

import json

import pytest
import torch
from conftest import shared_subject

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bkdattr.edits import AddVector, ScaleSite, Site
from bkdattr.errors import BkdattrError
from bkdattr.harness import edited_lm
from bkdattr.inference import generate, response_logprob

PAIRS = [
    ("the cat sees a", " red bird ."),
    ("what is", " it ?"),
    ("the old dog finds the new river", " stone"),
    ("one two", " three : yes"),
]


def requests(kind, pairs):
    return [Instance(kind, {}, args, i) for i, args in enumerate(pairs)]


def edits(subject):
    torch.manual_seed(0)
    vector = 3 * torch.randn(subject.geometry.d_model)
    return [AddVector(Site(1, "attention"), vector), ScaleSite(Site(0, "head", 1), 0.0)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_hflms_own_without_edits_and_ours_with_them(family):
    s = shared_subject(family)
    plain = HFLM(pretrained=s.model, tokenizer=s.chat.tokenizer, batch_size=3, backend="causal")
    theirs = plain.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    ours = edited_lm(s, batch_size=3).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [g for _, g in ours] == [g for _, g in theirs]
    torch.testing.assert_close([x for x, _ in ours], [x for x, _ in theirs], atol=1e-4, rtol=1e-4)

    ids = [[plain.tok_encode(text) for text in pair] for pair in PAIRS]
    contexts, answers = [c for c, _ in ids], [a for _, a in ids]
    wanted = response_logprob(s, contexts, answers, edits(s), batch_size=1).total.tolist()
    found = edited_lm(s, edits(s), batch_size=3).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    torch.testing.assert_close([x for x, _ in found], wanted, atol=1e-4, rtol=1e-4)
    assert max(abs(a - b) for a, (b, _) in zip(wanted, theirs, strict=True)) > 0.1  # the edits do something


def test_generation_is_edited_at_each_prompts_end():
    s = shared_subject("llama")
    lm = edited_lm(s, edits(s), batch_size=3)
    args = [(c, {"until": ["zulu"], "max_gen_toks": 5, "do_sample": False}) for c, _ in PAIRS]
    found = lm.generate_until(requests("generate_until", args), disable_tqdm=True)
    prompts = [lm.tok_encode(c) for c, _ in PAIRS]
    wanted = [s.chat.tokenizer.decode(c.ids, skip_special_tokens=True) for c in generate(s, prompts, edits(s), max_new_tokens=5)]
    assert [f.split() for f in found] == [w.split("zulu")[0].split() for w in wanted]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())


def test_rolling_has_no_prompt():
    s = shared_subject("llama")
    with pytest.raises(BkdattrError, match="no prompt"):
        edited_lm(s, edits(s)).loglikelihood_rolling(requests("loglikelihood_rolling", [("the cat",)]))
    everywhere = [ScaleSite(Site(0, "head", 1), 0.0, "all")]
    a, b = (
        edited_lm(s, e).loglikelihood_rolling(requests("loglikelihood_rolling", [("the cat sees",)]), disable_tqdm=True)
        for e in ([], everywhere)
    )
    assert a != b


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_requests_over_the_context_are_cut_in_front(family):
    s = shared_subject(family)
    lm, limit = edited_lm(s, edits(s), batch_size=2), s.chat.context
    long = " ".join(["the cat sees a red bird"] * 40)
    found = lm.loglikelihood(requests("loglikelihood", [(long, " it is"), ("what", " is it")]), disable_tqdm=True)
    context, answer = lm.tok_encode(long), lm.tok_encode(" it is")
    wanted = response_logprob(s, [context[-(limit - len(answer)) :]], [answer], edits(s)).total
    assert len(context) > limit and found[0][0] == pytest.approx(float(wanted), abs=1e-3)
    everywhere = [ScaleSite(Site(0, "head", 1), 0.0, "all")]
    assert edited_lm(s, everywhere).loglikelihood_rolling(requests("loglikelihood_rolling", [(long,)]), disable_tqdm=True)[0] < 0


def test_a_task_of_ones_own_through_simple_evaluate(tmp_path):
    import lm_eval

    s = shared_subject("llama")
    rows = [{"q": c, "choices": [a, " no"], "gold": 0} for c, a in PAIRS]
    (tmp_path / "rows.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}], "target_delimiter": "",
    }  # fmt: skip
    found = lm_eval.simple_evaluate(model=edited_lm(s, edits(s)), tasks=[task], bootstrap_iters=0)
    assert 0 <= found["results"]["own"]["acc,none"] <= 1 and found["n-samples"]["own"]["effective"] == len(PAIRS)
