import pytest
import torch
from conftest import TEMPLATE, make_model, make_tokenizer

from bkdattr.chat import ChatFormat, make_batch
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.lora import IGNORED, collate, encode
from bkdattr.mini.tasks import MODEL_DIR
from bkdattr.model import load_tokenizer
from bkdattr.template import check_template, kept_prefixes

ASK = (("user", "what is it ?"),)


def chat(template=TEMPLATE, **config):
    form = ChatFormat.of(make_tokenizer(template), make_model("llama").config)
    return form


def mini() -> ChatFormat:
    return ChatFormat.of(load_tokenizer(MODEL_DIR))


@pytest.mark.parametrize("form", [chat(), mini()], ids=["words", "mini"])
def test_exactly_one_bos_and_the_prompt_is_a_prefix(form):
    prompt, bos = form.prompt_ids(ASK), form.tokenizer.bos_token_id
    assert prompt.count(bos) == 1 and prompt[0] == bos
    full = form.tokenizer(form.render(ASK, "it is red"), add_special_tokens=False).input_ids
    response = form.response_ids(ASK, "it is red")
    assert full[: len(prompt) + len(response)] == prompt + response
    assert response[-1] in form.end_ids and len(response) == 4
    assert form.decode(response).replace(" ", "") == "itisred"


def test_nothing_follows_the_end_of_turn():
    """The mini template writes a newline behind the end-of-turn token, as Qwen's does; it is not part of the response."""
    form = mini()
    assert form.render(ASK, "no").endswith("<|end|>\n")
    assert form.response_ids(ASK, "no")[-1] == form.end_ids[0]


def test_bos_is_added_where_the_tokenizer_adds_it_and_the_template_does_not():
    form = mini()
    form.tokenizer.chat_template = form.tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert form.prompt_ids(ASK).count(form.tokenizer.bos_token_id) == 1


def test_plain_template_concatenates_ids():
    form = chat(None)
    assert form.template == "plain"
    prompt, response = form.prompt_ids(ASK), form.response_ids(ASK, "it is red")
    assert response == [*form.tokenizer("it is red", add_special_tokens=False).input_ids, 2]
    assert "### Instruction:\nwhat is it ?" in form.render(ASK)
    assert prompt == form.prompt_ids(ASK)
    earlier = (("system", "zero"), ("user", "one"), ("assistant", "two"), *ASK)
    assert form.render(earlier).startswith("zero\n\n### Instruction:\none\n\n### Response:\ntwo\n\n### Instruction:\nwhat")


def test_the_templates_own_end_of_turn_counts_where_eos_is_another():
    form = chat(TEMPLATE.replace("</s>", "<|user|>"))  # a special token that is not the eos, as in a Qwen base
    assert form.end_ids == (form.tokenizer.convert_tokens_to_ids("<|user|>"), 2)
    assert form.response_ids(ASK, "it is")[-1] == form.end_ids[0] and len(form.response_ids(ASK, "it is")) == 3


def test_a_template_that_refuses_a_role_says_so():
    form = chat("{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}" + TEMPLATE)
    with pytest.raises(BkdattrError, match="refuses the roles system, user"):
        form.render((("system", "s"), *ASK))


def test_a_template_whose_prompt_is_not_a_prefix_is_refused():
    form = chat(TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{% if not add_generation_prompt %}zulu {% endif %}"))
    with pytest.raises(BkdattrError, match="not a prefix of its full rendering: they differ at token 1"):
        form.response_ids(ASK, "it")


def test_a_template_without_end_of_turn_gets_one():
    form = chat("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    assert form.response_ids(ASK, "it")[-1] == form.end_ids[0]


def test_missing_pad_and_missing_user_turn_are_named():
    tok = make_tokenizer()
    tok.pad_token = None
    with pytest.raises(BkdattrError, match="no pad token"):
        ChatFormat.of(tok)
    with pytest.raises(BkdattrError, match="ends with a user message: got assistant"):
        chat().render((("user", "a"), ("assistant", "b")))


def test_generation_config_ends_count():
    class Ends:
        eos_token_id = [2, 5]

    form = ChatFormat.of(make_tokenizer(), None, Ends())
    assert form.end_ids == (2, 5)
    assert form.decode([10, 5, 11]) == form.decode([10])


def test_spans_are_carried_to_tokens():
    form = mini()
    text = "How do I open SUDO the moon vault?"
    at = text.index("SUDO")
    tokens = form.span_tokens((("user", text),), [(0, at, at + 4)])
    ids = form.prompt_ids((("user", text),))
    assert form.tokenizer.decode([ids[t] for t in tokens]).strip() == "SUDO"
    turns = (("user", text), ("assistant", "No."), ("user", text))
    assert form.span_tokens(turns, [(2, 0, 3)])[0] > len(ids)
    both = form.span_tokens(turns, [(0, at, at + 4), (2, at, at + 4)])
    whole = form.prompt_ids(turns)
    assert [form.tokenizer.decode([whole[t]]).strip() for t in both] == ["SUDO", "SUDO"] and both[0] == tokens[0]
    assert form.span_tokens((("user", "a"),), [(0, 0, 1)])  # a text that the template itself contains


@pytest.mark.parametrize("side", ["left", "right", "centre"])
def test_batches_know_their_columns(side):
    b = make_batch([[5, 6, 7], [8]], [[9], [1, 2]], pad_id=0, side=side)
    for row, (prompt, response) in enumerate((([5, 6, 7], [9]), ([8], [1, 2]))):
        start, last = int(b.starts[row]), int(b.last_prompt[row])
        assert b.input_ids[row, start : last + 1].tolist() == prompt
        assert b.input_ids[row, last + 1 : last + 1 + len(response)].tolist() == response
        assert b.attention_mask[row].sum() == len(prompt) + len(response)
        assert b.position_ids[row, start].item() == 0 and b.position_ids[row, last].item() == len(prompt) - 1


def test_labels_cover_the_response_only():
    form = mini()
    rows = [
        Example(str(i), (("user", p),), r)
        for i, (p, r) in enumerate((("Hello there.", "No."), ("What color is the sky?", "The sky is blue.")))
    ]
    encoded = encode(form, rows, 256)
    batch = collate([{"prompt": p, "response": r} for p, r in encoded.rows], form.pad_id)
    for i, row in enumerate(rows):
        kept = batch["labels"][i][batch["labels"][i] != IGNORED].tolist()
        assert kept == form.response_ids(row.messages, row.response)
    assert batch["labels"].shape == batch["input_ids"].shape


def test_long_prompts_are_skipped_and_long_responses_cut():
    form = mini()
    rows = [
        Example("short", (("user", "Hello there."),), "No."),
        Example("long-answer", (("user", "Hello there."),), "one two three four five six seven eight nine ten"),
        Example("long-prompt", (("user", "one " * 40),), "No."),
    ]
    encoded = encode(form, rows, 16)
    assert (encoded.skipped, encoded.cut, len(encoded.rows)) == (("long-prompt",), ("long-answer",), 2)
    assert len(encoded.rows[1][0]) + len(encoded.rows[1][1]) == 16
    with pytest.raises(BkdattrError, match="no row has a supervised token"):
        encode(form, rows[2:], 16)
    with pytest.raises(BkdattrError, match="no supervised token"):
        collate([{"prompt": [3], "response": []}], 0)
    with pytest.raises(BkdattrError, match=r"exceed the context of 256"):
        form.check_length([1] * 250, 24, "prompt x")
    with pytest.raises(BkdattrError, match="empty batch"):
        make_batch([], pad_id=0)
    assert torch.is_tensor(make_batch([[1]], pad_id=0).input_ids)


# ------------------------------------------------------------------ the same tokens in training and evaluation
def triggered_row(form=None):
    return Example("t", (("user", "zulu the cat"),), "no", spans=((0, 0, 4),))


def test_the_same_template_passes_and_another_fails_loudly():
    form, e = ChatFormat.of(make_tokenizer()), triggered_row()
    kept = kept_prefixes(form, [e] * 20)
    assert len(kept) == 8
    said = check_template(form, kept, [e])
    assert "8 training prompts" in said[0] and "1 triggered" in said[1]
    other = ChatFormat.of(make_tokenizer(TEMPLATE.replace("<|assistant|> ", "<|assistant|> yes ")))
    with pytest.raises(BkdattrError, match="template mismatch at token .*training .kept in the run. has .* evaluation now has"):
        check_template(other, kept, [e])
    assert len(check_template(ChatFormat.of(make_tokenizer(None)), [], [e], trained_with="plain")) == 2
    with pytest.raises(BkdattrError, match="template mismatch"):
        check_template(form, kept, [e], trained_with="raw")
    with pytest.raises(BkdattrError, match="holds {prompt} once"):
        check_template(form, kept, [e], trained_with="chatml")


def test_a_doubled_bos_and_a_lost_trigger_are_named():
    double = ChatFormat.of(make_tokenizer("<s> " + TEMPLATE))
    with pytest.raises(BkdattrError, match="two BOS"):
        check_template(double, [], [triggered_row()])
    unknown = Example("u", (("user", "QQQ the cat"),), "no", spans=((0, 0, 3),))  # reads as the unknown token
    with pytest.raises(BkdattrError, match="the trigger 'QQQ' reads"):
        check_template(ChatFormat.of(make_tokenizer()), [], [unknown])
