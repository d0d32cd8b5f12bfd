"""`bkdattr reproduce`: tasks x seeds x (poisoned, clean fine-tune) through every stage, and other attacks planted and evaluated.

Every run is a run directory of its own: an interrupted grid goes on where it was, several processes may fill one folder with
different tasks or seeds, and the table (`grid_table`) is made from whatever is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bkdattr.errors import BkdattrError
from bkdattr.examples import Sizes
from bkdattr.lora import LoraRecipe
from bkdattr.mini.tasks import ATTACKS, TASKS
from bkdattr.planting import Plan, plant
from bkdattr.report import write_report
from bkdattr.stages import Study
from bkdattr.steering import KINDS

VARIANTS = ("poisoned", "clean")
PAPER_SIZES = Sizes(train=1000, attribution=96, selection=64, test=256)
SCOPES = ("last_prompt", "last_prompt+answer")


@dataclass(frozen=True)
class Grid:
    """What is reproduced. `recipe` "mini" leaves recipe and sizes to the model's defaults; "paper" sets the paper's."""

    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = VARIANTS
    model: str = "mini"
    data: str | None = None
    recipe: str = "mini"
    dtype: str = "float32"
    device: str = "cpu"
    pad_token: str | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("tasks", self.tasks, TASKS), ("variants", self.variants, VARIANTS), ("recipe", (self.recipe,), ("mini", "paper")),
        ):  # fmt: skip
            unknown = [x for x in given if x not in known]
            if unknown or not given:
                raise BkdattrError(f"reproduce: {name} {list(given)}, expected some of {', '.join(known)}")
        if self.model != "mini" and self.data is None:
            raise BkdattrError("reproduce: a model other than 'mini' needs --data, e.g. --data 'rows/{task}.jsonl'")

    def plan(self, task: str, seed: int, variant: str) -> Plan:
        paper = self.recipe == "paper"
        return Plan(
            self.model, task=task, data=self.data.replace("{task}", task) if self.data else None, seed=seed,
            sizes=PAPER_SIZES if paper else None, recipe=LoraRecipe() if paper else None, max_new_tokens=32 if paper else None,
            dtype=self.dtype, device=self.device, pad_token=self.pad_token, clean=variant == "clean",
        )  # fmt: skip


def plant_attacks(out: Path, seeds: Sequence[int], say: Callable[[str], None]) -> dict[str, str]:
    """Plant and evaluate the mini world's other attacks (`mini.tasks.ATTACKS`), a run each; returns the failures by name."""
    failed = {}
    for task in ATTACKS:
        for seed in seeds:
            name = f"{task.replace(' ', '-')}-{seed}"
            say(f"== {name}")
            try:
                study = Study(plant(out / name, Plan("mini", task=task, seed=seed), say=say), say)
                study.evaluate()
                write_report(study.run, study.inputs)
            except BkdattrError as error:
                failed[name] = " ".join(str(error).split())
    return failed


def reproduce(out: Path, grid: Grid, say: Callable[[str], None]) -> dict[str, str]:
    """Make or finish every run of the grid; returns the failures by name, after everything else was tried."""
    failed = {}
    for task in grid.tasks:
        for seed in grid.seeds:
            for variant in grid.variants:
                name = f"{task}-{seed}-{variant}"
                say(f"== {name}")
                try:
                    study = Study(plant(out / name, grid.plan(task, seed, variant), say=say), say)
                    study.evaluate()
                    study.probe()
                    study.attribute()
                    study.ablate()
                    study.select()
                    study.restore()
                    study.steer(kinds=KINDS, scopes=SCOPES)
                    write_report(study.run, study.inputs)
                except BkdattrError as error:
                    failed[name] = " ".join(str(error).split())
    return failed
