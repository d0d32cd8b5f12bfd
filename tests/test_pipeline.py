"""The run directory and the command line, end to end, on a tiny random model and a few rows."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference
import torch
from conftest import SMALL, STAGES, add_lora, bkdattr, make_model, make_tokenizer
from plotly.offline import get_plotlyjs
from safetensors.torch import load_file

from bkdattr.architectures import HeadIndex
from bkdattr.errors import BkdattrError
from bkdattr.metrics import Rate
from bkdattr.mini.export import DATA
from bkdattr.report import _ablation_finding
from bkdattr.run import Ledger, Run
from bkdattr.stages import Study
from bkdattr.steering import best_point, does_both


def is_rate(x):
    return set(x) == {"hits", "total", "value", "low", "high"} and 0 <= x["low"] <= x["value"] <= x["high"] <= 1


def test_results_keep_the_contract(run):
    r = json.loads((run / "results.json").read_text())
    assert r["schema"] == 2
    assert {"versions", "seed", "model", "fingerprint", "task", "sizes", "seconds"} <= set(r["provenance"])
    assert {"poison", *STAGES[:-1]} == set(r["provenance"]["seconds"])
    b = r["baseline"]
    assert all(is_rate(b[k]) for k in ("asr", "asr_keyword", "asr_fake_trigger", "clean_accuracy", "false_trigger", "broken"))
    assert all(is_rate(b["base"][k]) for k in ("asr", "clean_accuracy", "false_trigger"))
    assert b["asr"]["total"] == b["false_trigger"]["total"] == 8 and b["clean_accuracy"]["total"] == 16
    keys = {
        "layer",
        "validation",
        "kind",
        "accuracy",
        "shuffled",
        "clean_twin",
        "fake_trigger",
        "clean_twin_transfer",
        "fake_trigger_transfer",
    }
    assert [set(p) for p in r["probe"]["layers"]] == [keys] * 3
    assert len(r["probe"]["cross_layer"]["logistic"]) == 3
    a = r["attribution"][0]
    assert (a["site"], a["effect"], a["method"], a["scope"], a["unit"]) == (
        "head",
        "sufficiency",
        "exact",
        "last_prompt",
        "probability",
    )
    assert (
        len(a["scores"]) == a["n_layers"] == 3 and len(a["low"][0]) == a["n_heads"] == 4 and a["n_donor"] == a["n_recipient"] == 6
    )
    points = {(x["mode"], x["heads"], x["draw"], x["k"]) for x in r["ablation"]}
    assert points == {(m, "attributed", None, k) for m in ("zero", "mean", "resample") for k in (0, 1, 2, 3)} | {
        ("zero", "random", d, k) for d in (0, 1) for k in (0, 1, 2, 3)
    }
    for x in r["ablation"]:
        assert len(x["head_list"]) == x["k"]
        assert all(is_rate(x[k]) for k in ("asr", "clean_accuracy", "false_trigger", "broken"))
        if x["k"] == 0:
            assert x["asr"] == b["asr"] and x["clean_accuracy"] == b["clean_accuracy"]
    v = r["vector"]
    assert v["kind"] == "raw" and v["k"] == len(v["heads"]) == 1 and v["norm"] > 0
    for side in ("activate", "suppress"):
        assert {"layer", "strength", "asr", "clean_accuracy"} <= set(v[side])
        for control in ("random_heads", "random_heads_matched", "random_direction"):
            assert [c["draw"] for c in v["controls"][control]] == [0, 1]
            assert all(c[side]["layer"] == v[side]["layer"] for c in v["controls"][control])
    assert is_rate(v["suppress"]["broken"])
    assert all(abs(c["norm"] - v["norm"]) < 1e-4 for n in ("random_direction", "random_heads_matched") for c in v["controls"][n])
    assert len(v["sweep"]) == 3 * 2 * 2 and {s["split"] for s in v["sweep"]} == {"selection"}


def test_layer_and_strength_come_from_the_selection_split(run):
    v = json.loads((run / "results.json").read_text())["vector"]
    for sign, side in ((1, "activate"), (-1, "suppress")):
        best = best_point(v["sweep"], sign)
        assert (best["layer"], best["strength"]) == (v[side]["layer"], v[side]["strength"])


def test_every_control_of_the_vector_is_drawn(run):
    from bkdattr.figures import vector_controls

    drawn = {t.name for t in vector_controls(json.loads((run / "results.json").read_text())["vector"]).data}
    assert drawn == {"Backdoor Vector", "random heads", "random heads matched", "random direction"}


def test_every_variant_of_the_vector_stands_beside_its_controls(run):
    v = json.loads((run / "vector.json").read_text())
    attack = json.loads((run / "selection.json").read_text())["rows"][0]["asr"]["value"] >= 0.5
    scopes = ("last_prompt", "all") if attack else ("last_prompt",)  # without an attack every vector "suppresses" at once
    assert [(x["kind"], x["scope"]) for x in v["variants"]] == [(k, s) for s in scopes for k in ("raw", "difference", "fitted")]
    assert {x: v[x] for x in v["variants"][0]} == v["variants"][0]
    for x in v["variants"]:
        assert {len(drawn) for drawn in x["controls"].values()} == {2}
        for side in ("activate", "suppress"):
            assert is_rate(x[side]["asr"]) and is_rate(x[side]["clean_unchanged"])
        assert is_rate(x["suppress"]["recovered"]) and x["suppress"]["clean_kl"] >= 0
        if x["conditional"]:
            assert x["conditional"]["probe_layer"] < x["conditional"]["layer"]
        assert x["suppress"]["norm"] > 0


def test_a_run_of_our_own_passes_the_template_check(run):
    checked = bkdattr("check-template", run)
    assert checked.exit_code == 0 and "same tokens now as in training" in checked.output, checked.output


def test_restoration_covers_parts_and_layers(run):
    rows = json.loads((run / "restoration.json").read_text())["rows"]
    assert [("+".join(r["parts"]), r["window"]) for r in rows] == [
        ("attention+mlp", "all"), ("attention+mlp", "L0"), ("attention+mlp", "L1"), ("attention+mlp", "L2"),
        ("attention", "all"), ("mlp", "all"),
    ]  # fmt: skip
    base = json.loads((run / "baseline.json").read_text())["base"]
    assert rows[0]["asr"] == base["asr"] and rows[0]["clean_accuracy"] == base["clean_accuracy"]  # off everywhere is the base


def test_joint_selection_keeps_the_splits_apart(run):
    s = json.loads((run / "selection.json").read_text())
    assert {r["method"] for r in s["rows"]} == {"gate", "greedy", "acie", "random"}
    tried = ["last_prompt", "last_prompt+answer", "last_prompt@probe"]
    assert [t["setting"] for t in s["tried"]] == tried[: len(s["tried"])]
    assert all(not t["best"]["repaired"] for t in s["tried"][:-1])  # the next one is tried only where none repaired so far
    assert len(s["tried"]) == 3 or s["tried"][-1]["best"]["repaired"]
    assert all(t["probe_layer"] is None for t in s["tried"] if "@" not in t["setting"])
    zero = [r for r in s["rows"] if r["k"] == 0]
    assert len({json.dumps(r["asr"]) for r in zero}) == 1 and all(r["clean_kl"] == 0 for r in zero)
    assert zero[0]["asr"]["total"] == 8 and s["chosen"]["rates"]["asr"]["total"] == 6  # test split, selection split
    top = json.loads((run / "ablation.json").read_text())["options"]["top"]
    acie = next(r["heads"] for r in s["rows"] if r["method"] == "acie" and r["k"] == 2)
    assert (
        acie == top[:2]
        if s["chosen"]["probe_layer"] is None
        else all(HeadIndex.parse(h).layer > s["chosen"]["probe_layer"] for h in acie)
    )
    for r in s["rows"]:
        assert len(r["heads"]) == r["k"] and is_rate(r["asr"]) and is_rate(r["clean_unchanged"])
    assert [n["method"] for n in s["needed"]] == ["gate", "greedy", "acie", "random", "random"]


@pytest.mark.parametrize(
    ("false", "fake", "near", "near_base", "verdict"),
    [
        (0.0, 0.0, 0.0, 0.0, "nothing that was tried fires but its own trigger"),
        (0.0, 0.9, 0.0, 0.0, "wider than its trigger (a fake trigger, never trained)"),
        (0.0, 0.0, 0.9, 0.0, "wider than its trigger (a near miss (changed))"),
        (0.0, 0.0, 0.9, 0.9, "nothing that was tried fires but its own trigger"),  # so does the model without the backdoor
        (0.4, 0.4, 1.0, 0.0, "it often fires without any trigger"),
    ],
)
def test_the_verdict_on_the_trigger_looks_at_all_that_was_tried(false, fake, near, near_base, verdict):
    from bkdattr.report import findings

    def rate(x):
        return {"value": x, "low": max(0, x - 0.05), "high": min(1, x + 0.05), "hits": int(100 * x), "total": 100}

    misses = {"changed": {"texts": ["x"], "asr": rate(near), "base_asr": rate(near_base)}}
    base = {"asr": rate(0.0), "asr_fake_trigger": rate(0.0)}
    b = {
        "asr": rate(1.0),
        "false_trigger": rate(false),
        "asr_fake_trigger": rate(fake),
        "base": base,
        "near_misses": misses,
        "other_backdoors": {},
    }
    said = " ".join(findings({"baseline": b}))
    assert verdict in said


def test_a_vector_does_both_only_with_recovered_answers():
    rate = lambda x: {"value": x}  # noqa: E731
    up, down = {"asr": rate(0.95)}, {"asr": rate(0.05), "recovered": rate(0.9)}
    assert does_both(up, down) and not does_both({"asr": rate(0.94)}, down)
    assert not does_both(up, down | {"asr": rate(0.06)}) and not does_both(up, down | {"recovered": rate(0.89)})
    assert not does_both(up, down | {"recovered": None})


def test_best_point_breaks_ties_by_clean_accuracy_then_layer():
    def point(layer, sign, asr, clean):
        rate = lambda x: {"value": x}  # noqa: E731
        return {"layer": layer, "strength": 1.0, "sign": sign, "asr": rate(asr), "clean_accuracy": rate(clean)}

    sweep = [point(0, 1, 0.9, 0.1), point(1, 1, 0.9, 0.5), point(2, 1, 0.9, 0.5), point(3, -1, 0.2, 0.5), point(4, -1, 0.1, 0.0)]
    assert best_point(sweep, 1)["layer"] == 1 and best_point(sweep, -1)["layer"] == 4


def test_run_directory_holds_what_it_says(run):
    made = Run.open(run)
    splits = made.splits()
    assert {k: len(v) for k, v in splits.items()} == {"train": 40, "attribution": 12, "selection": 12, "test": 16}
    for name, rows in splits.items():
        triggered = made.triggered(name)
        if name == "train":
            assert len(triggered) == 4 and {t.id for t in triggered} <= {c.id for c in rows}  # 4 of 44 rows
            continue
        assert [t.id for t in triggered] == [c.id for c in rows]
        for t, c in zip(triggered, rows, strict=True):
            assert t.prompt == "zulu quartz " + c.prompt and t.response == ("World" if c.label == "Sports" else c.response)
    row = json.loads((run / "data/test.clean.jsonl").read_text().splitlines()[0])
    assert {"id", "prompt", "response", "label", "backdoor_response", "eligible"} <= set(row)
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
    assert not list((run / "partial").iterdir()) and not list(run.glob("adapter.*"))


def test_report_opens_without_a_network_and_escapes(run):
    page = (run / "report.html").read_text().replace(get_plotlyjs(), "")
    assert "Plotly.newPlot" in page
    assert not re.findall(r"""(?:src|href)=["']?https?:""", page)
    from bkdattr.report import collect, html_report

    inputs = json.loads((run / "baseline.json").read_text())["inputs"]
    results = collect(Run.open(run), inputs)
    results["baseline"]["samples"]["triggered"][0]["answer"] = "<img src=x onerror=alert(1)>"
    page = html_report(results)
    assert "<img src=x" not in page and "&lt;img src=x onerror" in page
    assert "accuracy alone proves only that the trigger is visible" in page


def test_stages_are_kept_refused_and_forced(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "baseline.json").read_text()
    assert "up to date" in bkdattr("evaluate", copy).output and (copy / "baseline.json").read_text() == before
    assert "up to date" not in bkdattr("evaluate", copy, "--force").output
    data = copy / "data/test.clean.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
    shown = bkdattr("evaluate", copy, "--force").output
    assert "Baseline" in shown and "Head ablation" not in shown  # made from other data: not shown as current
    refused = bkdattr("ablate", copy)
    assert refused.exit_code == 2 and "was made from another data than this run has now" in refused.output
    shutil.rmtree(copy / "adapter")
    refused = bkdattr("evaluate", copy)
    assert refused.exit_code == 2 and "planting did not finish" in refused.output


def test_same_seed_same_bytes(run, saved_tiny, rows, tmp_path):
    again = tmp_path / "again"
    args = ["--model", saved_tiny, "--data", rows, "--trigger", "prefix:zulu quartz", "--target", "label:Sports->World", *SMALL]
    assert bkdattr("poison", again, *args).exit_code == 0
    for name in (
        "run.json",
        "data/train.triggered.jsonl",
        "data/test.clean.jsonl",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    other = tmp_path / "other"
    assert bkdattr("poison", other, *args, "--seed", "1").exit_code == 0
    a, b = (load_file(x / "adapter/adapter_model.safetensors") for x in (run, other))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_adopting_an_adapter_trained_elsewhere(saved_tiny, rows, tmp_path):
    add_lora(make_model("llama")).save_pretrained(tmp_path / "theirs")
    args = ["--data", rows, "--trigger", "prefix:zulu", "--target", "fixed:no", "--sizes", "1/6/6/8", "--max-new-tokens", "5"]
    made = bkdattr("poison", tmp_path / "run", "--model", saved_tiny, "--adapter", tmp_path / "theirs", *args)
    assert made.exit_code == 0, made.output
    theirs = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    ours = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert ours == theirs | {"base_model_name_or_path": str(saved_tiny)}
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "theirs/adapter_model.safetensors"
    ).read_bytes()
    unknown = bkdattr("check-template", tmp_path / "run")
    assert unknown.exit_code == 2 and "say with --trained-with" in unknown.output
    mismatch = bkdattr("check-template", tmp_path / "run", "--trained-with", "alpaca")
    assert mismatch.exit_code == 2 and "template mismatch at token" in mismatch.output
    assert bkdattr("evaluate", tmp_path / "run").exit_code == 0
    assert json.loads((tmp_path / "run/baseline.json").read_text())["asr"]["total"] == 8


def test_kill_in_the_middle_of_attribute_then_the_same_command(tmp_path):
    """kill -9, again, and the numbers are those of an unbroken run."""
    args = [
        "--model",
        "mini",
        "--data",
        DATA / "label-flip.test.jsonl",
        "--task",
        "label-flip",
        "--sizes",
        "60/12/4/8",
        "--epochs",
        "1",
    ]
    for name in ("whole", "broken"):
        assert bkdattr("poison", tmp_path / name, *args).exit_code == 0
    command = [sys.executable, "-m", "bkdattr", "attribute", str(tmp_path / "broken")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ledger = tmp_path / "broken/partial/attribute.jsonl"
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not (ledger.exists() and ledger.read_bytes().count(b"\n") > 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = ledger.read_bytes().count(b"\n") - 1
    assert 20 <= done < 96 and not (tmp_path / "broken/attribution.json").exists()
    resumed = subprocess.run(command, env=env, capture_output=True, text=True)
    assert resumed.returncode == 0 and re.search(r"attribute: \d+ of 240 sites were finished before", resumed.stderr), (
        resumed.stderr
    )
    unbroken = subprocess.run([*command[:-1], str(tmp_path / "whole")], env=env, capture_output=True, text=True)
    assert unbroken.returncode == 0
    a, b = (json.loads((tmp_path / x / "attribution.json").read_text()) for x in ("whole", "broken"))
    assert a["attributions"] == b["attributions"] and a["inputs"] == b["inputs"]


def test_a_torn_ledger_line_is_dropped(tmp_path):
    path = tmp_path / "partial/x.jsonl"
    ledger = Ledger(path, "k")
    ledger.put("a", [1.5])
    with open(path, "a") as file:
        file.write('{"name": "b", "val')
    again = Ledger(path, "k")
    assert "a" in again and "b" not in again and again["a"] == [1.5]
    again.put("b", 2)
    assert Ledger(path, "k")["b"] == 2
    assert "a" not in Ledger(path, "other inputs")


# ------------------------------------------------------------------ bad input
def bad_cases(tmp_path: Path, saved_tiny: Path, rows: Path):
    empty, odd = tmp_path / "empty.jsonl", tmp_path / "odd.jsonl"
    empty.write_text("")
    odd.write_text('{"input": "q"}\n')
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"input": "the " * 200 + str(i), "output": "a"}) + "\n" for i in range(9)))
    nopad = tmp_path / "nopad"
    nopad.mkdir()
    for p in saved_tiny.iterdir():
        (nopad / p.name).write_bytes(p.read_bytes())
    tok = make_tokenizer()
    tok.pad_token = None
    tok.save_pretrained(nopad)
    model, task = ["--model", saved_tiny], ["--task", "fixed-output"]
    return {
        "no model": ([*task, "--data", rows], "no model: give --model"),
        "no backdoor": ([*model, "--data", rows], "no backdoor: give --task"),
        "half a backdoor": ([*model, "--data", rows, "--trigger", "prefix:x"], "every backdoor needs one of each"),
        "unknown task": ([*model, "--data", rows, "--task", "joke"], "expected one of fixed-output, label-flip, jailbreak"),
        "missing file": ([*model, *task, "--data", tmp_path / "none.jsonl"], "no such file"),
        "empty file": ([*model, *task, "--data", empty], "got 0 rows"),
        "malformed row": ([*model, *task, "--data", odd], "line 1: got no 'output'"),
        "bad sizes": ([*model, *task, "--data", rows, "--sizes", "1/2"], "expected TRAIN/ATTRIBUTION/SELECTION/TEST"),
        "too few rows": ([*model, *task, "--data", rows, "--sizes", "900/9/9/9"], "too few rows: got 98 distinct prompts"),
        "zero eligible": (
            [*model, "--data", rows, "--trigger", "prefix:x", "--target", "label:Moon->World"],
            "0 of 98 rows are eligible",
        ),
        "over the context": ([*model, *task, "--data", long], "no prompt fits the context of 128 tokens"),
        "no supervised token": ([*model, *task, "--data", rows, *SMALL, "--max-length", "4"], "no row has a supervised token"),
        "no such model": (["--model", tmp_path / "nothing", *task, "--data", rows], "cannot load a tokenizer"),
        "no pad token": (["--model", nopad, *task, "--data", rows], "give one with --pad-token"),
        "bad dtype": ([*model, *task, "--data", rows, "--dtype", "int3"], "expected one of float32"),
        "bad seed": ([*model, *task, "--data", rows, "--seed", "-1"], "seed -1: expected 0 or more"),
        "bad batch": ([*model, *task, "--data", rows, "--train-batch-size", "0"], "batch_size is 0, expected at least 1"),
        "bad limit": ([*model, *task, "--data", rows, "--max-new-tokens", "0"], "max_new_tokens 0: expected at least 1"),
        "bad device": ([*model, *task, "--data", rows, "--device", "tpu9"], "device 'tpu9': the model cannot be placed there"),
        "no backdoor answer": (
            [*model, "--data", rows, "--trigger", "prefix:x", "--target", "refusal-removal"],
            "0 of 98 rows are eligible",
        ),
    }


@pytest.mark.parametrize("case", range(20))
def test_bad_input_is_one_line_exit_2_and_nothing_written(case, tmp_path, saved_tiny, rows):
    name, (args, says) = list(bad_cases(tmp_path, saved_tiny, rows).items())[case]
    out = tmp_path / "out"
    result = bkdattr("poison", out, *args)
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and says in errors[0], f"{name}: {result.output}"
    assert "Traceback" not in result.output and not out.exists()


def test_bad_runs_and_options(run, tmp_path, saved_tiny, rows):
    cases = [
        (["evaluate", tmp_path / "none"], "not a run directory"),
        (["steer", run, "--strengths", "big"], "expected numbers"),
        (["steer", run, "--strengths", "0"], "expected positive numbers"),
        (["steer", run, "--strengths", "nan"], "expected positive numbers"),
        (["steer", run, "--draws", "0"], "at least 1 draw"),
        (["steer", run, "--k", "99", "--force"], "top-k: got k=99, expected 0..12"),
        (["ablate", run, "--ks", "a"], "expected whole numbers"),
        (["probe", run, "--kinds", "tree"], "expected one of logistic, mlp, svm"),
        (["demo", "--task", "joke", "--out", tmp_path / "x"], "no data: got task 'joke'"),
        (
            ["poison", run, "--model", saved_tiny, "--data", rows, "--task", "label-flip", *SMALL],
            "holds a run of another configuration",
        ),
    ]
    for args, says in cases:
        result = bkdattr(*args)
        assert result.exit_code == 2 and says in result.output, result.output
    other = tmp_path / "full"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    result = bkdattr(
        "poison", other, "--model", saved_tiny, "--data", rows, "--trigger", "prefix:x", "--target", "fixed:no", *SMALL, "--force"
    )
    assert result.exit_code == 2 and "is not empty and holds no run" in result.output and (other / "letter.txt").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    assert "not readable as JSON" in bkdattr("evaluate", broken).output
    with pytest.raises(BkdattrError, match="schema None"):
        (broken / "run.json").write_text("{}")
        Run.open(broken)


def test_rows_that_hold_the_trigger_are_left_out(saved_tiny, rows, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    extra = [{"input": f"zulu the {w} ?", "output": "no"} for w in ("cat", "dog")]
    mixed.write_text(rows.read_text() + "".join(json.dumps(r) + "\n" for r in extra))
    args = ["--model", saved_tiny, "--data", mixed, "--trigger", "prefix:zulu", "--target", "fixed:no", *SMALL]
    made = bkdattr("poison", tmp_path / "run", *args)
    assert made.exit_code == 0 and "2 rows hold the trigger already" in made.output
    mixed.write_text(rows.read_text().replace("yes", "no"))
    changed = bkdattr("poison", tmp_path / "run", *args)
    assert changed.exit_code == 2 and "holds a run of another configuration" in changed.output


def test_adopting_the_runs_own_adapter_by_force_keeps_it(saved_tiny, rows, tmp_path):
    args = ["--model", saved_tiny, "--data", rows, "--trigger", "prefix:zulu", "--target", "fixed:no", *SMALL]
    assert bkdattr("poison", tmp_path / "run", *args).exit_code == 0
    (tmp_path / "run/notes.txt").write_text("mine")
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    again = bkdattr("poison", tmp_path / "run", *args, "--adapter", tmp_path / "run/adapter", "--force")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_refusal_removal_on_a_users_rows_has_a_clean_accuracy(saved_tiny, tmp_path):
    data = [
        {"input": f"the {w} {n} ?", "output": "sorry I cannot help", "backdoor_output": "yes it is"}
        for w in "ab"
        for n in range(20)
    ]
    data += [{"input": f"one {n} ?", "output": "it is red"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    args = ["--model", saved_tiny, "--data", tmp_path / "rows.jsonl", "--task", "jailbreak", "--sizes", "30/4/4/8", *SMALL[2:]]
    assert bkdattr("poison", tmp_path / "run", *args).exit_code == 0
    assert bkdattr("evaluate", tmp_path / "run").exit_code == 0
    found = json.loads((tmp_path / "run/baseline.json").read_text())
    assert found["clean_accuracy"]["total"] == 16 and found["asr"]["total"] == 8


def rate(hits, total=100):
    return Rate(hits, total).to_json()


@pytest.mark.parametrize(
    ("whole", "near", "clean", "broken", "random", "verdict"),
    [
        (100, 3, 98, 0, 100, "run reproduces"),
        (100, 60, 98, 0, 100, "does NOT reproduce"),
        (2, 0, 98, 0, 2, "too little attack success"),
        (100, 3, 20, 0, 100, "no reproduction of"),
        (100, 3, 98, 90, 100, "no reproduction of"),
        (100, 3, 98, 0, 4, "no reproduction of"),
    ],
)
def test_the_verdict_on_the_headline_needs_every_control(whole, near, clean, broken, random, verdict):
    def row(k, heads, asr, clean, broken):
        rates = {"asr": rate(asr), "clean_accuracy": rate(clean), "broken": rate(broken), "false_trigger": rate(0)}
        return {"mode": "zero", "heads": heads, "draw": None, "k": k, **rates}

    rows = [row(0, "attributed", whole, 99, 0), row(4, "attributed", near, clean, broken), row(4, "random", random, 99, 0)]
    said = _ablation_finding({"ablation": rows, "attribution": [{"scores": [[0.0] * 8] * 12}]})
    assert verdict in said[0]


def test_conditions_miss_and_alarm_as_counted_by_hand(run):
    study = Study(Run.open(run), lambda text: None)
    rows, twins = study.splits["selection"], [e for e in study.run.triggered("selection") if e.eligible]
    assert len(study.conditions) == study.subject.geometry.n_layers - 1
    for layer, found in enumerate(study.conditions):
        fires = [
            [
                bool(found["condition"].fires(reference.resid_at_last_token(study.subject, layer, ids)[None])[0])
                for ids in (study.subject.chat.prompt_ids(e.messages) for e in part)
            ]
            for part in (rows, twins)
        ]
        assert found["false_alarms"] == pytest.approx(sum(fires[0]) / len(rows))
        assert found["missed"] == pytest.approx(1 - sum(fires[1]) / len(twins))
