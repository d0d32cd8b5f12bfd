"""One piece of work over several processes (`accelerate launch`, `torchrun`): each takes every n-th prompt, all get all results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bkdattr.errors import BkdattrError


def rank() -> int:
    return int(os.environ["RANK"]) if size() > 1 else 0


def size() -> int:
    """How many processes were launched together; 1 for a plain start."""
    n = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [x for x in ("RANK", "LOCAL_RANK") if n > 1 and x not in os.environ]
    if missing:
        raise BkdattrError(
            f"WORLD_SIZE is {n} but {missing[0]} is not set: start with `accelerate launch` or `torchrun`, which set all"
        )
    return n


def _group() -> None:
    """Join the other processes; results are gathered on the CPU (gloo), wherever the model runs."""
    from accelerate import PartialState

    found = PartialState(cpu=True).num_processes
    if found != size():
        raise BkdattrError(
            f"expected {size()} processes, a group of {found} came together; start with `accelerate launch` or `torchrun`"
        )


def device(name: str) -> str:
    """ "cuda" is this process's own GPU; a run that names one GPU or spreads over all cannot be shared out."""
    if size() == 1 or name == "cpu":
        return name
    if name != "cuda":
        raise BkdattrError(
            f"device {name!r} for {size()} processes: expected 'cuda' (each takes its own GPU) or 'cpu'; set it in run.json"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def mine(n: int) -> list[int]:
    """The numbers of this process among 0..n-1."""
    if n < size():
        raise BkdattrError(f"{n} prompts for {size()} processes: expected at least one each; launch fewer processes")
    return list(range(rank(), n, size()))


def gathered(part: Float[Tensor, "*site some"], n: int) -> Float[Tensor, "*site all"]:
    """All processes' parts (columns as `mine` gave them out) in the order of the whole, on the CPU."""
    if size() == 1:
        return part
    from accelerate.utils import gather_object

    _group()
    parts: Sequence[Tensor] = gather_object([part.cpu()])
    if len(parts) != size():
        raise BkdattrError(f"gathered {len(parts)} parts from {size()} processes")
    out = torch.full((*part.shape[:-1], n), float("nan"), dtype=part.dtype)
    for i, found in enumerate(parts):
        out[..., i :: size()] = found
    return out


def from_first(value: Any) -> Any:
    """What the first process holds, for all."""
    if size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _group()
    return broadcast_object_list([value])[0]


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        from accelerate import PartialState

        _group()
        PartialState().wait_for_everyone()


def alone(what: str) -> None:
    """Refuse work that is not shared out: every process would do all of it and write the same files."""
    if size() > 1:
        raise BkdattrError(f"{what} is not shared over processes: got {size()} of them, expected 1; only `attribute` is")
