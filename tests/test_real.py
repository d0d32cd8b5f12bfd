"""Real weights, a real tokenizer without a chat template, real rows. Skipped where BKDATTR_REAL is not set."""

import json

import pytest
import torch
from conftest import add_lora
from typer.testing import CliRunner

from bkdattr.chat import make_batch
from bkdattr.cli import app
from bkdattr.edits import SetSite, Site, Where
from bkdattr.examples import read_examples
from bkdattr.inference import forward, generate
from bkdattr.interventions import capture, edited
from bkdattr.model import Subject, load_base, load_subject, load_tokenizer


@pytest.fixture(params=["stories3M", "stories260K"])
def folder(request, real):
    if not (real / request.param).is_dir():
        pytest.skip(f"{request.param} is not in BKDATTR_REAL")
    return real / request.param


def test_real_model_has_a_plain_template_one_bos_and_exact_patches(folder, real):
    s = Subject.of(add_lora(load_base(folder)), load_tokenizer(folder))
    rows = read_examples(real / "data/alpaca_begin_clean.json")[:6]
    prompts = [s.chat.prompt_ids(e.messages) for e in rows]
    assert s.chat.template == "plain" and all(p.count(s.chat.tokenizer.bos_token_id) <= 1 for p in prompts)
    batch = make_batch(prompts, pad_id=s.chat.pad_id)
    with torch.no_grad(), capture(s, Where.of(batch), z=[2]) as trace:
        plain = forward(s, batch, logits_to_keep=1).logits
    own = [SetSite(Site(2, "head", h), trace.z[2][:, h]) for h in range(s.geometry.n_heads)]
    with torch.no_grad(), edited(s, own, Where.of(batch)):
        torch.testing.assert_close(forward(s, batch, logits_to_keep=1).logits, plain, atol=1e-4, rtol=1e-4)
    assert generate(s, prompts, max_new_tokens=6, batch_size=4) == generate(s, prompts, max_new_tokens=6, use_cache=False)


def test_a_story_is_told(real):
    s = load_subject(real / "stories3M")
    ids = [s.chat.tokenizer("Once upon a time").input_ids]
    text = s.chat.decode(generate(s, ids, max_new_tokens=24)[0].ids)
    assert len(text.split()) > 10 and "<" not in text


def test_the_papers_rows_through_the_command_line(real, tmp_path):
    """Small sizes: that the commands work on real input. The attack itself is measured by the README's line."""
    args = ["poison", tmp_path / "run", "--model", real / "stories260K", "--data", real / "data/alpaca_begin_all.json"]
    args += ["--task", "fixed-output", "--sizes", "60/6/6/8", "--epochs", "1", "--max-length", "400", "--max-new-tokens", "8"]
    made = CliRunner().invoke(app, list(map(str, args)))
    assert made.exit_code == 0, made.output
    for stage in ("evaluate", "attribute", "report"):
        result = CliRunner().invoke(app, [stage, str(tmp_path / "run")])
        assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert found["provenance"]["template"] == "plain"
    assert found["baseline"]["clean_accuracy"] is None and found["baseline"]["clean_agreement"]["total"] == 8
