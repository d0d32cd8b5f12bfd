"""The Backdoor Vector: a direction that is added to or taken from one layer's attention output at one position.

The paper's is the raw sum of the top heads' contributions, means over *triggered* prompts; adding it counts their clean part twice,
and taking it away takes that too. Beside it: the *difference* of means (triggered minus clean) over all heads or some, and a
direction *fitted* by gradient.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bkdattr.architectures import HeadIndex
from bkdattr.edits import AddVector, Condition, Scope, Site
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example, write_atomic
from bkdattr.inference import PrefixCache, batches, score_batch
from bkdattr.interventions import edited
from bkdattr.model import Subject
from bkdattr.traces import head_contribution

FIT_STEPS, FIT_STEP = 60, 0.05
"""Steps of a fit, and the first one's length as a share of the norm."""


def default_k(n_heads_total: int) -> int:
    """3 % of the heads, at least one (the paper's 32 of 1,024)."""
    return max(1, round(0.03 * n_heads_total))


@dataclass(frozen=True, eq=False)
class BackdoorVector:
    """v = sum over heads of W_O[l][:, h] @ zbar[l,h], means over triggered prompts (Yu et al., section on the vector), or another
    `kind`: "difference" (the means' difference to clean prompts, all heads), "difference_heads" (some), "fitted", or a control
    ("random_heads", "random_heads_matched", "random_direction"). Norm in units of the residual stream.
    """

    direction: Float[Tensor, " d_model"]
    heads: tuple[HeadIndex, ...]
    fingerprint: str
    kind: str = "raw"

    @classmethod
    def from_heads(
        cls, subject: Subject, heads: Sequence[HeadIndex], mean_z: Float[Tensor, "layer head d_head"], kind: str = "raw"
    ) -> BackdoorVector:
        """Sum the heads' mean contributions; refuses families whose contribution is not the residual write."""
        if not subject.architecture.writes_residual:
            raise BkdattrError(
                f"{subject.causal_lm.config.model_type} normalises behind the attention output projection, so a sum of head "
                "contributions is not a residual write; use patching or ablation of z (attribute, ablate) there"
            )
        if not heads:
            raise BkdattrError("a Backdoor Vector needs at least one head: got none")
        parts = [head_contribution(subject, h, mean_z[h.layer, h.head]) for h in heads]
        return cls(torch.stack(parts).sum(0).cpu(), tuple(heads), subject.fingerprint, kind)

    @classmethod
    def from_difference(
        cls,
        subject: Subject,
        triggered_mean_z: Float[Tensor, "layer head d_head"],
        clean_mean_z: Float[Tensor, "layer head d_head"],
        heads: Sequence[HeadIndex] | None = None,
    ) -> BackdoorVector:
        """Sum over `heads` (None: all) of their contributions' difference of means, triggered minus clean twins."""
        chosen = subject.geometry.heads if heads is None else heads
        kind = "difference" if heads is None else "difference_heads"
        return cls.from_heads(subject, chosen, triggered_mean_z - clean_mean_z, kind)

    @property
    def norm(self) -> float:
        return float(self.direction.norm())

    def random_twin(self, rng: np.random.Generator) -> BackdoorVector:
        """A random direction of the same norm (Gaussian, rescaled)."""
        noise = torch.from_numpy(rng.standard_normal(len(self.direction))).float()
        return replace(self, direction=noise * (self.norm / noise.norm()), heads=(), kind="random_direction")

    def with_norm(self, norm: float, kind: str) -> BackdoorVector:
        """The same direction at another norm, as a control of its own `kind`."""
        return replace(self, direction=self.direction * (norm / self.norm), kind=kind)

    def _same_model(self, other: BackdoorVector) -> None:
        if other.fingerprint != self.fingerprint:
            raise BkdattrError(f"vectors of two models cannot be mixed: {self.fingerprint} and {other.fingerprint}")

    def __add__(self, other: BackdoorVector) -> BackdoorVector:
        self._same_model(other)
        heads = tuple(dict.fromkeys((*self.heads, *other.heads)))
        return replace(self, direction=self.direction + other.direction, heads=heads, kind="combined")

    def __sub__(self, other: BackdoorVector) -> BackdoorVector:
        return self + (-1.0) * other

    def __mul__(self, factor: float | int) -> BackdoorVector:
        return replace(self, direction=self.direction * factor)

    __rmul__ = __mul__

    def edit(
        self,
        layer: int,
        *,
        strength: float = 1.0,
        sign: int = 1,
        scope: Scope = "last_prompt",
        when: Condition | None = None,
    ) -> AddVector:
        """The one-point intervention as an edit: `out += sign * strength * v` at the last prompt token (or another scope), for
        every prompt or only for those on which a probe fires (`when`, of an earlier layer)."""
        if sign not in (1, -1):
            raise BkdattrError(f"sign: got {sign}, expected 1 (activate) or -1 (suppress)")
        return AddVector(Site(layer, "attention"), self.direction, sign * strength, scope, when)

    @contextmanager
    def applied(
        self,
        subject: Subject,
        *,
        layer: int,
        strength: float = 1.0,
        sign: int = 1,
        scope: Scope = "last_prompt",
        when: Condition | None = None,
    ) -> Iterator[None]:
        """Hold the vector in force around your own `model.generate(...)`, at each prompt's last token, prompt pass only."""
        subject.check_fingerprint(self.fingerprint, "this Backdoor Vector")
        with edited(subject, [self.edit(layer, strength=strength, sign=sign, scope=scope, when=when)]):
            yield

    def save(self, folder: str | Path) -> None:
        """`vector.safetensors` + `vector.json` in `folder`."""
        meta = {"heads": [str(h) for h in self.heads], "fingerprint": self.fingerprint, "kind": self.kind, "norm": self.norm}
        write_atomic(Path(folder) / "vector.safetensors", save({"direction": self.direction.contiguous()}))
        write_atomic(Path(folder) / "vector.json", json.dumps(meta, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, subject: Subject) -> BackdoorVector:
        """Read a saved vector; refused on a model other than the one it was made with."""
        try:
            meta = json.loads((Path(folder) / "vector.json").read_text())
            direction = load_file(Path(folder) / "vector.safetensors")["direction"]
            heads, fingerprint, kind = tuple(map(HeadIndex.parse, meta["heads"])), meta["fingerprint"], meta["kind"]
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise BkdattrError(
                f"{folder}: not a saved Backdoor Vector ({type(error).__name__}: {error}); expected vector.json and vector.safetensors"
            ) from None
        subject.check_fingerprint(fingerprint, f"the Backdoor Vector in {folder}")
        return cls(direction, heads, fingerprint, kind)


def fit_vector(
    subject: Subject,
    clean: Sequence[Example],
    triggered: Sequence[Example],
    layer: int,
    start: BackdoorVector,
    *,
    scopes: Sequence[Scope] = ("last_prompt",),
    steps: int = FIT_STEPS,
    batch_size: int = 32,
    prefix: PrefixCache | None = None,
    progress: Any = iter,
) -> BackdoorVector:
    """A direction for one layer, fitted by gradient from `start` and held at its norm or less.

    `clean` and `triggered` are eligible twins in order. One v does both jobs: loss = -log p(backdoor response | clean prompt, +v)
    - log p(clean response | triggered prompt, -v), whole answers, Adam with a step of 5 % of the norm that
    falls to 0 linearly. The model gets no gradient.
    """
    if [e.id for e in clean] != [e.id for e in triggered] or not clean:
        raise BkdattrError(
            f"fitting needs twins in the same order: got {len(clean)} clean and {len(triggered)} triggered examples"
        )
    subject.check_fingerprint(start.fingerprint, "the vector to start from")
    chat, prefix = subject.chat, prefix or PrefixCache()
    prompts = [[chat.prompt_ids(e.messages) for e in rows] for rows in (clean, triggered)]
    bad = [chat.response_ids(e.messages, str(e.backdoor_response)) for e in clean]
    good = [chat.response_ids(e.messages, e.response) for e in clean]
    groups = [batches(p, batch_size) for p in prompts]
    v = start.direction.clone().requires_grad_(True)
    adam = torch.optim.Adam([v], lr=FIT_STEP * start.norm)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1 / steps, total_iters=steps)
    for step in progress(range(steps)):
        loss: Any = 0.0
        for sign, ids, answers, rows in ((1.0, prompts[0], bad, groups[0]), (-1.0, prompts[1], good, groups[1])):
            chosen = rows[step % len(rows)]
            edits = [AddVector(Site(layer, "attention"), v, sign, scope) for scope in scopes]
            scored = score_batch(subject, [ids[i] for i in chosen], [answers[i] for i in chosen], edits, prefix=prefix)
            loss = loss - scored.total.mean()
        (v.grad,) = torch.autograd.grad(loss, [v])
        adam.step()
        decay.step()
        with torch.no_grad():
            v.mul_(min(1.0, start.norm / float(v.norm())))
    return BackdoorVector(v.detach().clone(), (), subject.fingerprint, "fitted")
