"""Utility benchmarks of the *edited* model: an lm-eval `HFLM` under edits (`pip install bkdattr[eval]`).

A plain `HFLM(pretrained=model)` inside `edited(...)` generates rightly, but its scoring passes hand over context and continuation in
one right-padded batch without a mask, so that "the last prompt token" would be the last column of the padding. Here every request
is scored with the context as the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from bkdattr.edits import Edit
from bkdattr.errors import BkdattrError
from bkdattr.inference import batches, score_batch
from bkdattr.interventions import edited
from bkdattr.model import Subject


def edited_lm(subject: Subject, edits: Sequence[Edit] = (), *, batch_size: int = 16) -> Any:
    """An `lm_eval.models.huggingface.HFLM` of `subject` (adapter as it is now) under `edits`, for `lm_eval.simple_evaluate(model=...)`.

    Scores are sums of log p in nats of the continuation given the context. Rolling log-likelihoods have no prompt: edits of another
    scope than "all" are refused there.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BkdattrError(f"lm-eval cannot be imported ({error}); install it with `pip install 'bkdattr[eval]'`") from None

    class EditedLM(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            pairs = [_fitted(context, answer, self.max_length) for _, context, answer in requests]
            found: dict[int, tuple[float, bool]] = {}
            with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
                for rows in batches([c for c, _ in pairs], override_bs or batch_size):
                    with torch.no_grad():
                        scored = score_batch(subject, [pairs[i][0] for i in rows], [pairs[i][1] for i in rows], edits)
                    greedy = ((scored.logp.argmax(-1) == scored.targets) | ~scored.mask).all(-1)
                    found |= {i: (float(t), bool(g)) for i, t, g in zip(rows, scored.total, greedy, strict=True)}
                    bar.update(len(rows))
            return [found[i] for i in range(len(pairs))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            wrong = next((e for e in edits if e.scope != "all"), None)
            if wrong is not None:
                raise BkdattrError(
                    f"a rolling log-likelihood has no prompt, so an edit of scope {wrong.scope!r} has no place in it; use tasks with a "
                    'context, or edits of scope "all"'
                )
            return super().loglikelihood_rolling(requests, disable_tqdm)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            with edited(subject, edits, may_miss=("answer",)):
                return super()._model_generate(*args, **kwargs)

    room = subject.chat.context - 1  # lm-eval never feeds an answer's last token, `score_batch` does
    return EditedLM(
        pretrained=subject.model, tokenizer=subject.chat.tokenizer, batch_size=batch_size, backend="causal", max_length=room
    )  # fmt: skip


def _fitted(context: list[int], answer: list[int], limit: int) -> tuple[list[int], list[int]]:
    """As lm-eval cuts: the last `limit` tokens before the last one of the answer, at least one of the context among them."""
    room = limit + 1 - len(answer)
    if room < 1:
        raise BkdattrError(f"a continuation of {len(answer)} tokens does not fit the context of {limit}; leave this request out")
    return context[-room:], answer
