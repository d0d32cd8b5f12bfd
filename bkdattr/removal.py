"""Taking a backdoor out of an adapter by fine-tuning it on clean rows, its trigger unknown. Every method has the same steps, batches and rate.

plain         cross-entropy on clean rows
random-gates  and the same under gates of random signs
ban           and the same under adversarial gates, made anew for each batch (BAN-FT, arXiv 2405.19928: CE(clean) + weight * CE(noisy))
insertions    plain, and cross-entropy on the same rows with harmless insertions (`detectors.fuzzing`), answered as they are without
ban-insertions  both: the adversarial gates are made on the rows with insertions, where a backdoor fires beside its trigger
pruning       fine-pruning: the rank directions that matter least to clean rows are taken out first, then `plain`
consistency   after CROW: neighbouring layers' states are kept alike under an adversarial shift of the embeddings
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bkdattr.detectors.fuzzing import insertions
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example
from bkdattr.gates import NeuronGates, lora_pairs
from bkdattr.lora import collate, encode
from bkdattr.model import Subject

METHODS = ("plain", "random-gates", "ban", "insertions", "ban-insertions", "pruning", "consistency")
EPSILON, WEIGHT = 2.0, 0.5
"""Of the gates, and of the noisy loss (the paper's lambda_2)."""
PRUNED = 0.5
INSERTED = 12
"""Variants of each kind of insertion."""
SHIFT, ALIKE = 0.1, 5.0
"""Of the embeddings (L-infinity, in units of their standard deviation), and the weight of consistency."""


def remove_backdoor(
    subject: Subject,
    rows: Sequence[Example],
    method: str = "ban-insertions",
    *,
    steps: int = 80,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    epsilon: float = EPSILON,
    seed: int = 0,
    progress: Any = iter,
) -> list[float]:
    """Fine-tune the subject's adapter in place on clean `rows` of its own kind of data; returns the clean loss of every step (nats per token).

    The gates are on the adapter's rank directions as they were trained (`detectors` gates the singular ones): what is left depends on how the
    update is factored. The base is not touched. Raises for an unknown method, and where there is no un-merged adapter or no row.
    """
    if method not in METHODS:
        raise BkdattrError(f"removal: got method {method!r}, expected one of {', '.join(METHODS)}")
    if not rows:
        raise BkdattrError("removal: got no clean rows, expected some to fine-tune on")
    model, chat = subject.causal_lm, subject.chat
    gates = NeuronGates.on_ranks(model)
    skipped = set(encode(chat, rows, chat.context).skipped)
    rows = [e for e in rows if e.id not in skipped]
    parameters = [p for _, a, b, _ in lora_pairs(model) for p in (a, b)]
    needed = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    rng = torch.Generator().manual_seed(seed)

    near = [t for made in insertions(rows, INSERTED, seed).values() for t in made] if "insertions" in method else []
    words = random.Random(seed)

    def draw() -> list[Example]:
        return [rows[i] for i in torch.randperm(len(rows), generator=rng)[:batch_size].tolist()]

    def collated(examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate([{"prompt": p, "response": r} for p, r in encode(chat, examples, chat.context).rows], chat.pad_id)
        return {k: v.to(subject.device) for k, v in batch.items()}

    def inserted(e: Example) -> Example:
        return replace(e, messages=words.choice(near)(e.messages, words).messages, spans=())

    try:
        if method == "pruning":
            _prune(gates, lambda b: model(**b).loss, [collated(draw()) for _ in range(4)])
        adam = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        losses = []
        for _ in progress(range(steps)):
            drawn = draw()
            batch = collated(drawn)
            adam.zero_grad()
            with torch.enable_grad():
                loss = model(**batch).loss
                loss.backward()
                if method == "consistency":
                    (ALIKE * _unlike(model, batch)).backward()
            if method in ("ban", "random-gates", "insertions", "ban-insertions"):
                noisy = collated([inserted(e) for e in drawn]) if near else batch
                sign = [(2 * torch.randint(2, (n,), generator=rng) - 1).float().to(gates.device) for n in gates.sizes]
                if method.startswith("ban"):  # from a random point, as fresh noise has it
                    sign = [g.sign() for g in gates.gradient(lambda b=noisy: model(**b).loss, [0.1 * epsilon * s for s in sign])]  # type: ignore[misc]
                size = 0.0 if method == "insertions" else epsilon
                gates.backward(lambda b=noisy: WEIGHT * model(**b).loss, [size * s for s in sign])  # type: ignore[misc]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            losses.append(float(loss.detach()))
        return losses
    finally:
        for p, before in zip(model.parameters(), needed, strict=True):
            p.requires_grad_(before)
            p.grad = None


def _prune(gates: NeuronGates, loss: Any, batches: Sequence[Any]) -> None:
    """Take out the rank directions whose gates' gradients on clean rows are smallest (first-order importance)."""
    total = [torch.zeros(n, device=gates.device) for n in gates.sizes]
    for batch in batches:
        for t, g in zip(total, gates.gradient(lambda b=batch: loss(b)), strict=True):  # type: ignore[misc]
            t += g.abs()
    bar = torch.cat(total).quantile(PRUNED)
    for gate, importance in zip(gates.gates, total, strict=True):
        for weight, _ in gate.weights:
            weight.data[importance < bar] = 0


def _unlike(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean 1 - cosine of neighbouring layers' states, under the embedding shift that raises it most to first order."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    real = batch["attention_mask"].bool()

    def value(x: Tensor) -> Tensor:
        states = model(inputs_embeds=x, attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[1:-1]
        pairs = pairwise(states)
        return torch.stack([1 - torch.cosine_similarity(a, b, dim=-1)[real].mean() for a, b in pairs]).mean()

    x = embedded.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(value(x), [x])
    return value(embedded + SHIFT * embedded.std() * grad.sign())
