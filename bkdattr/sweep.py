"""`bkdattr sweep`: many runs (adapters x tasks x seeds ...) on Ray, which does the scheduling; one row per run.

A run is a directory of its own, so a sweep that was interrupted goes on where it was. A run that crashes is tried again `retries`
times, one that refuses its input is listed with the reason, and the next call of the same command tries what has not finished.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bkdattr.errors import BkdattrError
from bkdattr.examples import write_atomic
from bkdattr.options import KNOWN
from bkdattr.run import hash_of, read_json, to_json_text

STAGES = ("evaluate", "probe", "attribute", "ablate", "select", "restore", "steer")
PATHS = ("adapter", "model", "data", "held_out", "triggered")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says. `runs` are options of `bkdattr poison` by name of the run; `options` those of the stages (keyword
    arguments of `Study`'s methods). `cpus` and `gpus` are what one run takes."""

    out: Path
    runs: dict[str, Row]
    stages: tuple[str, ...] = STAGES
    options: dict[str, Row] = field(default_factory=dict)
    retries: int = 1
    cpus: float = 1
    gpus: float = 0

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """`[grid]` makes a run of every combination of its lists, `[[run]]` single ones; `[every]` holds what they share. A run is called by its `name`, or by its values."""
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BkdattrError(f"{path}: not a readable TOML file ({error})") from None
        every, grid, single = table.pop("every", {}), table.pop("grid", {}), table.pop("run", [])
        plain = {k: table.pop(k) for k in ("stages", "retries", "cpus", "gpus") if k in table}
        out = table.pop("out", None)
        stages = tuple(plain.pop("stages", STAGES))
        wrong = [s for s in (*stages, *table) if s not in STAGES]
        if out is None or wrong or not all(isinstance(v, list) and v for v in grid.values()) or not (grid or single):
            raise BkdattrError(
                f"{path}: got out={out!r}, stages {list(stages)}, tables {[*table]} and grid {grid}; expected out, stages and tables of "
                f"{', '.join(STAGES)}, and a [grid] of lists or a [[run]]"
            )
        runs = dict[str, Row]()
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
        for own in [*combinations, *single]:
            options = {k: _resolved(v) if k in PATHS else v for k, v in {**every, **own}.items()}
            unknown = sorted(set(options) - set(KNOWN))
            if unknown:
                raise BkdattrError(f"{path}: unknown option {unknown[0]!r}, expected some of {', '.join(KNOWN)}")
            said = [own["name"]] if "name" in own else list(own.values())
            name = re.sub(r"[^\w.]+", "-", "-".join(map(str, said))).strip("-")
            if name in runs:
                raise BkdattrError(f"{path}: two runs are named {name!r}; give one another name")
            runs[name] = options
        return cls(Path(out), runs, stages, table, **plain)


def _resolved(value: Any) -> Any:
    """A path that is here as an absolute one: a worker has another working directory."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def _key(sweep: Sweep, name: str) -> str:
    """What a finished run rests on: its options, those of the stages, and the bytes of its rows."""
    options = sweep.runs[name]
    files = [Path(options[k]) for k in ("data", "held_out", "triggered") if k in options]
    rows = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
    return hash_of([options, list(sweep.stages), sweep.options, rows])


def _check_stage_options(sweep: Sweep) -> None:
    from bkdattr.stages import Study

    for stage, options in sweep.options.items():
        known = [k for k in inspect.signature(getattr(Study, stage)).parameters if k != "self"]
        wrong = [k for k in options if k not in known]
        if wrong:
            raise BkdattrError(f"[{stage}] of the sweep: unknown option {wrong[0]!r}, expected some of {', '.join(known)}")


def run_one(folder: str, options: Row, stages: tuple[str, ...], stage_options: dict[str, Row], threads: int) -> Row:
    """Plant one run and take it through its stages; what a worker does. Returns its headline rates."""
    import torch

    from bkdattr.options import plan_of
    from bkdattr.planting import plant
    from bkdattr.report import write_report
    from bkdattr.stages import Study
    from bkdattr.terminal import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    log = Path(folder) / "sweep.log"

    def say(text: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    study = Study(plant(Path(folder) / "run", plan_of(options), say=say), say)
    for stage in stages:
        getattr(study, stage)(**stage_options.get(stage, {}))
    results = write_report(study.run, study.inputs)
    base = results.get("baseline", {})
    return {k: base.get(k) for k in ("asr", "false_trigger", "clean_accuracy")}


def run_sweep(sweep: Sweep, *, address: str | None = None, say: Callable[[str], None] = print) -> list[Row]:
    """Make or finish every run; returns one row each: name, status, attempts, seconds, error and headline rates."""
    try:
        import ray
    except ImportError:
        raise BkdattrError("sweeps run on Ray, which is not installed; pip install 'bkdattr[fleet]'") from None
    _check_stage_options(sweep)
    path, keys = sweep.out / "sweep.json", {name: _key(sweep, name) for name in sweep.runs}
    old = {r["name"]: r for r in read_json(path)} if path.exists() else {}
    rows = {
        name: r
        for name in sweep.runs
        if (r := old.get(name)) and r["status"] == "finished" and r["key"] == keys[name]
        and (sweep.out / name / "run" / "results.json").exists()
    }  # fmt: skip
    if rows:
        say(f"sweep: {len(rows)} of {len(sweep.runs)} runs were finished before")
    todo = [name for name in sweep.runs if name not in rows]
    if todo:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        started = not ray.is_initialized()
        if started:
            ray.init(
                address=address,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        try:
            with tqdm(total=len(sweep.runs), initial=len(rows), desc="sweep") as bar:
                for row in _on_ray(ray, sweep, todo):
                    rows[row["name"]] = row | {"key": keys[row["name"]]}
                    write_atomic(path, to_json_text([rows[n] for n in sweep.runs if n in rows]))
                    bar.update()
        finally:
            if started:
                ray.shutdown()
    return [rows[name] for name in sweep.runs]


def _on_ray(ray: Any, sweep: Sweep, todo: list[str]) -> Iterator[Row]:
    """Rows as the runs end. A run that died is submitted again; an error of our own ends its run at once."""
    threads = max(1, int(sweep.cpus))
    task = ray.remote(num_cpus=sweep.cpus, num_gpus=sweep.gpus, max_retries=0)(run_one)
    attempts, begun = dict.fromkeys(todo, 0), dict[str, float]()

    def submit(name: str) -> Any:
        attempts[name] += 1
        begun.setdefault(name, time.time())
        folder = str((sweep.out / name).resolve())
        return task.remote(folder, sweep.runs[name], sweep.stages, sweep.options, threads)

    waiting = {submit(name): name for name in todo}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        name = waiting.pop(done)
        row: Row = {"name": name, "attempts": attempts[name], "error": None}
        try:
            row |= {"status": "finished"} | ray.get(done)
        except Exception as error:  # whatever a run died of is a row of the sweep, not its end
            cause = getattr(error, "cause", None) or error
            if not isinstance(cause, BkdattrError) and attempts[name] <= sweep.retries:
                waiting[submit(name)] = name
                continue
            row |= {"status": "failed", "error": f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"}
        yield row | {"seconds": round(time.time() - begun[name], 2)}
