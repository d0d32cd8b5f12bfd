"""Loading: what fits is loaded un-merged, what does not is refused before PEFT sees it."""

import json
import shutil

import pytest
import torch
from conftest import add_lora, make_model, make_subject, make_tokenizer, prompt_ids
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from bkdattr.adapters import check_adapter
from bkdattr.errors import BkdattrError
from bkdattr.model import Subject, load_base, load_subject, load_tokenizer


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    add_lora(make_model("llama")).save_pretrained(folder)
    return folder


def test_loads_unmerged_and_switches_off(saved_tiny, adapter):
    s = load_subject(saved_tiny, adapter)
    ids = torch.tensor([[1, 7, 8]])
    assert s.has_adapter and s.adapter_on and s.fingerprint.endswith(":on")
    base = load_base(saved_tiny)
    with torch.no_grad():
        on = s.causal_lm(input_ids=ids).logits
        with s.adapter_off():
            off = s.causal_lm(input_ids=ids).logits
            assert s.fingerprint.endswith(":off")
        assert torch.equal(off, base(input_ids=ids).logits)
        assert (on - off).abs().max() > 1e-2
        assert torch.equal(on, s.causal_lm(input_ids=ids).logits)
    plain = Subject.of(base, load_tokenizer(saved_tiny))
    with pytest.raises(BkdattrError, match="no clean twin"), plain.adapter_off():
        pass


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
def test_adapter_of_fewer_layers_is_refused(saved_tiny, tmp_path, modules):
    """PEFT itself loads it, with a warning at most: by names it finds tensors missing, by full paths not even that."""
    model = get_peft_model(make_model("llama", num_hidden_layers=2), LoraConfig(r=2, target_modules=modules))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(BkdattrError, match=r"another base \(2 layers, this base has 3\)"):
        load_subject(saved_tiny, tmp_path / "a")


def test_an_adapter_of_chosen_layers_is_loaded(saved_tiny, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2])
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "a")
    assert load_subject(saved_tiny, tmp_path / "a").has_adapter


def test_adapter_of_more_layers_or_other_width_is_refused(saved_tiny, tmp_path):
    add_lora(make_model("llama", num_hidden_layers=4)).save_pretrained(tmp_path / "a")
    with pytest.raises(BkdattrError, match=r"4 layers, this base has 3\).*no place"):
        load_subject(saved_tiny, tmp_path / "a")
    add_lora(make_model("llama", hidden_size=16)).save_pretrained(tmp_path / "b")
    with pytest.raises(BkdattrError, match=r"has shape .* this base needs"):
        load_subject(saved_tiny, tmp_path / "b")


def test_a_missing_tensor_is_named(saved_tiny, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    gone = sorted(tensors)[3]
    save_file({k: v for k, v in tensors.items() if k != gone}, adapter / "adapter_model.safetensors")
    with pytest.raises(BkdattrError, match=f"1 tensors that this base needs are missing, first {gone}"):
        check_adapter(make_model("llama"), adapter)


def test_pickled_and_broken_adapters_are_refused(saved_tiny, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(BkdattrError, match=r"pickled weights adapter_model.bin, expected adapter_model.safetensors"):
        load_subject(saved_tiny, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(BkdattrError, match="got no adapter_model.safetensors"):
        load_subject(saved_tiny, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(BkdattrError, match="not a readable PEFT adapter"):
        load_subject(saved_tiny, adapter)
    shutil.rmtree(adapter)
    with pytest.raises(BkdattrError, match=r"no adapter_config.json"):
        load_subject(saved_tiny, adapter)


def test_target_modules_of_another_family_are_refused(saved_tiny, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(BkdattrError, match="does not fit this base"):
        load_subject(saved_tiny, adapter)


def test_adapters_that_change_the_base_are_refused(saved_tiny, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(BkdattrError, match="would not give the clean twin"):
        load_subject(saved_tiny, tmp_path / "a")
    get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    (tmp_path / "b/adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(BkdattrError, match="PEFT would rewrite the base's own weights"):
        load_subject(saved_tiny, tmp_path / "b")


def test_missing_model_and_unknown_type(tmp_path, saved_tiny):
    with pytest.raises(BkdattrError, match=r"cannot load a (tokenizer|model)"):
        load_subject(tmp_path / "nothing")
    shutil.copytree(saved_tiny, tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(BkdattrError, match=r"'mamba' is not known; supported"):
        load_base(tmp_path / "odd")


def test_pickled_base_weights_are_refused(tmp_path, saved_tiny):
    shutil.copytree(saved_tiny, tmp_path / "m")
    torch.save(load_file(tmp_path / "m/model.safetensors"), tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(BkdattrError, match="cannot load a model"):
        load_base(tmp_path / "m")


def test_pad_token_is_asked_for_and_can_be_given(tmp_path, saved_tiny):
    shutil.copytree(saved_tiny, tmp_path / "m")
    tok = make_tokenizer()
    tok.pad_token = None
    tok.save_pretrained(tmp_path / "m")
    with pytest.raises(BkdattrError, match="--pad-token"):
        load_subject(tmp_path / "m")
    assert load_subject(tmp_path / "m", pad_token="eos").chat.pad_id == 2


def test_fingerprint_follows_weights_adapter_and_template():
    a, b = make_subject("llama"), make_subject("llama")
    assert a.fingerprint == b.fingerprint
    others = [
        make_subject("llama", seed=4),
        make_subject("llama", lora=False),
        Subject.of(add_lora(make_model("llama"), 9), make_tokenizer()),
    ]
    peft_model = add_lora(make_model("llama"))
    peft_model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 7.0
    others.append(Subject.of(peft_model, make_tokenizer()))
    others.append(Subject.of(add_lora(make_model("llama")), make_tokenizer(None)))
    assert len({a.fingerprint, *(o.fingerprint for o in others)}) == 6


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_the_adapter_is_undone_in_part(family):
    """Each update alone, by hand: the LoRA weights of the other modules set to nothing give the same logits."""
    s = make_subject(family)
    ids = torch.tensor(prompt_ids(s)[:1])

    def logits():
        with torch.no_grad():
            return s.causal_lm(input_ids=ids).logits

    whole, names = logits(), dict(s.causal_lm.named_parameters())
    prints = {s.fingerprint}
    layer = s.architecture.layers + ".1."
    inside = s.architecture.out_proj.rpartition(".")[0]
    for parts in (("attention",), ("mlp",), ("attention", "mlp")):
        with s.adapter_off_in([1], parts):
            got = logits()
            prints.add(s.fingerprint)
            with s.adapter_off():
                pass
            assert s.fingerprint in prints  # the twin's block gives back what it found
            assert s.adapter_on
        chosen = [
            p for n, p in names.items()
            if "lora_B" in n and layer in n and (("attention" if n.split(layer)[1].startswith(inside) else "mlp") in parts)
        ]  # fmt: skip
        kept = [p.detach().clone() for p in chosen]
        with torch.no_grad():
            for p in chosen:
                p.zero_()
            want = logits()
            for p, k in zip(chosen, kept, strict=True):
                p.copy_(k)
        torch.testing.assert_close(got, want)
        assert (got - whole).abs().max() > 1e-4
        torch.testing.assert_close(logits(), whole, atol=0, rtol=0)
    assert len(prints) == 4
    with s.adapter_off_in(range(s.geometry.n_layers)):
        off = s.fingerprint
    with s.adapter_off():
        assert s.fingerprint == off
    with pytest.raises(BkdattrError, match="expected some of attention, mlp"), s.adapter_off_in([0], ["head"]):
        pass
    with pytest.raises(BkdattrError, match="layer 9 is out of range"), s.adapter_off_in([9]):
        pass
