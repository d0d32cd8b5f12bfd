"""One piece of work over several processes (`accelerate launch`, `torchrun`): each takes every n-th prompt, all get all results."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.errors import BkdattrError


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes were launched together; 1 for a plain start."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(name: str) -> str:
    """ "cuda" is this process's own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and size() > 1 else name


def mine(n: int) -> list[int]:
    """The numbers of this process among 0..n-1."""
    if n < size():
        raise BkdattrError(f"{n} prompts for {size()} processes: expected at least one each; launch fewer processes")
    return list(range(rank(), n, size()))


def gathered(part: Float[Tensor, "*site some"], n: int) -> Float[Tensor, "*site all"]:
    """All processes' parts (columns as `mine` gave them out) in the order of the whole, on the CPU."""
    if size() == 1:
        return part
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())
    parts: Sequence[Tensor] = gather_object([part.cpu()])
    out = torch.empty(*part.shape[:-1], n, dtype=part.dtype)
    for i, found in enumerate(parts):
        out[..., i :: size()] = found
    return out


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def alone(what: str) -> None:
    """Refuse work that is not shared out: every process would do all of it and write the same files."""
    if size() > 1:
        raise BkdattrError(f"{what} is not shared over processes: got {size()} of them, expected 1; only `attribute` is")
