"""Parity with TransformerLens on a merged copy: head contributions and patched logits."""

import pytest
import torch
from conftest import make_subject, prompt_ids

from bkdattr.chat import make_batch
from bkdattr.edits import SetSite, Site, Where
from bkdattr.inference import forward
from bkdattr.interventions import edited
from bkdattr.lens import to_transformer_lens
from bkdattr.traces import contributions


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_contributions_and_patched_logits_are_those_of_transformer_lens(family):
    s = make_subject(family, **({"head_dim": 6} if family == "llama" else {}))  # the bridge takes d_head = d_model / n_heads
    bridge = to_transformer_lens(s)
    ids = torch.tensor([prompt_ids(s)[0]])
    layer, head, value = 1, 2, torch.randn(s.geometry.d_head)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
        torch.testing.assert_close(logits[0], s.causal_lm(input_ids=ids).logits[0], atol=2e-4, rtol=2e-4)

        z = cache["z", layer][0, -1]
        mine = contributions(s, layer, z)
        w_o = bridge.blocks[layer].attn.W_O
        theirs = torch.einsum("hd,hdm->hm", z, w_o)
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)

        def patch(z, hook):
            z = z.clone()
            z[0, -1, head] = value
            return z

        theirs = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)])[0, -1]
        batch = make_batch([ids[0].tolist()], pad_id=0)
        with edited(s, [SetSite(Site(layer, "head", head), value)], Where.of(batch)):
            mine = forward(s, batch).logits[0, -1]
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
    assert (theirs - logits[0, -1]).abs().max() > 1e-3


def test_the_subject_keeps_its_adapter():
    s = make_subject("llama", head_dim=6)
    before = s.fingerprint
    to_transformer_lens(s)
    assert s.has_adapter and s.adapter_on and s.fingerprint == before
