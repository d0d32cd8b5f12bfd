"""Many runs on Ray: rows, failures, retries, and going on."""

import functools
import json

import pytest
from conftest import bkdattr

from bkdattr.errors import BkdattrError
from bkdattr.options import KNOWN, plan_of
from bkdattr.sweep import Sweep

FILE = """
out = "{out}"
stages = ["evaluate", "attribute"]

[every]
model = "{model}"
data = "{data}"
trigger = "prefix:zulu quartz"
target = "fixed:no it is old"
sizes = "20/4/4/6"
epochs = 1
train_batch_size = 8
max_new_tokens = 4
max_length = 96

[grid]
seed = [0, 1]

[[run]]
name = "broken"
target = "{target}"

[attribute]
method = "hybrid"
fraction = 0.5
"""


def test_a_sweep_makes_its_runs_lists_failures_and_goes_on(tmp_path, saved_tiny, rows):
    pytest.importorskip("ray")
    file, out = tmp_path / "sweep.toml", tmp_path / "runs"
    file.write_text(FILE.format(out=out, model=saved_tiny, data=rows, target="label:Moon->Sun"))
    result = bkdattr("sweep", file)
    assert result.exit_code == 2 and "failed: broken" in result.stderr and "2 of 3 runs finished" in result.stderr, result.stderr
    found = {r["name"]: r for r in json.loads((out / "sweep.json").read_text())}
    assert set(found) == {"0", "1", "broken"}
    assert found["broken"]["status"] == "failed" and "BkdattrError" in found["broken"]["error"]
    assert found["broken"]["attempts"] == 1  # bad input is not tried again at once
    for seed in ("0", "1"):
        assert found[seed]["status"] == "finished" and found[seed]["asr"]["total"] == 6
        made = json.loads((out / seed / "run" / "attribution.json").read_text())
        assert made["attributions"][0]["method"] == "hybrid"
    kept = (out / "0/run/results.json").stat().st_mtime_ns
    file.write_text(FILE.format(out=out, model=saved_tiny, data=rows, target="fixed:the cat runs"))
    result = bkdattr("sweep", file)
    assert result.exit_code == 0 and "2 of 3 runs were finished before" in result.stderr, result.stderr
    assert (out / "0/run/results.json").stat().st_mtime_ns == kept
    assert [r["status"] for r in json.loads((out / "sweep.json").read_text())] == ["finished"] * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[grid]\nseed = [0]", "expected out, stages"),
        ('out = "x"', r"\[grid\] of lists or a \[\[run\]\]"),
        ('out = "x"\n[grid]\nsed = [0]', "unknown option 'sed'"),
        ('out = "x"\nstages = ["steal"]\n[grid]\nseed = [0]', "steal"),
        ('out = "x"\n[[run]]\nseed = 0\n[[run]]\nseed = 0', "two runs are named '0'"),
        ("out = ", "not a readable TOML file"),
    ],
)
def test_bad_sweep_files(tmp_path, text, said):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(BkdattrError, match=said):
        Sweep.read(path)


def test_a_misspelt_stage_option_is_refused_before_any_run(tmp_path):
    from bkdattr.sweep import run_sweep

    pytest.importorskip("ray")
    with pytest.raises(
        BkdattrError, match=r"\[attribute\] of the sweep: unknown option 'fracton', expected some of method, fraction"
    ):
        run_sweep(Sweep(tmp_path, {"a": {"seed": 0}}, ("attribute",), {"attribute": {"fracton": 0.5}}))


def test_names_of_paths_keep_apart_and_relative_ones_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    (tmp_path / "sweep.toml").write_text('out = "o"\n[grid]\nadapter = ["a/adapter", "b/adapter"]\nseed = [0]\n')
    sweep = Sweep.read("sweep.toml")
    assert list(sweep.runs) == ["a-adapter-0", "b-adapter-0"]
    assert sweep.runs["a-adapter-0"]["adapter"] == str(tmp_path / "a/adapter")


def test_a_crash_is_tried_again_and_named(tmp_path, monkeypatch):
    import bkdattr.sweep as module

    class Ray:
        """Runs everything at once, in this process."""

        def remote(self, **options):
            def wrap(run):
                return type("Task", (), {"remote": staticmethod(lambda *args: functools.partial(run, *args))})

            return wrap

        def wait(self, tasks, num_returns):
            return tasks[:1], tasks[1:]

        def get(self, task):
            return task()

    tries = []

    def crash(folder, *rest):
        tries.append(folder)
        if "a" in folder.rsplit("/", 1)[-1] or len(tries) < 4:
            raise RuntimeError("CUDA error:\n no kernel")
        return {"asr": None}

    monkeypatch.setattr(module, "run_one", crash)
    sweep = Sweep(tmp_path, {"a": {"seed": 0}, "b": {"seed": 1}}, ("evaluate",), {}, retries=2)
    rows = {r["name"]: r for r in module._on_ray(Ray(), sweep, ["a", "b"])}
    assert (
        rows["a"]["status"] == "failed"
        and rows["a"]["attempts"] == 3
        and "RuntimeError: CUDA error: no kernel" in rows["a"]["error"]
    )
    assert rows["b"]["status"] == "finished" and rows["b"]["error"] is None and rows["b"]["attempts"] <= 3


def test_a_plan_takes_every_option_of_the_command_line():
    import inspect

    from bkdattr.cli import poison

    assert set(inspect.signature(poison).parameters) - {"run", "force"} == set(KNOWN) - {"clean"}
    plan = plan_of(
        {"model": "m", "data": "d", "task": "jailbreak", "lr": 0.01, "labels": "A, B", "sizes": "9/1/1/1", "clean": True}
    )
    assert (plan.recipe.learning_rate, plan.labels, plan.sizes.train, plan.clean) == (0.01, ("A", "B"), 9, True)
    with pytest.raises(BkdattrError, match="unknown option 'learning_rate'"):
        plan_of({"model": "m", "learning_rate": 1})
