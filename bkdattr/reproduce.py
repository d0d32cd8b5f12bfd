"""`bkdattr reproduce`: tasks x seeds x (poisoned, clean fine-tune) through every stage, and one table over all runs of a folder.

Every run is a run directory of its own: an interrupted grid goes on where it was, several processes may fill one folder with
different tasks or seeds, and the table is made from whatever is finished.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bkdattr.errors import BkdattrError
from bkdattr.examples import Sizes, write_atomic
from bkdattr.joint import BAR
from bkdattr.lora import LoraRecipe
from bkdattr.metrics import expected_jaccard, jaccard, kendall
from bkdattr.mini.tasks import ATTACKS, TASKS
from bkdattr.planting import Plan, plant
from bkdattr.report import html_table, write_report
from bkdattr.run import read_json, to_json_text
from bkdattr.stages import Study
from bkdattr.steering import KINDS
from bkdattr.tables import METHODS, Table, k_text, show, spread

Json = dict[str, Any]
VARIANTS = ("poisoned", "clean")
PAPER_SIZES = Sizes(train=1000, attribution=96, selection=64, test=256)
SETTINGS = ("last_prompt", "last_prompt@probe", "all+last_prompt+answer")
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
                    study.select(settings=SETTINGS)
                    study.restore()
                    study.steer(kinds=KINDS, scopes=SCOPES)
                    write_report(study.run, study.inputs)
                except BkdattrError as error:
                    failed[name] = " ".join(str(error).split())
    return failed


# ------------------------------------------------------------------------------------------------ the table
def finished(out: Path) -> list[Json]:
    """`results.json` of every evaluated run, by task, variant and seed. A run of its own (`bkdattr poison OUT/NAME`, then `evaluate` and
    `report`) may stand in the folder too."""
    found = [read_json(path) for path in sorted(out.glob("*/results.json"))]
    evaluated = [r for r in found if "baseline" in r]
    if not evaluated:
        raise BkdattrError(f"{out}: no finished run in it; run `bkdattr reproduce {out}` first")
    return sorted(evaluated, key=lambda r: (r["provenance"]["task"], r["provenance"]["clean_control"], r["provenance"]["seed"]))


def whole(runs: list[Json]) -> list[Json]:
    """Those that went through every stage."""
    return [r for r in runs if all(x in r for x in ("probe", "ablation", "selection", "restoration", "vector"))]


def groups(runs: list[Json]) -> dict[str, list[Json]]:
    """Runs of one task and variant together."""
    out: dict[str, list[Json]] = {}
    for r in runs:
        p = r["provenance"]
        out.setdefault(p["task"] + (", clean fine-tune" if p["clean_control"] else ""), []).append(r)
    return out


def tables(runs: list[Json]) -> list[Table]:
    """Everything over seeds; a rate is hits over totals of all seeds and the range of the single seeds. Attack and utility hold every
    evaluated run, the other tables those that went through every stage."""
    first, runs = _attack(runs), whole(runs)
    if not runs:
        return [first]
    return [
        first, _ablation(runs), _needed(runs), _joint(runs), _vectors(runs), _best_probe(runs), _by_layer(runs),
        _cross_layer(runs), _restoration(runs), _stability(runs),
    ]  # fmt: skip


def _attack(runs: list[Json]) -> Table:
    rows = []
    for r in runs:
        p, b = r["provenance"], r["baseline"]
        near = ", ".join(f"{name} {x['asr']['value']:.2f}" for name, x in b["near_misses"].items() if x["asr"])
        rows.append([f"{p['task']}{', clean fine-tune' if p['clean_control'] else ''}, seed {p['seed']}", show(b["asr"]), show(b["false_trigger"]),
                     show(b.get("asr_fake_trigger")), near or "–", show(b["clean_accuracy"], False), show(b["base"]["clean_accuracy"], False),
                     f"{b['clean_perplexity']:.3f}"])  # fmt: skip
    columns = [
        "run",
        "ASR",
        "false triggers",
        "ASR, fake trigger",
        "ASR, near misses",
        "clean accuracy",
        "base",
        "clean perplexity",
    ]
    return "Attack and utility", columns, rows


def _ablation(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        ks = sorted({row["k"] for r in group for row in r["ablation"]})
        for mode, kind in (("zero", "attributed"), ("mean", "attributed"), ("resample", "attributed"), ("zero", "random")):
            for key, label in (("asr", "ASR"), ("recovered", "recovered"), ("clean_accuracy", "clean")):
                cells = []
                for k in ks:
                    rates = [x[key] for r in group for x in r["ablation"] if (x["mode"], x["heads"], x["k"]) == (mode, kind, k)]
                    cells.append(_mean(rates))
                out.append([name, "random heads, zero" if kind == "random" else f"ACIE top-k, {mode}", label, *cells])
    ks = sorted({row["k"] for r in runs for row in r["ablation"]})
    return "Head ablation by k (mean over seeds)", ["task", "heads", "", *map(str, ks)], out


def _needed(runs: list[Json]) -> Table:
    out = []
    for r in runs:
        p, s = r["provenance"], r["selection"]
        if p["clean_control"]:
            continue
        for method, label in METHODS.items():
            needed = [n for n in s["needed"] if n["method"] == method]
            low = " / ".join(k_text(n["asr"], n["tried"]) for n in needed)
            key = "repair" if any(n["repair"] is not None for n in needed) else "asr"
            known = [(n[key], n["draw"]) for n in needed if n[key] is not None]
            k, draw = min(known, key=lambda x: x[0]) if known else (None, None)
            row = next((x for x in s["rows"] if (x["method"], x["draw"], x["k"]) == (method, draw, k)), None)
            cells = (
                [show(row[x], False) for x in ("asr", "clean_accuracy", "recovered", "broken_triggered")] if row else ["–"] * 4
            )
            repair = " / ".join(k_text(n["repair"], n["tried"]) for n in needed)
            out.append([f"{p['task']}, seed {p['seed']}", label, s["chosen"]["setting"], low, repair, *cells])
    columns = [
        "run",
        "heads",
        "setting",
        f"k for ASR ≤ {BAR['asr']:g}",
        "k for repair",
        "ASR there",
        "clean",
        "recovered",
        "broken",
    ]
    title = (
        f"Fewest heads, read off the test curves (repair: ASR ≤ {BAR['asr']:g}, recovered ≥ {BAR['recovered']:g}, broken ≤ {BAR['broken']:g}, "
        f"clean accuracy ≥ un-edited − {BAR['clean']:g})"
    )
    return title, columns, out


def _joint(runs: list[Json]) -> Table:
    out = []
    for r in runs:
        p, s = r["provenance"], r["selection"]
        row = next(x for x in s["rows"] if x["method"] == "gate" and x["k"] == s["chosen"]["k"])
        name = f"{p['task']}{', clean fine-tune' if p['clean_control'] else ''}, seed {p['seed']}"
        tried = ", ".join(
            f"{t['setting']} (k={t['best']['k']}: {'repairs' if t['best']['repaired'] else 'does not'})" for t in s["tried"]
        )
        out.append([name, tried, s["chosen"]["setting"], str(row["k"]), show(row["asr"]), show(row["recovered"]),
                    show(row["broken_triggered"], False), show(row["clean_accuracy"], False), "yes" if row["repaired"] else "no"])  # fmt: skip
    columns = ["run", "tried (selection split)", "setting", "k", "ASR", "recovered", "broken", "clean", "repair"]
    return "Learned gates in the setting and with the k chosen on the selection split, test split", columns, out


def _vectors(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        for i, first in enumerate(group[0]["vector"]["variants"]):
            same = [r["vector"]["variants"][i] for r in group if len(r["vector"]["variants"]) > i]
            for side, sign, worst in (("activate", "+v", max), ("suppress", "−v", min)):
                controls = [
                    d[side]["asr"]["value"]
                    for v in same
                    for c in ("random_heads_matched", "random_direction")
                    for d in v["controls"][c]
                ]
                points = [v[side] for v in same]
                where = ", ".join(f"L{p['layer']}×{p['strength']:g}" for p in points)
                kept = "" if side == "activate" else spread([p["recovered"] for p in points])
                out.append([name, f"{first['kind'].replace('_', ' ')}, {first['scope']}", sign, where, spread([p["asr"] for p in points]),
                            f"{worst(controls):.2f}", kept, spread([p["broken"] for p in points]), spread([p["clean_unchanged"] for p in points])])  # fmt: skip
            held = [v["conditional"] for v in same if v["conditional"]]
            if held:
                out.append([name, "", "−v, conditional", ", ".join(f"probe L{c['probe_layer']}" for c in held), spread([c["asr"] for c in held]), "",
                            spread([c["recovered"] for c in held]), spread([c["broken"] for c in held]),
                            spread([c["clean_unchanged"] for c in held])])  # fmt: skip
    columns = [
        "task",
        "vector, scope",
        "",
        "layer × strength (selection)",
        "ASR",
        "strongest equal-norm control",
        "recovered",
        "broken",
        "clean answers unchanged",
    ]
    return "Vectors of every kind, test split", columns, out


def _best_probe(runs: list[Json]) -> Table:
    keys = ("accuracy", "shuffled", "clean_twin", "fake_trigger")
    out = []
    for name, group in groups(runs).items():
        best = [r["probe"]["best"] for r in group]
        out.append([name, ", ".join(f"{b['kind']} L{b['layer']}" for b in best), *(_range([b[k] for b in best]) for k in keys)])
    return (
        "Best probe by validation (mean and range over seeds)",
        ["task", "probe", "poisoned model", "shuffled labels", "clean twin", "fake trigger"],
        out,
    )


def _by_layer(runs: list[Json]) -> Table:
    names = {
        "accuracy": "poisoned model",
        "clean_twin": "clean twin",
        "fake_trigger": "fake trigger",
        "shuffled": "shuffled labels",
    }
    n = 1 + max(p["layer"] for r in runs for p in r["probe"]["layers"])
    out = []
    for name, group in groups(runs).items():
        for key, label in names.items():
            cells = []
            for layer in range(n):
                found = [p[key] for r in group for p in r["probe"]["layers"] if p["layer"] == layer and p["kind"] == "logistic"]
                cells.append(f"{np.mean(found):.2f}" if found and None not in found else "–")
            out.append([name, label, *cells])
    return "Logistic probe by layer (mean over seeds)", ["task", "", *map(str, range(n))], out


def _cross_layer(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        for kind in group[0]["probe"]["cross_layer"]:
            mean = np.mean([r["probe"]["cross_layer"][kind] for r in group], axis=0)
            off = mean[~np.eye(len(mean), dtype=bool)]
            near = np.concatenate([np.diag(mean, 1), np.diag(mean, -1)])
            out.append([name, kind, f"{np.diag(mean).mean():.2f}", f"{near.mean():.2f}", f"{off.mean():.2f}"])
    return "Cross-layer matrix of the probes (means)", ["task", "kind", "own layer", "next layer", "any other layer"], out


def _restoration(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        for i, first in enumerate(group[0]["restoration"]["rows"]):
            if first["window"] != "all" and ".." not in first["window"]:
                continue
            rows = [r["restoration"]["rows"][i] for r in group]
            out.append(
                [
                    name,
                    " + ".join(first["parts"]),
                    first["window"],
                    *(spread([x[k] for x in rows]) for k in ("asr", "recovered", "clean_accuracy")),
                ]
            )
    return "Adapter undone in part", ["task", "updates of", "layers", "ASR", "recovered", "clean accuracy"], out


def _stability(runs: list[Json]) -> Table:
    out = []
    for name, group in groups(runs).items():
        for i in [i for i, a in enumerate(group[0]["attribution"]) if a["site"] == "head"]:
            found = [r["attribution"][i] for r in group]
            scores = [np.array(a["scores"]) for a in found]
            k, total = found[0]["stability"]["k"], scores[0].size
            tops = [set(np.argsort(-s.ravel(), kind="stable")[:k].tolist()) for s in scores]
            pairs = [(a, b) for a in range(len(scores)) for b in range(a)]
            over = f"{np.mean([jaccard(tops[a], tops[b]) for a, b in pairs]):.2f}" if pairs else "–"
            tau = f"{np.mean([kendall(scores[a], scores[b]) for a, b in pairs]):.2f}" if pairs else "–"
            prompts = [a["stability"] for a in found]
            out.append([name, found[0]["effect"], str(k), _range([p["jaccard"] for p in prompts]), _range([p["kendall"] for p in prompts]), over, tau,
                        f"{expected_jaccard(k, total):.2f}"])  # fmt: skip
    columns = [
        "task",
        "effect",
        "k",
        "Jaccard over prompts",
        "Kendall over prompts",
        "Jaccard over seeds",
        "Kendall over seeds",
        "Jaccard of random sets",
    ]
    return "Stability of the head ranking", columns, out


def _mean(rates: list[Json | None]) -> str:
    known = [r for r in rates if r]
    return f"{sum(r['hits'] for r in known) / sum(r['total'] for r in known):.2f}" if known else "–"


def _range(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.2f} [{min(known):.2f}, {max(known):.2f}]" if known else "–"


def markdown(found: list[Table]) -> str:
    out = []
    for title, columns, rows in found:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
        out.append(f"### {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(out)


def write_table(out: Path) -> str:
    """`table.md`, `table.json` and `table.html` of all finished runs in `out`; returns the Markdown."""
    runs = finished(out)
    found = tables(runs)
    text = markdown(found)
    write_atomic(out / "table.md", text)
    names = [
        f"{r['provenance']['task']}-{r['provenance']['seed']}-{'clean' if r['provenance']['clean_control'] else 'poisoned'}"
        for r in runs
    ]
    rows = [{"title": t, "columns": c, "rows": r} for t, c, r in found]
    write_atomic(out / "table.json", to_json_text({"runs": names, "bar": BAR, "tables": rows}))
    body = "".join(map(html_table, found))
    title = html.escape(f"bkdattr reproduce: {len(runs)} runs")
    write_atomic(
        out / "table.html",
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title></head><body><h1>{title}</h1>{body}</body></html>\n",
    )
    return text
