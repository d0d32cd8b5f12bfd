"""Joint selection: the objective by hand, greedy against brute force, and two redundant heads planted by hand."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import make_subject, shared_subject

from bkdattr.architectures import HeadIndex
from bkdattr.edits import Condition, Site
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.inference import PrefixCache, generate
from bkdattr.selection import Objective, Repair, Unedited, ablate_to, greedy_heads, learn_gates, reachable
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
        learn_gates(
            subject, objective, means_of(subject), sparsity=(0.01, 0.6), steps=80, learning_rate=0.2, clean_weight=0.1, seed=s
        )
        for s in (0, 0, 1)
    ]
    assert set(gates[0].top(2)) == set(gates[2].top(2)) == set(PLANTED)
    assert (gates[0].log_alpha == gates[1].log_alpha).all() and (gates[0].log_alpha != gates[2].log_alpha).any()
    assert 1 < gates[0].expected < 4 and gates[0].log_alpha.shape == (3, 4)
    assert all(len(heads) == n and len(set(heads)) == n for n, heads in gates[0].sets.items())
    assert len(gates[0].top(12)) == max(gates[0].sets) and gates[0].top(1)[0] in PLANTED
    assert all(p.grad is None for p in subject.model.parameters())
    repair = Repair(subject, objective, means_of(subject), clean_weight=0.1)
    assert repair.margin(PLANTED) > repair.margin(PLANTED[:1]) and repair.margin(PLANTED) > repair.margin([]) + 1


def test_under_a_condition_only_prompts_that_fire_are_repaired(redundant):
    """A condition of layer 0: heads of later layers alone, clean prompts untouched, triggered ones as without it."""
    subject, clean, triggered = redundant
    ids = [subject.chat.prompt_ids(e.messages) for e in (*triggered, *clean)]
    states = torch.stack([reference.resid_at_last_token(subject, 0, p) for p in ids])
    labels = torch.tensor([1.0] * len(triggered) + [-1.0] * len(clean))
    fit = torch.linalg.lstsq(torch.cat([states, torch.ones(len(states), 1)], 1), labels).solution
    when = Condition(0, fit[:-1], float(fit[-1]))
    objective, means = Objective.of(subject, clean, triggered), means_of(subject)
    free, held = Repair(subject, objective, means), Repair(subject, objective, means, when=when)
    assert held.margin(PLANTED) == pytest.approx(free.margin(PLANTED) + free.harm(PLANTED), abs=1e-4)
    gates = learn_gates(subject, objective, means, sparsity=(0.01, 0.6), steps=60, learning_rate=0.2, when=when)
    assert set(gates.top(2)) == set(PLANTED)
    assert all(h.layer > 0 for heads in gates.sets.values() for h in heads) and not (gates.log_alpha[0] > -float("inf")).any()
    assert all(h.layer > 0 for h, _ in greedy_heads(held, 3))


def test_a_condition_that_always_or_never_fires():
    s = shared_subject("llama")
    clean, triggered = twins()
    objective, means, heads = Objective.of(s, clean, triggered, batch_size=3), means_of(s), [HeadIndex(1, 2), HeadIndex(2, 0)]
    never, always = (Condition(0, torch.zeros(s.geometry.d_model), bias) for bias in (-1.0, 1.0))
    free = Repair(s, objective, means)
    assert Repair(s, objective, means, when=never).harm(heads) == pytest.approx(0, abs=1e-5) and free.harm(heads) > 1e-3
    assert Repair(s, objective, means, when=always).margin(heads) == pytest.approx(free.margin(heads), abs=1e-4)
    assert len(reachable(s, always)) == 2 * s.geometry.n_heads and reachable(s, None) == list(s.geometry.heads)


def test_kept_and_remade_references_are_the_same():
    s = shared_subject("llama")
    clean, triggered = twins()
    parts = Objective.of(s, clean, triggered, batch_size=2).clean
    kept, remade = Unedited(s, parts, PrefixCache()), Unedited(s, parts, PrefixCache(), max_bytes=0)
    for i in range(len(parts)):
        torch.testing.assert_close(kept[i], remade[i])
    assert len(kept.kept) == len(parts) and not remade.kept


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
    with pytest.raises(BkdattrError, match="at least 2 steps"):
        learn_gates(s, Objective.of(s, clean, triggered), means_of(s), steps=0)
