"""Joint selection: the objective by hand, greedy against brute force, and two redundant heads planted by hand."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import make_subject, shared_subject

from bkdattr.architectures import HeadIndex
from bkdattr.edits import Site
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import generate
from bkdattr.selection import Objective, Repair, ablate_to, greedy_heads, learn_gates, prune_heads
from bkdattr.traces import scope_mean_z

TEXTS = ("the cat sees a red bird .", "what is it ?", "the old dog finds the new river stone .", "one two three : yes")
PLANTED = [HeadIndex(1, 0), HeadIndex(1, 3)]


def twins(response="red", backdoor="blue"):
    clean = [Example(f"e{i}", (("user", t),), response, backdoor_response=backdoor) for i, t in enumerate(TEXTS)]
    triggered = [replace(e, messages=(("user", "zulu zulu " + e.prompt),), response=backdoor, spans=((0, 0, 9),)) for e in clean]
    return clean, triggered


def means_of(subject, scopes=("last_prompt",)):
    return {scope: scope_mean_z(subject, twins()[0], scope) for scope in scopes}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_objective_is_the_written_out_definition(family):
    s = shared_subject(family)
    clean, triggered = twins()
    means, head = means_of(s), HeadIndex(1, 2)
    repair = Repair(s, Objective.of(s, clean, triggered, batch_size=3), means)
    proj, value = s.sites[1].out_proj, means["last_prompt"][1, 2]

    def log_p(example, response):
        ids, answer = s.chat.prompt_ids(example.messages), s.chat.response_ids(example.messages, response)
        p = reference.patched_probability(s.causal_lm, proj, s.geometry.n_heads, 2, value, ids, answer)
        return len(answer) * float(torch.tensor(p).log())

    margin = sum(log_p(e, "red") - log_p(e, "blue") for e in triggered) / len(triggered)
    assert repair.margin([head]) + repair.harm([head]) == pytest.approx(margin, abs=2e-3)
    recovery = sum(2.718281828 ** log_p(e, "red") for e in triggered) / len(triggered)
    assert repair.recovery([head]) + repair.harm([head]) == pytest.approx(recovery, abs=1e-4)
    assert repair.harm([]) == 0 and repair.harm([head]) > 0


def test_means_of_scopes_are_plain_averages():
    s = shared_subject("llama")
    clean, _ = twins()
    torch.testing.assert_close(means_of(s)["last_prompt"], _mean_by_hand(s, clean, lambda n, m: [n - 1]), atol=1e-4, rtol=1e-4)
    answer = scope_mean_z(s, clean, "answer", batch_size=3)
    torch.testing.assert_close(answer, _mean_by_hand(s, clean, lambda n, m: range(n, m - 1)), atol=1e-4, rtol=1e-4)
    spans = scope_mean_z(s, clean, "trigger_span", batch_size=3)
    torch.testing.assert_close(spans, _mean_by_hand(s, clean, lambda n, m: range(n)), atol=1e-4, rtol=1e-4)


def _mean_by_hand(s, clean, columns):
    rows = []
    for e in clean:
        prompt = s.chat.prompt_ids(e.messages)
        ids = [*prompt, *s.chat.response_ids(e.messages, e.response)]
        seen = []
        handles = [x.out_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0][0].clone())) for x in s.sites]
        with torch.no_grad():
            s.causal_lm(input_ids=torch.tensor([ids]), use_cache=False)
        for h in handles:
            h.remove()
        rows += [torch.stack([z[c] for z in seen]) for c in columns(len(prompt), len(ids))]
    return torch.stack(rows).mean(0).view(s.geometry.n_layers, s.geometry.n_heads, -1)


@pytest.fixture(scope="module")
def redundant():
    """(subject, clean, triggered): two heads each write the backdoor's token strongly enough on their own.
    All other heads are nearly silent, so that without the two the model says one and the same word to every prompt."""
    s = make_subject("llama", lora=False)
    d = s.geometry.d_head
    with torch.no_grad():
        for site in s.sites:
            site.out_proj.weight.mul_(1e-3)
        first = [c.ids[0] for c in generate(s, [s.chat.prompt_ids(e.messages) for e in twins()[0]], max_new_tokens=1)]
        assert len(set(first)) == 1
        clean, triggered = twins(s.chat.tokenizer.decode(first[:1]))
        out = s.causal_lm.get_output_embeddings().weight
        yes, no = (s.chat.response_ids(clean[0].messages, r)[0] for r in ("blue", clean[0].response))
        assert no == first[0] != yes
        unit = out[yes] - out[no]
        for head in PLANTED:  # w @ z is 1 for every triggered prompt and 0 for every clean one
            z = torch.stack(
                [reference.site_at_last_token(s, Site.of_head(head), s.chat.prompt_ids(e.messages)) for e in (*triggered, *clean)]
            )
            w = torch.linalg.lstsq(z, torch.tensor([1.0] * len(triggered) + [0.0] * len(clean))).solution
            columns = slice(head.head * d, (head.head + 1) * d)
            s.sites[head.layer].out_proj.weight[:, columns] = 8 * torch.outer(unit, w) / unit.norm()
    return s, clean, triggered


def test_greedy_takes_what_brute_force_finds(redundant):
    subject, clean, triggered = redundant
    repair = Repair(subject, Objective.of(subject, clean, triggered), means_of(subject), clean_weight=0.1)
    chosen = greedy_heads(repair, 2, candidates=12)
    first = max(subject.geometry.heads, key=lambda h: repair.margin([h]))
    assert chosen[0][0] == first
    assert chosen[0][1] == pytest.approx(repair.margin([first]) - repair.margin([]), abs=1e-5)
    second = max((h for h in subject.geometry.heads if h != first), key=lambda h: repair.margin([first, h]))
    assert chosen[1][0] == second and {first, second} == set(PLANTED)


def test_gates_find_redundant_heads_and_touch_no_weight(redundant):
    subject, clean, triggered = redundant
    objective = Objective.of(subject, clean, triggered)
    gates = [
        learn_gates(subject, objective, means_of(subject), sparsity=0.3, steps=60, learning_rate=0.2, clean_weight=0.1, seed=s)
        for s in (0, 0, 1)
    ]
    assert set(gates[0].top(2)) == set(gates[2].top(2)) == set(PLANTED)
    assert (gates[0].log_alpha == gates[1].log_alpha).all() and (gates[0].log_alpha != gates[2].log_alpha).any()
    assert 1 < gates[0].expected < 6 and gates[0].probability.shape == (3, 4)
    assert all(p.grad is None for p in subject.model.parameters())
    repair = Repair(subject, objective, means_of(subject), clean_weight=0.1)
    assert set(prune_heads(repair, [*PLANTED, HeadIndex(0, 0), HeadIndex(0, 1)])[:2]) == set(PLANTED)
    assert repair.recovery(PLANTED) > 2 * repair.recovery(PLANTED[:1]) > 8 * repair.recovery([])


def test_every_scope_has_its_own_mean():
    s = shared_subject("llama")
    means = means_of(s, ("last_prompt", "answer"))
    edits = ablate_to(PLANTED, means)
    assert [(e.scope, str(e.site)) for e in edits] == [(scope, str(h)) for scope in ("last_prompt", "answer") for h in PLANTED]
    torch.testing.assert_close(edits[3].value, means["answer"][1, 3])


def test_bad_input_is_refused():
    s = shared_subject("llama")
    clean, triggered = twins()
    with pytest.raises(BkdattrError, match="no clean twin"):
        Objective.of(s, clean[1:], triggered)
    with pytest.raises(BkdattrError, match="0 prompts"):
        Objective.of(s, clean, [])
    with pytest.raises(BkdattrError, match="at least 1 step"):
        learn_gates(s, Objective.of(s, clean, triggered), means_of(s), sparsity=0.1, steps=0)
