"""`bkdattr detect` as a pipeline sees it: 0 and 1 are verdicts that were written, whatever goes wrong is 2."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bkdattr import banks
from bkdattr.cli import app
from bkdattr.detection import Recipe, read_banks
from bkdattr.errors import BkdattrError
from bkdattr.mini.tasks import MODEL_DIR
from bkdattr.model import load_base

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter of the embedded bank's recipe with small random weights."""
    folder = tmp_path_factory.mktemp("detect") / "adapter"
    recipe = next(b.recipe for b in read_banks(banks.MINI_BANK) if b.recipe.rank == 8)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=int(recipe.alpha), target_modules=list(recipe.targets), task_type="CAUSAL_LM")
    model = get_peft_model(load_base(MODEL_DIR), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.02 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(made, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG, "adapter_model.safetensors"):
        (folder / name).write_bytes((made / name).read_bytes())
    return folder


def detect(*args):
    return CliRunner().invoke(app, ["detect", *map(str, args)])


def test_the_exit_code_is_the_verdict_that_was_written(adapter, monkeypatch):
    first = detect(adapter)
    written = json.loads((adapter / "detection/detection.json").read_text())
    p = written["verdict"]["p_value"]
    assert first.exit_code == int(p <= 0.05) and written["verdict"]["suspicious"] == (p <= 0.05), first.output
    monkeypatch.setattr(banks, "measure", lambda *a, **k: written["measured"])  # the same numbers at other thresholds
    for alpha in (p + 1e-6, p - 1e-6):
        result = detect(adapter, "--alpha", alpha, "--out", adapter / str(alpha))
        verdict = json.loads((adapter / str(alpha) / "detection.json").read_text())["verdict"]
        assert result.exit_code == int(verdict["suspicious"]) == int(alpha > p)
        assert ("SUSPICIOUS" in result.output) == (alpha > p)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory"), KeyError("r")])
def test_whatever_happens_on_the_way_is_2(adapter, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(banks, "measure", fails)
    (adapter / "detection").mkdir()
    (adapter / "detection/detection.json").write_text("{}")
    result = detect(adapter)
    assert result.exit_code == 2 and type(error).__name__ in result.output
    assert not list((adapter / "detection").glob("*"))  # nor what stood there from another time


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": None}, "not a PEFT LoRA config"),
        ({"target_modules": None}, "got target_modules []"),
        ({"use_dora": True}, "got use_dora True; expected plain LoRA"),
        ({"alpha_pattern": {"q_proj": 800}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 32}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform 0"),
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"target_modules": [1, "a"]}, "not a PEFT LoRA config"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_rslora": True}, "the bank holds"),
        ({"r": 3}, "this base needs (3,"),
    ],
)
def test_an_adapter_that_no_bank_can_judge_is_refused(adapter, change, said):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | change))
    result = detect(adapter)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output, result.output


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]", b'{"peft_type": "IA3"}'])
def test_a_broken_config_is_refused(adapter, content):
    (adapter / CONFIG).write_bytes(content)
    result = detect(adapter)
    assert result.exit_code == 2 and "not a PEFT LoRA config" in result.output, result.output


def test_broken_weights_banks_and_options_are_refused(adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    result = detect(adapter)
    assert result.exit_code == 2 and "not finite" in result.output
    (tmp_path / "empty.json").write_text("[]")
    result = detect(adapter, "--bank", tmp_path / "empty.json")
    assert result.exit_code == 2 and "empty; expected what `bkdattr bank` writes" in result.output
    bank = json.loads(banks.MINI_BANK.read_text())
    for b in bank:
        del b["adapters"][0]["statistics"]["fuzz.drop"]
    (tmp_path / "lacking.json").write_text(json.dumps(bank))
    result = detect(adapter, "--bank", tmp_path / "lacking.json")
    assert result.exit_code == 2 and "adapters without fuzz.drop" in result.output
    result = detect(adapter, "--bank", tmp_path)
    assert result.exit_code == 2 and "a folder; expected the JSON file" in result.output
    result = detect(adapter, "--out", tmp_path / "empty.json")
    assert result.exit_code == 2 and "expected a folder" in result.output
    result = detect(adapter, "--rank", 4)
    assert result.exit_code == 2 and "is no merged model" in result.output
    result = detect(adapter.parent)
    assert result.exit_code == 2 and "did you mean" in result.output and "adapter?" in result.output
    result = detect(adapter, "--alpha", 0.001)
    assert result.exit_code == 2 and "every adapter would pass" in result.output
    result = detect(adapter, "--dtype", "foo")
    assert result.exit_code == 2 and "dtype 'foo'" in result.output
    result = detect(adapter, "--dtype", "bfloat16")
    assert result.exit_code == 2 and "a base in another dtype is another one" in result.output


def test_a_merged_model_is_judged_by_the_bank_of_its_base_and_targets(adapter, tmp_path, monkeypatch):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_base(MODEL_DIR), str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    bank = json.loads(banks.MINI_BANK.read_text())
    right = next(b for b in bank if b["recipe"]["rank"] == 8)
    other = {**right, "base": "another", "recipe": {**right["recipe"], "alpha": 99.0}}
    (tmp_path / "bank.json").write_text(json.dumps([other, right]))
    used = []
    monkeypatch.setattr(
        banks, "measure", lambda s, prompts, *a, **k: used.append(s) or {"statistics": right["adapters"][0]["statistics"]}
    )
    verdict, where = banks.detect(tmp_path / "merged", "mini", tmp_path / "bank.json", None)
    assert verdict.benign == len(right["adapters"]) and (where / "detection.json").exists()
    assert used[0].has_adapter
    assert json.loads((where / "detection.json").read_text())["against"]["merged"].endswith("as in the bank, at rank 8.")
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    with pytest.raises(BkdattrError, match="a merge in 16 bits hides its rank in rounding: give it with --rank"):
        banks.detect(tmp_path / "rounded", "mini", tmp_path / "bank.json", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its rounding is no change
        assert banks.detect(tmp_path / "rounded", "mini", tmp_path / "bank.json", None, rank=8)[0].benign == len(
            right["adapters"]
        )
    merged.get_input_embeddings().weight.data[7] += 0.5
    merged.save_pretrained(tmp_path / "rounded")
    with pytest.warns(UserWarning, match="more than projections changed"):
        _, where = banks.detect(tmp_path / "rounded", str(MODEL_DIR), None, None, rank=8)  # that is 'mini' too
    assert "more than projections changed" in (where / "detection.html").read_text()


def test_the_effective_scale_is_what_compares(adapter):
    plain = Recipe.of(adapter)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    assert Recipe.of(adapter).alpha == pytest.approx(plain.alpha * 8**0.5)
    (adapter / CONFIG).write_text(json.dumps(config | {"lora_alpha": plain.alpha / 8**0.5, "use_rslora": True}))
    assert Recipe.of(adapter).like(plain) and not Recipe.of(adapter).like(Recipe(plain.rank, plain.alpha * 1.01, plain.targets))
    with pytest.raises(BkdattrError, match="no adapter_config"):
        Recipe.of(adapter.parent)


def test_the_standard_bank_takes_no_recipe(tmp_path):
    result = CliRunner().invoke(app, ["bank", str(tmp_path / "bank.json"), "--rank", "4"])
    assert result.exit_code == 2 and "give --data" in result.output
