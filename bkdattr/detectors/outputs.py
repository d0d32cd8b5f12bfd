"""Detectors that read what the adapter does, without noise: outputs on clean prompts, forced first tokens, what it adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bkdattr.chat import make_batch
from bkdattr.detectors.answers import risen_label
from bkdattr.detectors.common import Clean, Measured
from bkdattr.edits import Where
from bkdattr.inference import forward
from bkdattr.interventions import capture


@dataclass(frozen=True)
class OutputBias:
    """How clean prompts' first tokens moved from the base's (after LT-Defense: a backdoor shifts what is said without a trigger).

    `latent_rise` is the largest mean rise of log p among tokens that are not said openly (mean probability below `openly`): a new skill or
    an always-on prefix says its words, a backdoor has its target up its sleeve. `label_rise` is that of the label which rose most
    (`answers.risen_label`), which is the answer it names.
    """

    openly: float = 0.02
    rarest: float = -12.0
    name: str = "output_bias"
    main: str = "latent_rise"
    two_sided: bool = False

    @torch.no_grad()
    def measure(self, clean: Clean) -> Measured:
        p, base = clean.plain.exp().cpu(), clean.base.exp().cpu()
        mean = (p - base).mean(0)
        kl = (p * (clean.plain.cpu() - clean.base.cpu())).sum(-1).mean()
        rise = (clean.plain - clean.base).cpu().mean(0)  # sees what is still rare: a target that grew from 1e-9 to 1e-5
        likely = p.mean(0).clamp(min=1e-30).log() > self.rarest
        rise = torch.where(likely, rise, torch.tensor(-1e3))
        latent = torch.where(p.mean(0) < self.openly, rise, torch.tensor(-1e3))
        label_rise, label = risen_label(clean)
        statistics = {
            "label_rise": label_rise,
            "inc": float(mean.max()),
            "kl": float(kl),
            "log_rise": float(rise.max()),
            "latent_rise": float(latent.max()),
        }
        return Measured(statistics, int(latent.argmax()), label)


@dataclass(frozen=True)
class TokenScan:
    """BAIT-style: a forced first token of the target leads to the rest of it whatever was asked. For each candidate token, `steps` tokens are
    written greedily from probabilities averaged over `prompts` prompts; the score is their mean probability, less the base's on the
    same tokens. All tokens are candidates up to `candidates`, else those whose mean log p the adapter raised most."""

    prompts: int = 3
    steps: int = 3
    candidates: int = 512
    name: str = "token_scan"
    main: str = "gap"
    two_sided: bool = False

    @torch.no_grad()
    def measure(self, clean: Clean) -> Measured:
        rise = (clean.plain - clean.base).mean(0)
        tokens = rise.topk(min(self.candidates, rise.shape[-1])).indices.cpu()
        at = torch.linspace(0, len(clean.prompts) - 1, self.prompts + 2)[1:-1].long().tolist()
        rows = [clean.prompts[i] for i in at]
        q, text = self._written(clean, rows, tokens, None)
        with clean.subject.adapter_off():
            base, _ = self._written(clean, rows, tokens, text)
        gap = (q - base).mean(-1)
        texts = {
            int(i): clean.subject.chat.decode([int(tokens[i]), *text[i].tolist()]).strip()
            for i in gap.topk(min(5, len(gap))).indices
        }
        best = next(iter(texts))
        return Measured(
            {"gap": float(gap[best]), "q": float(q.mean(-1).max())},
            int(tokens[best]),
            texts[best],
            {"candidates": list(texts.values())},
        )

    def _written(
        self, clean: Clean, rows: list[list[int]], tokens: Int[Tensor, " token"], given: Int[Tensor, "token step"] | None
    ) -> tuple[Float[Tensor, "token step"], Int[Tensor, "token step"]]:
        """Mean probability of each greedy (or `given`) token behind each candidate."""
        subject, n = clean.subject, len(rows)
        prefix = make_batch(rows, pad_id=subject.chat.pad_id, device=subject.device)
        past = forward(subject, prefix, use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(len(tokens))  # each prompt stands once per candidate
        mask = prefix.attention_mask.repeat_interleave(len(tokens), 0)
        at = prefix.position_ids[:, -1:].repeat_interleave(len(tokens), 0)
        now = tokens.repeat(n)[:, None].to(subject.device)
        probabilities, written = [], []
        for step in range(self.steps):
            mask, at = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), at + 1
            logits = subject.causal_lm(
                input_ids=now, attention_mask=mask, position_ids=at, past_key_values=past, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            p = logits.float().softmax(-1).view(n, len(tokens), -1).mean(0)
            chosen = p.argmax(-1) if given is None else given[:, step].to(p.device)
            probabilities.append(p.gather(-1, chosen[:, None])[:, 0].cpu())
            written.append(chosen.cpu())
            now = chosen.repeat(n)[:, None]
        return torch.stack(probabilities, -1), torch.stack(written, -1)


@dataclass(frozen=True)
class Spectral:
    """What the adapter adds at the last prompt token, over prompts: share of its energy in one direction (after spectral signatures), per layer;
    the largest and the mean."""

    name: str = "spectral"
    main: str = "largest"
    two_sided: bool = True

    @torch.no_grad()
    def measure(self, clean: Clean) -> Measured:
        layers = range(clean.subject.geometry.n_layers)

        def read() -> Tensor:
            out = []
            for b in clean.batches:
                with capture(clean.subject, Where.of(b), resid_post=layers) as trace:
                    forward(clean.subject, b, logits_to_keep=1)
                out.append(torch.stack([trace.resid_post[i] for i in layers]))
            return torch.cat(out, 1)

        on = read()
        with clean.subject.adapter_off():
            off = read()
        s = torch.linalg.svdvals((on - off) - (on - off).mean(1, keepdim=True)) ** 2
        share = s[:, 0] / s.sum(-1).clamp(min=1e-30)
        return Measured({"largest": float(share.max()), "mean": float(share.mean())})


def mahalanobis(
    known: Float[Tensor, "prompt d_model"], given: Float[Tensor, "row d_model"], shrink: float = 0.1
) -> Float[Tensor, " row"]:
    """Input-level: distance of each row from known clean prompts' activations, covariance shrunk towards its diagonal's mean."""
    centre = known.mean(0)
    c = torch.cov(known.T.double())
    c = (1 - shrink) * c + shrink * torch.eye(len(c), dtype=c.dtype) * c.diagonal().mean()
    x = (given - centre).double()
    return ((x @ torch.linalg.inv(c)) * x).sum(-1).clamp(min=0).sqrt().float()
