"""From suspicion to mechanism without the trigger: which heads carry the suspected answer, and what in a prompt brings it about.

The noise that makes the adapter say its target stands in for the trigger: heads are patched from the noisy model's state into the quiet one
(`noise_effects`), and inputs are searched that raise the target in the quiet model (`search_trigger`), so that BAHA can then run with
a trigger of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.attribution import Recipients, site_effects, sites_of
from bkdattr.chat import make_batch
from bkdattr.detectors import Ban
from bkdattr.detectors.common import Clean
from bkdattr.edits import Site
from bkdattr.errors import BkdattrError
from bkdattr.gates import NeuronGates
from bkdattr.inference import response_logprob
from bkdattr.traces import trace_prompts
from bkdattr.triggers import Prefix


def noise_effects(
    clean: Clean, target: str, deltas: Sequence[Float[Tensor, " gate"]] | None = None, kind: str = "head"
) -> dict[Site, Float[Tensor, " prompt"]]:
    """Rise of P(target | clean prompt) per site when its state comes from the model under noise (mean over prompts); exact patching.

    `deltas` as `Ban.noise` makes them. Donors and recipients are different halves of the clean prompts.
    """
    if not target.strip():
        raise BkdattrError("mechanism: got an empty target, expected the suspected answer's text")
    deltas = Ban().noise(clean) if deltas is None else deltas
    rows = [replace(e, eligible=True, backdoor_response=target) for e in clean.examples]
    with NeuronGates.of(clean.subject).set(deltas):
        donors = trace_prompts(clean.subject, rows[::2], read=("z", "attention", "mlp"))
    recipients = Recipients.of(clean.subject, rows[1::2])
    return dict(site_effects(clean.subject, recipients, donors, sites_of(clean.subject.geometry, kind)))


@dataclass(frozen=True)
class Candidate:
    """A token sequence in front of the user's text; `logp`: mean log p of the target per token with it, nats; `start` without."""

    ids: tuple[int, ...]
    text: str
    logp: float
    start: float


def search_trigger(
    clean: Clean,
    target: str,
    *,
    tokens: int = 3,
    rounds: int = 12,
    candidates: int = 48,
    prompts: int = 6,
    seed: int = 0,
    progress: Any = iter,
) -> Candidate:
    """Greedy coordinate search with gradients (after HotFlip and GCG): the tokens in front of the user's text that raise the target most.

    Each round takes the gradient of the target's mean log p with respect to the embeddings at the searched places, tries the `candidates`
    swaps that promise most, and keeps the best. Tokens that the tokenizer holds back (special ones) are left out.
    """
    subject, chat = clean.subject, clean.subject.chat
    rows = [clean.examples[i] for i in torch.linspace(0, len(clean.examples) - 1, prompts).long().tolist()]
    answers = [chat.response_ids(e.messages, target) for e in rows]
    marked = [Prefix("the")(e.messages, random.Random(seed)) for e in rows]
    split = []
    for m in marked:
        ids, at = chat.prompt_ids(m.messages), chat.span_tokens(m.messages, m.spans)
        split.append((ids[: at[0]], ids[at[-1] + 1 :]))
    table = subject.causal_lm.get_input_embeddings().weight
    banned = sorted({i for i in chat.tokenizer.all_special_ids if i < len(table)})
    allowed = torch.tensor(sorted(set(range(len(table))) - set(banned)))
    rng = torch.Generator().manual_seed(seed)

    def value(trigger: Sequence[int]) -> float:
        prompts_ = [[*before, *trigger, *behind] for before, behind in split]
        return float(response_logprob(subject, prompts_, answers).mean.mean())

    start = float(response_logprob(subject, [chat.prompt_ids(e.messages) for e in rows], answers).mean.mean())
    now = allowed[torch.randint(0, len(allowed), (tokens,), generator=rng)].tolist()
    best = (value(now), now)
    for _ in progress(range(rounds)):
        grads = _gradient(clean, split, now, answers)
        gain = grads @ table.detach().T.float()  # first order: (e_new - e_old) @ gradient
        gain = gain - (grads * table.detach()[now].float()).sum(-1, keepdim=True)
        gain[:, banned] = -torch.inf
        tried = []
        for flat in gain.flatten().topk(candidates).indices.tolist():
            place, token = divmod(flat, gain.shape[1])
            swap = [*now[:place], token, *now[place + 1 :]]
            tried.append((value(swap), swap))
        now = max(tried)[1]  # also where it is worse: the best one is kept
        best = max(best, max(tried))
    logp, ids = best
    return Candidate(tuple(ids), chat.tokenizer.decode(ids), logp, start)


def _gradient(
    clean: Clean, split: Any, trigger: Sequence[int], answers: Sequence[Sequence[int]]
) -> Float[Tensor, "token d_model"]:
    """d (sum over prompts of the target's mean log p) / d embedding at each searched place."""
    subject = clean.subject
    embed = subject.causal_lm.get_input_embeddings()
    prompts = [[*before, *trigger, *behind] for before, behind in split]
    batch = make_batch(prompts, answers, pad_id=subject.chat.pad_id, side="right", device=subject.device)
    with torch.enable_grad():
        x = embed(batch.input_ids).detach().requires_grad_(True)
        logits = subject.causal_lm(
            inputs_embeds=x, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
        ).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        columns = torch.arange(logp.shape[1], device=logp.device)[None]
        last = batch.last_prompt.to(logp.device)[:, None]
        counts = torch.tensor([len(a) for a in answers], device=logp.device)[:, None]
        mask = (columns >= last) & (columns < last + counts)
        (grad,) = torch.autograd.grad(((logp * mask).sum(-1) / counts[:, 0]).sum(), [x])  # the weights get none
    out = torch.zeros(len(trigger), x.shape[-1], device=x.device)
    for i, (before, _) in enumerate(split):
        out += grad[i, len(before) : len(before) + len(trigger)].float()
    return out
