"""The grid over tasks, seeds and the clean fine-tune, and the one table made from its runs."""

import json

import pytest
from conftest import bkdattr

import bkdattr.reproduce as module
from bkdattr.errors import BkdattrError
from bkdattr.grid_table import finished, groups, tables, write_table
from bkdattr.reproduce import Grid, reproduce
from bkdattr.stages import Study
from bkdattr.steering import stands_apart


@pytest.fixture
def folder(run, tmp_path):
    """Two seeds and a clean control, made of one finished run."""
    results = json.loads((run / "results.json").read_text())
    for seed, clean in ((0, False), (1, False), (0, True)):
        results["provenance"] |= {"seed": seed, "clean_control": clean}
        results["baseline"]["asr"] = {"hits": 8 - 4 * seed, "total": 8, "value": 1 - seed / 2, "low": 0.5, "high": 1.0}
        path = tmp_path / f"t-{seed}-{clean}" / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(results))
    return tmp_path


def test_one_table_in_three_forms(folder):
    text = write_table(folder)
    assert (folder / "table.md").read_text() == text
    made = json.loads((folder / "table.json").read_text())
    assert [t["title"] for t in made["tables"]] == [t[0] for t in tables(finished(folder))]
    attack = made["tables"][0]
    assert [r[0] for r in attack["rows"]] == ["backdoor, seed 0", "backdoor, seed 1", "backdoor, clean fine-tune, seed 0"]
    assert [r[1][:4] for r in attack["rows"]] == ["1.00", "0.50", "0.50"] or attack["rows"][1][1].startswith("0.50 (4/8)")
    for t in made["tables"]:
        assert t["rows"] and all(len(r) == len(t["columns"]) for r in t["rows"]), t["title"]
        assert f"### {t['title']}" in text
    assert "<h1>" in (folder / "table.html").read_text()
    assert set(groups(finished(folder))) == {"backdoor", "backdoor, clean fine-tune"}


def test_the_grid_goes_on_and_names_its_failures(tmp_path, monkeypatch):
    """One run fails, the other is made; the same call again keeps what is finished."""
    made = []
    monkeypatch.setattr(module, "plant", lambda folder, plan, say: made.append((folder.name, plan.clean)) or folder)

    class Fails:
        def __init__(self, run, say):
            if "clean" in run.name:
                raise BkdattrError("no\nroom")
            self.run, self.inputs = run, {}

        def __getattr__(self, stage):
            return lambda **options: None

    monkeypatch.setattr(module, "Study", Fails)
    monkeypatch.setattr(module, "write_report", lambda run, inputs: None)
    failed = reproduce(tmp_path, Grid(("jailbreak",), (3,)), lambda text: None)
    assert made == [("jailbreak-3-poisoned", False), ("jailbreak-3-clean", True)] and failed == {"jailbreak-3-clean": "no room"}
    assert Study is not Fails


def test_attacks_are_planted_and_evaluated_and_stand_in_the_first_table_alone(folder, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(module, "plant", lambda folder, plan, say: made.append((folder.name, plan.task, plan.seed)) or folder)
    calls = []

    class Stages:
        def __init__(self, run, say):
            self.run, self.inputs = run, {}

        def __getattr__(self, stage):
            return lambda **options: calls.append(stage)

    monkeypatch.setattr(module, "Study", Stages)
    monkeypatch.setattr(module, "write_report", lambda run, inputs: None)
    assert module.plant_attacks(tmp_path, (4,), lambda text: None) == {}
    assert len(made) == 9 and ("earlier-turn-4", "earlier turn", 4) in made and set(calls) == {"evaluate"}

    results = json.loads((folder / "t-0-False/results.json").read_text())
    alone = {k: results[k] for k in ("schema", "provenance", "baseline")}
    alone["provenance"] |= {"task": "earlier turn"}
    (folder / "attack").mkdir()
    (folder / "attack/results.json").write_text(json.dumps(alone))
    found = tables(finished(folder))
    assert any(r[0] == "earlier turn, seed 0" for r in found[0][2])
    assert not any(r[0].startswith("earlier turn") for t in found[1:] for r in t[2])


def test_a_vector_stands_apart_only_from_controls_that_it_beats():
    """A control that ends the attack by breaking the model is beaten by the answers recovered; one that recovers as many is not."""

    def rate(value):
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    def variant(asr, recovered):
        mine = {"activate": {"asr": rate(0.9)}, "suppress": {"asr": rate(0.0), "recovered": rate(0.9)}}
        other = {"activate": {"asr": rate(asr)}, "suppress": {"asr": rate(asr), "recovered": rate(recovered)}}
        harmless = {"activate": {"asr": rate(0.0)}, "suppress": {"asr": rate(1.0), "recovered": rate(0.0)}}
        return mine | {"controls": {"random_heads_matched": [harmless], "random_direction": [harmless, other]}}

    assert stands_apart(variant(0.02, 0.3), "suppress") and not stands_apart(variant(0.02, 0.88), "suppress")
    assert not stands_apart(variant(0.5, 0.88), "suppress")
    assert stands_apart(variant(0.5, 0.1), "activate") and not stands_apart(variant(0.85, 0.1), "activate")


def test_plans_of_the_grid():
    paper = Grid(("jailbreak",), (0,), ("clean",), "some/model", "rows/{task}.jsonl", "paper").plan("jailbreak", 0, "clean")
    assert paper.data == "rows/jailbreak.jsonl" and paper.clean and paper.max_new_tokens == 32
    assert (paper.recipe.rank, paper.recipe.epochs, paper.recipe.batch_size * paper.recipe.accumulate) == (16, 16, 32)
    assert (paper.sizes.train, paper.sizes.test) == (1000, 256)
    for bad, says in (
        ({"tasks": ("joke",)}, "tasks"), ({"variants": ()}, "variants"), ({"recipe": "own"}, "recipe"), ({"model": "x"}, "needs --data"),
    ):  # fmt: skip
        with pytest.raises(BkdattrError, match=says):
            Grid(**bad)


def test_a_clean_control_is_trained_on_no_trigger(saved_tiny, rows, tmp_path):
    from bkdattr.planting import Plan, plant
    from bkdattr.poisoning import BackdoorSpec
    from bkdattr.report import findings
    from bkdattr.targets import LabelFlip
    from bkdattr.triggers import Prefix

    spec = BackdoorSpec("b", Prefix("zulu quartz"), LabelFlip("Sports", "World"))
    from bkdattr.examples import Sizes
    from bkdattr.lora import LoraRecipe

    plan = Plan(
        str(saved_tiny), spec, data=str(rows), sizes=Sizes(40, 6, 6, 8), recipe=LoraRecipe(epochs=1), clean=True, max_new_tokens=3
    )
    made = plant(tmp_path / "run", plan)
    assert made.triggered("train") == [] and len(made.triggered("test")) == 16
    assert json.loads((tmp_path / "run/poison.json").read_text())["triggered_rows"] == {"b": 0}
    assert "CLEAN fine-tune" in findings({"provenance": made.config | {"clean_control": True}})[0]


def test_reproduce_needs_a_finished_run(tmp_path):
    refused = bkdattr("reproduce", tmp_path, "--table-only")
    assert refused.exit_code == 2 and "no finished run" in refused.output
