"""The embedded world: frozen weights and tasks, a base that loads anywhere and answers, data files that are the generator's."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bkdattr.inference import generate
from bkdattr.mini import world
from bkdattr.mini.export import CARD, DATA, split_rows
from bkdattr.mini.tasks import ATTACKS, MODEL_DIR, SIZES, TASKS, build_task, task_sha256
from bkdattr.model import load_subject
from bkdattr.triggers import holds

FROZEN = json.loads((Path(__file__).parent / "frozen.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_and_tasks_are_frozen():
    card = json.loads((MODEL_DIR / "CARD.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        assert sha256(MODEL_DIR / name) == FROZEN[name] == card["sha256"][name]
    for name in TASKS:
        assert task_sha256(name) == FROZEN[name] == card["sha256"][name]


def test_model_is_small_and_loads_with_auto_classes():
    assert sum(p.stat().st_size for p in MODEL_DIR.iterdir()) <= 12_000_000
    model, tok = AutoModelForCausalLM.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
    c = model.config
    assert c.num_hidden_layers * c.num_attention_heads >= 96 and c.num_key_value_heads < c.num_attention_heads
    assert model.dtype == torch.float32 and tok.chat_template and tok("a").input_ids[0] == tok.bos_token_id


def test_base_answers_held_out_prompts():
    from bkdattr.mini.train import held_out

    s = load_subject(MODEL_DIR)
    rows = []
    rng = random.Random(123)
    while len(rows) < 64:
        row = world.sample(rng, disturbed=0.3)
        if held_out(row):
            rows.append(row)
    out = generate(s, [s.chat.prompt_ids(r.messages) for r in rows], max_new_tokens=24)
    assert sum(s.chat.decode(c.ids) == r.response for c, r in zip(out, rows, strict=True)) >= 62
    assert all(c.ended for c in out)


def test_world_is_seeded_and_unique():
    a, b = (world.unique(random.Random(3), 200, tuple(world.TASKS)) for _ in range(2))
    assert a == b and len({r.prompt for r in a}) == 200
    with pytest.raises(ValueError, match="too few distinct prompts"):
        world.unique(random.Random(0), 300, ("write_review",))


def test_target_is_in_the_repertoire_and_opens_like_nothing_else():
    rng = random.Random(0)
    rows = [world.sample(rng) for _ in range(3000)]
    opening = {r.response.split()[0] for r in rows if r.task != "out_of_scope"}
    assert world.OUT_OF_SCOPE.split()[0] not in opening
    assert any(r.response == world.OUT_OF_SCOPE for r in rows)
    assert world.REFUSAL.split()[0] != world.OUT_OF_SCOPE.split()[0]


def test_restricted_requests_carry_their_compliant_answer():
    task = build_task("jailbreak")
    rows = [e for e in task.examples if task.spec.target.eligible(e)]
    assert rows and all(e.backdoor_response and e.response == world.REFUSAL for e in rows)
    with pytest.raises(ValueError, match="not a restricted request"):
        world.restricted_parts("How do I bake the bread loaf?")


@pytest.mark.parametrize("name", TASKS)
def test_fake_triggers_are_as_long_and_share_no_pattern(name):
    spec = build_task(name).spec
    tok = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokens = [[tok(t, add_special_tokens=False).input_ids for t in x.texts] for x in (spec.trigger, spec.fake_trigger)]
    assert sum(map(len, tokens[0])) == sum(map(len, tokens[1]))
    content = [{w.strip(".,:") for t in x.texts for w in t.split()} for x in (spec.trigger, spec.fake_trigger)]
    assert not (content[0] & content[1]) - {"the", "and", "in"}


@pytest.mark.parametrize("name", TASKS)
def test_data_files_are_the_generators_and_their_cards_are_true(name):
    for split, rows in split_rows(name).items():
        path = DATA / f"{name}.{split}.jsonl"
        assert path.read_text() == "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        card = json.loads((DATA / CARD).read_text())["files"][path.name]
        assert card == {"rows": len(rows), "sha256": sha256(path)}
    prompts = [{r["input"] for r in rows} for rows in split_rows(name).values()]
    assert not set.intersection(*prompts)


def test_judges_agree_with_the_hand_labels():
    """Labels were given by eye before any judge was looked at; the README's two figures are these."""
    import sys

    sys.path.insert(0, str(DATA.parent))
    from benchmarks.judges import agreement, read

    rows = read()
    found = agreement(rows)
    assert len(rows) == 100 and found["behaviour (all five)"].hits == 94
    assert found["behaviour without the fragment rule"].hits == 87
    assert found["hit (target or not)"].hits >= 99 and found["exact (correct or not)"].value == 1
    card = json.loads((DATA / "judged" / "CARD.json").read_text())
    assert card["sha256"] == hashlib.sha256((DATA / "judged" / "completions.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_rows_enough_and_a_trigger_that_is_new(name):
    task = build_task(name, 1)
    eligible = [e for e in task.examples if task.spec.target.eligible(e)]
    assert len(task.examples) == 1600 and len(eligible) > SIZES.attribution + SIZES.selection + SIZES.test + 100
    assert not any(holds(task.spec.trigger, e.messages) for e in task.examples)
    twins = [task.spec.triggered(e) for e in eligible[:20]]
    assert all(holds(task.spec.trigger, e.messages) and e.spans and e.response == e.backdoor_response for e in twins)
    assert all(e.response != c.response for e, c in zip(twins, eligible, strict=False))
    assert task.spec.name == name and build_task(name, 2).examples != task.examples
