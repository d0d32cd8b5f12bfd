"""More than one process, and weights that are not where they run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bkdattr, make_subject
from test_attribution import twins

from bkdattr import shards
from bkdattr.attribution import baha
from bkdattr.errors import BkdattrError
from bkdattr.model import load_subject
from bkdattr.traces import contributions, trace_prompts
from bkdattr.vector import BackdoorVector

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "run"
    sizes = ["--sizes", "60/7/4/8", "--epochs", "1"]
    args = ["--model", "mini", "--data", DATA / "label-flip.test.jsonl", "--task", "label-flip", *sizes]
    assert bkdattr("poison", folder, *args).exit_code == 0
    return folder


def launch(*command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launcher, "-m", "bkdattr", *map(str, command)], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("method", ["exact", "hybrid"])
def test_two_processes_give_the_numbers_of_one(planted, tmp_path, method):
    """Seven recipients, so that the parts differ in size."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder in (alone, shared):
        shutil.copytree(planted, folder)
    assert bkdattr("attribute", alone, "--method", method).exit_code == 0
    found = launch("attribute", shared, "--method", method)
    assert found.returncode == 0, found.stderr[-2000:]
    a, b = (json.loads((x / "attribution.json").read_text()) for x in (alone, shared))
    assert a["inputs"] == b["inputs"] and len(a["attributions"]) == 6
    for one, two in zip(a["attributions"], b["attributions"], strict=True):
        assert two["n_recipient"] == 7
        for name in ("scores", "low", "high"):
            np.testing.assert_allclose(two[name], one[name], atol=1e-6)
    assert np.abs(a["attributions"][0]["scores"]).max() > 0


def test_other_stages_are_not_shared(planted):
    found = launch("evaluate", planted)
    assert launch("poison", planted / "other", "--model", "mini", "--task", "jailbreak").returncode != 0
    assert not (planted / "other").exists()
    assert found.returncode != 0 and "is not shared over processes: got 2" in found.stderr
    assert not (planted / "baseline.json").exists()


def test_shares_cover_all_prompts_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for r in range(3):
        monkeypatch.setenv("RANK", str(r))
        monkeypatch.setenv("LOCAL_RANK", str(r))
        seen += shards.mine(7)
        assert shards.device("cuda") == f"cuda:{r}" and shards.device("cpu") == "cpu"
    assert sorted(seen) == list(range(7))
    with pytest.raises(BkdattrError, match="2 prompts for 3 processes"):
        shards.mine(2)
    with pytest.raises(BkdattrError, match="expected 'cuda'"):
        shards.device("auto")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(BkdattrError, match="LOCAL_RANK is not set"):
        shards.rank()


def test_offloaded_layers_give_the_numbers_of_loaded_ones():
    """Two layers' weights are kept away and fetched when they run, as a device map does with what does not fit."""
    from accelerate import cpu_offload

    whole, spread = make_subject("llama"), make_subject("llama")
    before = spread.fingerprint
    for layer in (0, 2):
        cpu_offload(spread.sites[layer].layer, execution_device=torch.device("cpu"))
    assert next(spread.sites[2].out_proj.parameters()).device.type == "meta"
    again = type(spread)(spread.model, spread.chat)  # nothing kept from before
    assert again.fingerprint == before == whole.fingerprint
    clean, triggered = twins()
    one, two = (baha(s, clean, triggered) for s in (whole, again))
    np.testing.assert_allclose(two.scores, one.scores, atol=1e-7)
    z = trace_prompts(whole, triggered).mean_z
    torch.testing.assert_close(contributions(again, 2, z[2]), contributions(whole, 2, z[2]))
    v, w = (BackdoorVector.from_heads(s, one.top(2), z) for s in (whole, again))
    torch.testing.assert_close(v.direction, w.direction)


def test_device_auto_loads_and_attributes(saved_tiny):
    plain, auto = (load_subject(saved_tiny, device=d) for d in ("cpu", "auto"))
    assert auto.fingerprint == plain.fingerprint
    clean, triggered = twins()
    np.testing.assert_allclose(baha(auto, clean, triggered).scores, baha(plain, clean, triggered).scores, atol=1e-7)
