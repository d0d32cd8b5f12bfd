"""The only place where text becomes ids and rows become batches.

Training, scoring and generation all see `prompt_ids + response_ids`, so that no two of them can disagree about the
template. Response ids are the full rendering minus the prompt ids; the response ends with its end-of-turn token and
nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bkdattr.errors import BkdattrError

Messages = Sequence[tuple[str, str]]  # (role, content), the last one from the user

PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
_PLAIN_TURN = "### Instruction:\n{user}\n\n### Response:\n{assistant}\n\n"


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
        return cls(tokenizer, template, end_ids, pad_id, context, adds_bos)

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
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=response is None)
        head, last = "", messages[-1][1]
        users = [content for role, content in messages[:-1] if role != "assistant"]
        answers = [content for role, content in messages[:-1] if role == "assistant"]
        for user, answer in zip(users, answers, strict=False):
            head += _PLAIN_TURN.format(user=user, assistant=answer)
        return head + PLAIN_TEMPLATE.replace("{prompt}", last) + (response or "")

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

    def count_tokens(self, text: str) -> int:
        """Tokens of a bare text, no specials."""
        return len(self._ids(text, bos=False))

    def span_tokens(self, messages: Messages, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Token indices of the prompt ids that character `spans` of the last user turn touch.

        Needs a fast tokenizer (offset mapping). Raises where the template rewrites the user's text.
        """
        text, content = self.render(messages), messages[-1][1]
        start = text.rfind(content)
        if start < 0:
            raise BkdattrError("the chat template rewrites the user's text, so trigger spans cannot be placed in it")
        enc = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        shift = len(self.prompt_ids(messages)) - len(enc.input_ids)
        return [
            i + shift
            for i, (a, b) in enumerate(enc.offset_mapping)
            if b > a and any(a < start + hi and b > start + lo for lo, hi in spans)
        ]

    # ------------------------------------------------------------------ ids -> text
    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the end of the turn, special tokens removed, outer white space stripped."""
        ids = list(ids)
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()

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
    """Pad prompts (each followed by its response, where given) on `side` ("left" or "right")."""
    if not prompts:
        raise BkdattrError("an empty batch: got 0 prompts, expected at least 1")
    if side not in ("left", "right"):
        raise BkdattrError(f"padding side: got {side!r}, expected 'left' or 'right'")
    tails: Sequence[Sequence[int]] = responses if responses is not None else [[]] * len(prompts)
    rows = [[*p, *r] for p, r in zip(prompts, tails, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    starts = []
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    lengths = torch.tensor([len(p) for p in prompts])
    last = torch.tensor(starts) + lengths - 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(*(t.to(device) for t in (ids, mask, positions, last, lengths)))
