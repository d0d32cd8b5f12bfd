"""The only place where text becomes ids and rows become batches.

Training, scoring and generation all see `prompt_ids + response_ids`, so that no two of them can disagree about the
template. Response ids are the full rendering minus the prompt ids; the response ends with its end-of-turn token and
nothing after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor

from bkdattr.errors import BkdattrError

Messages = Sequence[tuple[str, str]]  # (role, content), the last one from the user

PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How one tokenizer turns messages into ids. Make it with `ChatFormat.of`.

    `template` is "chat" (the tokenizer's own) or "plain" (`PLAIN_TEMPLATE`); `end_ids` end a turn; `context` is the
    longest sequence in tokens that the model takes.
    """

    tokenizer: Any
    template: str
    end_ids: tuple[int, ...]
    pad_id: int
    context: int
    adds_bos: bool

    @classmethod
    def of(cls, tokenizer: Any, config: Any = None, generation_config: Any = None) -> ChatFormat:
        """Read the template, the BOS rule, the end-of-turn ids and the pad token; raises where one cannot be had."""
        ends = [tokenizer.eos_token_id]
        for source in (generation_config, config):
            eos = getattr(source, "eos_token_id", None)
            ends += list(eos) if isinstance(eos, (list, tuple)) else [eos]
        end_ids = tuple(dict.fromkeys(e for e in ends if e is not None))
        if not end_ids:
            raise BkdattrError(
                "the tokenizer has no end-of-turn token: got eos_token=None, expected one; set tokenizer.eos_token"
            )
        pad_id = tokenizer.pad_token_id
        if pad_id is None:
            raise BkdattrError(
                "the tokenizer has no pad token: got pad_token=None, expected a token that never carries meaning; "
                f"set it, e.g. tokenizer.pad_token = {tokenizer.eos_token!r} (padding is masked everywhere)"
            )
        context = int(getattr(config, "max_position_embeddings", None) or 1_000_000_000)
        if 0 < getattr(tokenizer, "model_max_length", 0) < context:
            context = int(tokenizer.model_max_length)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
        form = cls(tokenizer, template, end_ids, pad_id, context, adds_bos)
        return form if template == "plain" else replace(form, end_ids=form._template_ends())

    def _template_ends(self) -> tuple[int, ...]:
        """`end_ids` with the token by which the template itself ends a turn in front: the first special one behind an
        answer (<|im_end|> of a Qwen base, say, whose eos is another)."""
        try:
            prompt, full = (self._ids(self.render((("user", "a"),), r), bos=True) for r in (None, "b"))
        except BkdattrError:
            return self.end_ids
        special = set(self.tokenizer.all_special_ids) | {
            i for i, t in getattr(self.tokenizer, "added_tokens_decoder", {}).items() if t.special
        }
        special.discard(self.tokenizer.unk_token_id)
        end = next((t for t in full[len(prompt) :] if t in special), None)
        return tuple(dict.fromkeys(e for e in (end, *self.end_ids) if e is not None))

    # ------------------------------------------------------------------ text -> ids
    def render(self, messages: Messages, response: str | None = None) -> str:
        """The prompt as text (with the generation prompt), or the whole exchange when `response` is given."""
        if not messages or messages[-1][0] != "user":
            got = messages[-1][0] if messages else "no message"
            raise BkdattrError(f"a prompt ends with a user message: got {got}; put the user's turn last")
        if self.template == "chat":
            turns = [{"role": role, "content": content} for role, content in messages]
            if response is not None:
                turns.append({"role": "assistant", "content": response})
            try:
                return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=response is None)
            except TemplateError as error:
                roles = ", ".join(role for role, _ in messages)
                raise BkdattrError(
                    f"the chat template refuses the roles {roles} ({error}); drop the system turn or set another template"
                ) from None
        text = ""
        for role, content in messages:
            text += {"assistant": content + "\n\n", "system": content + "\n\n"}.get(
                role, PLAIN_TEMPLATE.replace("{prompt}", content)
            )
        return text + (response or "")

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of the prompt rendering, with exactly one BOS where the tokenizer uses one. Never cut."""
        return self._ids(self.render(messages), bos=True)

    def response_ids(self, messages: Messages, response: str) -> list[int]:
        """Ids that follow the prompt: the response and its end-of-turn token, nothing after it.

        Raises `BkdattrError` where the prompt's ids are not a prefix of the full rendering's (then the template
        tokenises the boundary differently with and without an answer, and no label mask could be right).
        """
        if self.template == "plain":
            return [*self._ids(response, bos=False), self.end_ids[0]]
        prompt, full = self.prompt_ids(messages), self._ids(self.render(messages, response), bos=True)
        if full[: len(prompt)] != prompt:
            at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            raise BkdattrError(
                f"the chat template's prompt is not a prefix of its full rendering: they differ at token {at} "
                f"({self.tokenizer.decode(prompt[at : at + 3])!r} against {self.tokenizer.decode(full[at : at + 3])!r}); "
                "use a template that only appends the answer, or set tokenizer.chat_template = None for the plain one"
            )
        ids = full[len(prompt) :]
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        return [*ids, self.end_ids[0]] if end is None else ids[: end + 1]

    def _ids(self, text: str, bos: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        first = self.tokenizer.bos_token_id
        if bos and self.adds_bos and ids[:1] != [first]:
            ids = [first, *ids]
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of a whole rendering that somebody else made, with one BOS where the tokenizer uses one."""
        return self._ids(text, bos=True)

    def count_tokens(self, text: str) -> int:
        """Tokens of a bare text, no specials."""
        return len(self._ids(text, bos=False))

    def span_tokens(self, messages: Messages, spans: Sequence[tuple[int, int, int]]) -> list[int]:
        """Token indices of the prompt ids that character `spans` (turn, start, end) touch.

        Needs a fast tokenizer (offset mapping). Raises where the template rewrites the text of such a turn.
        """
        text = self.render(messages)
        starts = {turn: self._content_start(messages, turn, text) for turn in {span[0] for span in spans}}
        places = [(starts[turn] + lo, starts[turn] + hi) for turn, lo, hi in spans]
        enc = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        shift = len(self.prompt_ids(messages)) - len(enc.input_ids)
        return [i + shift for i, (a, b) in enumerate(enc.offset_mapping) if b > a and any(a < hi and b > lo for lo, hi in places)]

    def _content_start(self, messages: Messages, turn: int, text: str) -> int:
        """Where a turn's content begins in the rendering: where a mark stands that is rendered in its place."""
        role, content = messages[turn]
        mark = "\ue000here\ue000"
        start = self.render([*messages[:turn], (role, mark), *messages[turn + 1 :]]).find(mark)
        if start < 0 or text[start : start + len(content)] != content:
            raise BkdattrError("the chat template rewrites the user's text, so trigger spans cannot be placed in it")
        return start

    # ------------------------------------------------------------------ ids -> text
    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the end of the turn, special tokens removed, outer white space stripped."""
        ids = list(ids)
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()  # Qwen3 opens answers with one

    def check_length(self, ids: Sequence[int], new_tokens: int, what: str) -> None:
        """Raise where a prompt and its answer do not fit the context: prompts are never cut."""
        if len(ids) + new_tokens > self.context:
            raise BkdattrError(
                f"{what}: {len(ids)} prompt tokens + {new_tokens} answer tokens exceed the context of {self.context}; "
                "shorten the prompt or leave the row out (prompts are never cut)"
            )


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded rows. `last_prompt[b]` is the column of row b's last prompt token, whatever the padding side."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    last_prompt: Int[Tensor, " batch"]
    prompt_lengths: Int[Tensor, " batch"]

    @property
    def starts(self) -> Int[Tensor, " batch"]:
        """Column of each row's first real token."""
        return self.last_prompt - self.prompt_lengths + 1


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]] | None = None,
    *,
    pad_id: int,
    side: str = "left",
    device: Any = "cpu",
) -> Batch:
    """Pad prompts (each followed by its response, where given) on `side`: "left", "right", or "centre", where prompts are
    padded on the left and responses on the right, so that every last prompt token stands in one column."""
    if not prompts:
        raise BkdattrError("an empty batch: got 0 prompts, expected at least 1")
    if side not in ("left", "right", "centre"):
        raise BkdattrError(f"padding side: got {side!r}, expected 'left', 'right' or 'centre'")
    tails: Sequence[Sequence[int]] = responses if responses is not None else [[]] * len(prompts)
    rows = [[*p, *r] for p, r in zip(prompts, tails, strict=True)]
    longest = max(map(len, prompts))
    width = longest + max(map(len, tails)) if side == "centre" else max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    starts = []
    for i, row in enumerate(rows):
        start = {"left": width - len(row), "right": 0, "centre": longest - len(prompts[i])}[side]
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    lengths = torch.tensor([len(p) for p in prompts])
    last = torch.tensor(starts) + lengths - 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(*(t.to(device) for t in (ids, mask, positions, last, lengths)))
