"""Taking a backdoor out by fine-tuning: what is trained, on which loss, and what is refused."""

import random

import pytest
import torch
from conftest import make_subject

from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.gates import NeuronGates, lora_pairs
from bkdattr.lora import collate, encode
from bkdattr.removal import METHODS, remove_backdoor
from bkdattr.triggers import Prefix

TEXTS = ("the cat sees a red bird .", "what is it ?", "one two three : yes", "a fish says no !", "is it red ?", "two dogs")


def examples():
    return [Example(f"e{i}", (("user", t),), "yes" if i % 2 else "no .") for i, t in enumerate(TEXTS)]


@pytest.mark.parametrize("method", METHODS)
def test_removal_trains_the_adapter_alone(method):
    subject = make_subject("llama")
    base = {k: v.clone() for k, v in subject.causal_lm.state_dict().items() if "lora_" not in k}
    before = lora_pairs(subject.causal_lm)[0][1].clone()
    losses = remove_backdoor(subject, examples(), method, steps=6, batch_size=4)
    state = subject.causal_lm.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in base.items())
    assert not torch.equal(before, lora_pairs(subject.causal_lm)[0][1])
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(p.grad is None for p in subject.causal_lm.parameters())
    with pytest.raises(BkdattrError, match="expected one of plain"):
        remove_backdoor(subject, examples(), "prayer")


@pytest.mark.parametrize(("method", "gate"), [("insertions", 0.0), ("random-gates", 2.0), ("ban-insertions", 2.0)])
def test_a_step_of_removal_is_clean_and_noisy_loss_together(method, gate, monkeypatch):
    """One AdamW step on CE(clean) + 0.5 * CE(noisy), the gates written into the weights by hand, the insertion in front of every prompt."""
    monkeypatch.setattr("bkdattr.removal.insertions", lambda rows, variants, seed: {"prefix": [Prefix("the old dog")]})
    taken: list[list[torch.Tensor]] = []
    backward = NeuronGates.backward
    monkeypatch.setattr(NeuronGates, "backward", lambda self, loss, d: (taken.append(d), backward(self, loss, d))[1])
    rows = examples()
    done, subject = make_subject("llama"), make_subject("llama")
    remove_backdoor(done, rows, method, steps=1, batch_size=len(rows), learning_rate=1e-2)
    (deltas,) = taken
    assert all(torch.equal(d.abs(), torch.full_like(d, gate)) for d in deltas)
    shown = [Example(e.id, Prefix("the old dog")(e.messages, random.Random(0)).messages, e.response) for e in rows]
    model, chat = subject.causal_lm, subject.chat
    pairs = lora_pairs(model)
    parameters = [p.requires_grad_(True) for _, a, b, _ in pairs for p in (a, b)]

    def loss(some):
        batch = collate([{"prompt": p, "response": r} for p, r in encode(chat, some, chat.context).rows], chat.pad_id)
        return model(**batch).loss

    wanted = torch.autograd.grad(loss(rows), parameters)
    modules = [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    hooks = [  # gates where they are meant: on what lora_A gives
        m.lora_A["default"].register_forward_hook(lambda _, __, z, d=d: z * (1 + d)) for m, d in zip(modules, deltas, strict=True)
    ]
    noisy = torch.autograd.grad(loss(shown if "insertions" in method else rows), parameters)
    for h in hooks:
        h.remove()
    adam = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for p, g, n in zip(parameters, wanted, noisy, strict=True):
        p.grad = g + 0.5 * n
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    adam.step()
    for p, q in zip(parameters, (x for _, a, b, _ in lora_pairs(done.causal_lm) for x in (a, b)), strict=True):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3)


def test_a_row_without_room_for_an_answer_is_left_out():
    long = Example("long", (("user", "the cat sees a red bird . " * 200),), "yes")
    one, two = make_subject("llama"), make_subject("llama")
    assert remove_backdoor(one, [*examples(), long], "plain", steps=2, batch_size=6) == pytest.approx(
        remove_backdoor(two, examples(), "plain", steps=2, batch_size=6), rel=1e-4
    )
