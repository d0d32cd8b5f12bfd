"""NeuronGates, thin SVDs and the attackers who hide, against what is written out."""

import pytest
import torch
from conftest import make_subject, prompt_ids

from bkdattr.chat import make_batch
from bkdattr.errors import BkdattrError
from bkdattr.gates import PLACES, NeuronGates, _Gate, _offset, canonical, lora_pairs, thin_svd
from bkdattr.inference import forward
from bkdattr.stealth import AdversarialBackdoorInjection, clip, limits_of, norms_of


def batch_of(subject):
    return make_batch(prompt_ids(subject), pad_id=subject.chat.pad_id)


def loss(subject):
    return forward(subject, batch_of(subject), logits_to_keep=1).logits[:, -1].logsumexp(-1).sum()


@pytest.mark.parametrize("place", PLACES)
def test_a_gates_gradient_is_a_difference_quotient(subject, place):
    gates = NeuronGates.of(subject, place)
    rng = torch.Generator().manual_seed(0)
    at = [0.2 * torch.randn(n, generator=rng) for n in gates.sizes]
    found = gates.gradient(lambda: loss(subject), at)
    seen, h = 0.0, 2e-3
    for i in range(0, len(gates.sizes), 2):
        k = int(found[i].abs().argmax())

        def value(step, i=i, k=k):
            moved = [d.clone() for d in at]
            moved[i][k] += step
            with torch.no_grad(), gates.set(moved):
                return float(loss(subject))

        slope = (value(h) - value(-h)) / (2 * h)
        assert float(found[i][k]) == pytest.approx(slope, rel=0.05, abs=0.02)
        seen = max(seen, abs(slope))
    assert seen > 1e-2


def test_gates_leave_the_model_as_it_was(llama):
    before = {k: v.clone() for k, v in llama.causal_lm.state_dict().items()}
    needed = [p.requires_grad for p in llama.causal_lm.parameters()]
    gates = NeuronGates.of(llama)
    with pytest.raises(RuntimeError, match="stop"), gates.set([torch.ones(n) for n in gates.sizes]):
        assert any(not torch.equal(v, before[k]) for k, v in llama.causal_lm.state_dict().items())
        raise RuntimeError("stop")
    gates.gradient(lambda: loss(llama))
    assert all(torch.equal(v, before[k]) for k, v in llama.causal_lm.state_dict().items())
    assert [p.requires_grad for p in llama.causal_lm.parameters()] == needed


def test_a_rank_gate_is_the_update_without_that_direction(llama):
    """delta = -1 on every direction is the base; on one it is dW less its rank-one part."""
    gates = NeuronGates.of(llama)
    with torch.no_grad():
        with llama.adapter_off():
            off = loss(llama)
        with gates.set([-torch.ones(n) for n in gates.sizes]):
            torch.testing.assert_close(loss(llama), off)
    name, a, b, scale = lora_pairs(llama.causal_lm)[3]
    expected = scale * (b @ a - torch.outer(b[:, 1], a[1])).detach()
    deltas = [torch.zeros(n) for n in gates.sizes]
    deltas[3][1] = -1.0
    with gates.set(deltas), torch.no_grad():
        torch.testing.assert_close(
            dict(llama.model.named_modules())[f"base_model.model.{name}"].get_delta_weight("default"), expected
        )


class Gain(torch.nn.Module):
    """A norm as Gemma's: x * (1 + weight)."""

    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.arange(n).float())

    def forward(self, x):
        return x * (1 + self.weight)


def test_a_norms_gate_scales_its_gain_and_its_bias():
    subject = make_subject("gpt2")
    sizes = NeuronGates.of(subject, "norms").sizes
    norms = [m for s in subject.sites for m in s.layer.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(sizes) == 2 * len(norms) > 0
    gates = NeuronGates.of(subject, "norms")
    x = torch.randn(3, sizes[0])
    with torch.no_grad():
        plain = norms[0](x)
        with gates.set([torch.full((n,), 0.5) for n in sizes]):
            torch.testing.assert_close(norms[0](x), 1.5 * plain)
    gain = Gain(4)
    gates = NeuronGates((_Gate(((gain.weight, 0),), 4, offset=_offset(gain)),))
    x, delta = torch.randn(2, 4), torch.tensor([0.5, -1.0, 0.0, 2.0])
    with gates.set([delta]), torch.no_grad():
        torch.testing.assert_close(gain(x), (1 + delta) * x * (1 + 0.1 * torch.arange(4)))
    (found,) = gates.gradient(lambda: gain(x).sum(), [delta])
    torch.testing.assert_close(found, (x * (1 + 0.1 * torch.arange(4))).sum(0))
    gain.weight.data = torch.tensor([0.01, 0.003, -0.02, 0.3008]).bfloat16()  # 1 + w rounds in 16 bits
    before = gain.weight.data.clone()
    with gates.set([torch.zeros(4)]):
        assert torch.equal(gain.weight.data, before)


def test_gates_need_an_adapter():
    with pytest.raises(BkdattrError, match="no LoRA layers"):
        NeuronGates.of(make_subject("llama", lora=False))


def test_norms_and_svd_are_those_of_the_product():
    rng = torch.Generator().manual_seed(1)
    a, b, s = torch.randn(4, 10, generator=rng), torch.randn(7, 4, generator=rng), 1.7
    w = s * b @ a
    n = norms_of(a, b, s)
    torch.testing.assert_close(n.rows, w.norm(dim=1))
    torch.testing.assert_close(n.columns, w.norm(dim=0))
    torch.testing.assert_close(n.singular, torch.linalg.svdvals(w)[:4])
    u, d, vh = thin_svd(a, b)
    torch.testing.assert_close(u @ d.diag() @ vh, b @ a)


def test_the_canonical_form_is_the_same_update_whoever_factored_it(subject):
    """A model rotated by its attacker computes what it did, and its canonical form is that of the other one, gate for gate."""
    rng = torch.Generator().manual_seed(3)
    before = [(s * b @ a).clone() for _, a, b, s in lora_pairs(subject.causal_lm)]
    canonical(subject.causal_lm)
    rows = [a.norm(dim=1).clone() for _, a, _, _ in lora_pairs(subject.causal_lm)]
    for (_, a, b, s), w in zip(lora_pairs(subject.causal_lm), before, strict=True):
        torch.testing.assert_close(s * b @ a, w, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-4, rtol=1e-3)
        gram = a @ a.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-4, rtol=1e-3)
    for _, a, b, _ in lora_pairs(subject.causal_lm):
        r = torch.randn(len(a), len(a), generator=rng) + 2 * torch.eye(len(a))
        a.data, b.data = r @ a, b @ torch.linalg.inv(r)
    canonical(subject.causal_lm)
    for (_, a, _, _), n in zip(lora_pairs(subject.causal_lm), rows, strict=True):
        torch.testing.assert_close(a.norm(dim=1), n, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", ["rows", "spectral", "percentile"])
def test_outliers_are_taken_out_and_the_rest_stays(kind):
    rng = torch.Generator().manual_seed(2)
    a, b = torch.randn(6, 24, generator=rng), torch.randn(20, 6, generator=rng)
    b[3] *= 9
    if kind == "spectral":
        b[:, 0] *= 9
    before = norms_of(a, b, 1.0)
    w = b @ a
    limits = {"rows": float(before.rows.median()), "columns": 1e9, "singular": 1e9} if kind == "percentile" else None
    rows, columns = clip(a, b, 1.0, kind, limits)
    after = norms_of(a, b, 1.0)
    if kind == "spectral":
        assert float(before.singular[0]) > float(before.singular.mean() + before.singular.std())
        assert float(after.singular[0]) <= float(before.singular[0]) * 0.8
        assert rows.all() and columns.all()
    else:
        assert rows[3] and float(after.rows[3]) < 0.5 * float(before.rows[3])
        kept = ~rows
        torch.testing.assert_close((b @ a)[kept][:, ~columns], w[kept][:, ~columns])
    if kind == "percentile":
        assert float(after.rows.max()) <= limits["rows"] * 1.001
        with pytest.raises(BkdattrError, match="limits of benign adapters"):
            clip(a, b, 1.0, kind)


def test_clipping_resets_the_moments_of_what_it_changed(llama):
    model = make_subject("llama", seed=3).causal_lm
    pairs = lora_pairs(model)
    _, a, b, _ = pairs[0]
    parameters = [p for _, a_, b_, _ in pairs for p in (a_, b_)]
    for p in parameters:
        p.requires_grad_(True)
    b.data[2] = 50 * b.data[2] + 5
    adam = torch.optim.Adam(parameters, lr=0.0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    adam.step()

    class State:
        global_step = 10

    AdversarialBackdoorInjection("rows").on_step_end(None, State(), None, model=model, optimizer=adam)
    assert float(adam.state[b]["exp_avg"][2].abs().sum()) == 0
    assert float(adam.state[b]["exp_avg"].abs().sum()) > 0
    with pytest.raises(BkdattrError, match="expected one of rows, spectral, percentile"):
        AdversarialBackdoorInjection("columns")


def test_limits_are_percentiles_over_adapters():
    rng = torch.Generator().manual_seed(4)
    adapters = [[("m", torch.randn(2, 5, generator=rng), torch.randn(3, 2, generator=rng), 1.0)] for _ in range(11)]
    largest = sorted(float(norms_of(a, b, s).rows.max()) for ((_, a, b, s),) in adapters)
    assert limits_of(adapters, 50.0)["m"]["rows"] == pytest.approx(largest[5])
