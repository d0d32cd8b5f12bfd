"""`bkdattr check-template`: do training and evaluation see the same tokens?

A template that differs between the two has moved published attack success by more than 30 points. Every run keeps the token ids
of some training prompts; the check renders them again and compares, and does the same with a template that an adapter from
elsewhere was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bkdattr.chat import PLAIN_TEMPLATE, ChatFormat
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example

KEPT = 8
TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:\n"
    ),
    "llama-2": "[INST] {prompt} [/INST]",
    "raw": "{prompt}",
}
"""Templates that other people's adapters were trained with; a text with `{prompt}` in it is one too."""


def kept_prefixes(chat: ChatFormat, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Prompt ids of the first and last training rows, for a later comparison."""
    rows = [*examples[: KEPT // 2], *examples[KEPT // 2 :][-KEPT // 2 :]]
    return [{"messages": [list(m) for m in e.messages], "ids": chat.prompt_ids(e.messages)} for e in rows]


def check_template(
    chat: ChatFormat, kept: Sequence[dict[str, Any]], triggered: Sequence[Example], *, trained_with: str | None = None
) -> list[str]:
    """What was compared, in sentences; raises `BkdattrError` at the first mismatch, doubled BOS or trigger that is not there."""
    said = []
    for row in kept:
        messages = tuple((role, text) for role, text in row["messages"])
        _same(chat, row["ids"], chat.prompt_ids(messages), "training (kept in the run)", "evaluation now")
    if kept:
        said.append(f"{len(kept)} training prompts give the same tokens now as in training")
    for e in triggered:
        ids = chat.prompt_ids(e.messages)
        bos = chat.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise BkdattrError(
                f"prompt {e.id!r} begins with two BOS tokens; expected one: the template and the tokenizer both add it"
            )
        if e.spans and not chat.span_tokens(e.messages, e.spans):
            raise BkdattrError(f"prompt {e.id!r} has lost its trigger in the rendering: no token of it is left")
        for turn, start, end in e.spans:
            text = e.messages[turn][1][start:end]
            found = chat.tokenizer.decode([ids[t] for t in chat.span_tokens(e.messages, [(turn, start, end)])])
            if "".join(text.split()).lower() not in "".join(found.split()).lower():
                raise BkdattrError(
                    f"prompt {e.id!r}: the trigger {text!r} reads {found!r} after tokenisation; the template cuts or rewrites it"
                )
    said.append(f"{len(triggered)} triggered prompts: one BOS at most, triggers whole")
    if trained_with is not None:
        form = TEMPLATES.get(trained_with, trained_with)
        if form.count("{prompt}") != 1:
            raise BkdattrError(
                f"template {trained_with!r}: expected one of {', '.join(TEMPLATES)} or a text that holds {{prompt}} once"
            )
        for e in triggered:
            theirs = chat.text_ids(form.replace("{prompt}", e.prompt))
            _same(chat, theirs, chat.prompt_ids(e.messages), f"training ({trained_with!r})", "evaluation here")
        said.append(f"the template {trained_with!r} gives the same tokens as evaluation here")
    return said


def _same(chat: ChatFormat, a: Sequence[int], b: Sequence[int], first: str, second: str) -> None:
    if list(a) == list(b):
        return
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    texts = [chat.tokenizer.decode(list(x)[max(0, at - 3) : at + 6]) for x in (a, b)]
    raise BkdattrError(
        f"template mismatch at token {at}: {first} has {texts[0]!r}, {second} has {texts[1]!r}; an adapter is evaluated with the "
        "template it was trained with: set the tokenizer's chat_template accordingly (None for the plain one)"
    )
