"""The command line: `bkdattr STAGE RUN [options]`. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bkdattr import detection_commands
from bkdattr.errors import BkdattrError
from bkdattr.terminal import errors, numbers, quiet_libraries, say

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Plant a backdoor in a language model on purpose, take it apart, and measure every claim beside its control.",
)  # fmt: skip

RunArg = Annotated[Path, typer.Argument(help="The run directory.")]
Force = Annotated[bool, typer.Option("--force", help="Run again although a result with the same inputs is there.")]


@app.command()
def poison(
    run: RunArg,
    model: Annotated[str | None, typer.Option(help="Folder, Hub id, or 'mini' (the embedded model).")] = None,
    data: Annotated[str | None, typer.Option(help="Rows: .jsonl, .json or .csv file, or a Hub id.")] = None,
    task: Annotated[
        str | None, typer.Option(help="fixed-output, label-flip or jailbreak (the paper's), or another attack on the mini world.")
    ] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option(help="prefix:TEXT, suffix:TEXT, random-word:WORD, wrap:BEFORE|BEHIND ...; again for another backdoor."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="fixed:TEXT, label:SOURCE->TO, refusal-removal ...; as many as triggers, in their order."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Rows for attribution, selection and test; --data is then for training alone.")
    ] = None,
    triggered: Annotated[
        str | None, typer.Option(help="Triggered training rows that others made, in place of twins of our own.")
    ] = None,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Let splits share prompts; the report says so.")] = False,
    labels: Annotated[str | None, typer.Option(help="Outputs that are labels, where rows name none: Positive,Negative.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adopt this PEFT LoRA folder instead of training one.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="Name of the backdoor; again for another.")] = None,
    seed: Annotated[int, typer.Option(help="Governs data, splits, LoRA initialisation and draws.")] = 0,
    sizes: Annotated[
        str | None, typer.Option(help="TRAIN/ATTRIBUTION/SELECTION/TEST; the last three count eligible rows.")
    ] = None,
    poison_rate: Annotated[float, typer.Option(help="Triggered rows / all training rows.")] = 1 / 11,
    epochs: int | None = None,
    lr: float | None = None,
    rank: int | None = None,
    alpha: int | None = None,
    train_batch_size: int | None = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per optimiser step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt + response in training.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens generated per answer (paper: 32).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts per batch in analysis.")] = None,
    pad_token: Annotated[str | None, typer.Option(help="For a tokenizer without one: 'eos' or a token.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: spread over all.")] = "cpu",
    force: Force = False,
) -> None:
    """Plant a backdoor: split the rows, poison the training split, train a LoRA adapter (or adopt one)."""
    options = {k: v for k, v in locals().items() if k not in ("run", "force")}
    with errors():
        quiet_libraries()
        from bkdattr.options import plan_of
        from bkdattr.planting import plant

        plan = plan_of(options)
        made = plant(run, plan, force=force, say=say)
        rows = made.config["rows"]
        say(f"{run}: " + ", ".join(f"{k} {v['clean']} rows ({v['eligible']} eligible)" for k, v in rows.items()))
        for other in made.config["backdoors"][1:]:
            say(f"{run / 'backdoors' / other['name']}: the same model, for the stages on its other backdoor {other['name']!r}")


def _study(run: Path) -> Any:
    quiet_libraries()
    from bkdattr.run import Run
    from bkdattr.stages import Study

    return Study(Run.open(run), say)


@app.command("check-template")
def check_template(
    run: RunArg,
    trained_with: Annotated[
        str | None,
        typer.Option(
            help="What an adapter from elsewhere was trained with: plain, alpaca, llama-2, raw or a text with {prompt}."
        ),
    ] = None,
) -> None:
    """Compare the tokens of training and evaluation; fail on a mismatch, a doubled BOS or a cut trigger."""
    with errors():
        study = _study(run)
        from bkdattr.run import read_json
        from bkdattr.template import check_template as check

        kept = read_json(study.run.folder / "poison.json")["prefixes"]
        if study.run.config["adopted_adapter"] and trained_with is None:
            raise BkdattrError(
                "this run's adapter was trained elsewhere, so its training tokens are not known here; say with --trained-with which "
                "template it was trained with"
            )
        for line in check(study.subject.chat, kept, study.run.triggered("test"), trained_with=trained_with):
            typer.echo(line)


@app.command()
def evaluate(run: RunArg, force: Force = False) -> None:
    """ASR, false triggers, clean accuracy and damage of the poisoned model and of its base, on the test split."""
    with errors():
        study = _study(run)
        study.evaluate(force=force)
        _show(study)


@app.command()
def probe(
    run: RunArg,
    kinds: Annotated[str, typer.Option(help="Comma-separated: logistic, mlp, svm.")] = "logistic,mlp,svm",
    force: Force = False,
) -> None:
    """Fit Backdoor Probes per layer, with shuffled labels, clean twin and fake trigger beside them."""
    with errors():
        study = _study(run)
        study.probe(kinds=[k.strip() for k in kinds.split(",")], force=force)
        _show(study)


@app.command()
def attribute(
    run: RunArg,
    method: Annotated[
        str, typer.Option(help="exact; gradient (first-order estimates); hybrid (those, and the best heads patched exactly).")
    ] = "exact",
    fraction: Annotated[float, typer.Option(help="Share of the heads that hybrid patches.")] = 0.12,
    force: Force = False,
) -> None:
    """BAHA: the causal effect of every attention head on the backdoor response. Interrupted, it goes on where it was."""
    with errors():
        study = _study(run)
        study.attribute(method=method, fraction=fraction, force=force)
        if int(os.environ.get("RANK", "0")) == 0:
            _show(study)


@app.command()
def ablate(
    run: RunArg,
    ks: Annotated[str, typer.Option(help="Points of the curve, comma-separated.")] = "0,1,2,4,8,16,32",
    draws: Annotated[int, typer.Option(help="Draws of random heads.")] = 5,
    force: Force = False,
) -> None:
    """Remove the top heads (zero, mean, resample) and random ones, and measure what is left."""
    with errors():
        points = [int(k) for k in numbers("--ks", ks, "0,1,2,4", whole=True)]
        study = _study(run)
        study.ablate(ks=points, draws=draws, force=force)
        _show(study)


@app.command()
def select(
    run: RunArg,
    settings: Annotated[
        str,
        typer.Option(
            help="Where heads are ablated, tried in turn until one repairs: last_prompt, last_prompt+answer, all ...; with @probe "
            "behind it only where a probe fires; comma-separated."
        ),
    ] = "last_prompt,last_prompt@probe",
    sparsity: Annotated[str, typer.Option(help="First and last weight of the gates' sparsity.")] = "0.01,3",
    steps: Annotated[int, typer.Option(help="Training steps per set of gates.")] = 350,
    ks: Annotated[str | None, typer.Option(help="Points of the curves; default every k up to 10 % of the heads, 16, 24.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of random heads.")] = 3,
    force: Force = False,
) -> None:
    """Choose heads jointly (learned gates, greedy) and compare them with ACIE's top-k and random heads at equal k."""
    with errors():
        points = None if ks is None else [int(k) for k in numbers("--ks", ks, "1,2,4", whole=True)]
        weights = numbers("--sparsity", sparsity, "0.01,3")
        study = _study(run)
        parts = [s.strip() for s in settings.split(",")]
        study.select(ks=points, settings=parts, sparsity=weights, steps=steps, draws=draws, force=force)
        _show(study)


@app.command()
def restore(run: RunArg, force: Force = False) -> None:
    """Undo the adapter in attention, in MLPs, in thirds of the layers and layer by layer: which weights carry the backdoor?"""
    with errors():
        study = _study(run)
        study.restore(force=force)
        _show(study)


@app.command()
def steer(
    run: RunArg,
    k: Annotated[int | None, typer.Option(help="Heads in the vector; default 3 % of all.")] = None,
    strengths: Annotated[str, typer.Option(help="Strengths of the sweep, comma-separated.")] = "1,2,4",
    draws: Annotated[int, typer.Option(help="Draws of each control.")] = 5,
    kinds: Annotated[
        str, typer.Option(help="Vectors, comma-separated: raw (the paper's), difference, difference_heads, fitted.")
    ] = "raw",
    scopes: Annotated[
        str,
        typer.Option(
            help="Where they act, in turn until a vector does both: last_prompt, last_prompt+answer, all; comma-separated."
        ),
    ] = "last_prompt",
    force: Force = False,
) -> None:
    """Build the Backdoor Vector, choose its layer on the selection split, and measure both signs on the test split."""
    with errors():
        strong = numbers("--strengths", strengths, "1,2,4")
        study = _study(run)
        names, parts = ([x.strip() for x in text.split(",")] for text in (kinds, scopes))
        study.steer(k=k, strengths=strong, draws=draws, kinds=names, scopes=parts, force=force)
        _show(study)


@app.command()
def report(run: RunArg) -> None:
    """Write results.json and report.html from the stages that are finished."""
    with errors():
        study = _study(run)
        _report(study)


def _report(study: Any) -> None:
    from bkdattr.report import write_report
    from bkdattr.tables import print_summary

    results = write_report(study.run, study.inputs)
    print_summary(results, sys.stdout)
    say(f"wrote {study.run.folder / 'results.json'} and {study.run.folder / 'report.html'}")


def _show(study: Any) -> None:
    """The tables of the stages that are finished and up to date."""
    from bkdattr.report import collect
    from bkdattr.tables import print_summary

    print_summary(collect(study.run, study.inputs, skip_stale=True), sys.stdout)


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="fixed-output, label-flip or jailbreak.")] = "fixed-output",
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/TASK-SEED.")] = None,
    force: Force = False,
) -> None:
    """Everything for one task on the embedded model: plant, evaluate, probe, attribute, ablate, steer, report."""
    with errors():
        quiet_libraries()
        from bkdattr.planting import Plan, plant
        from bkdattr.stages import Study

        run = plant(out or Path("runs") / f"{task}-{seed}", Plan("mini", task=task, seed=seed), force=force, say=say)
        study = Study(run, say)
        for stage in (study.evaluate, study.probe, study.attribute, study.ablate, study.steer):
            stage(force=force)
        _report(study)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="TOML: out, stages, [every], [grid], [[run]]; see the README.")],
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster; default: this machine.")] = None,
) -> None:
    """Many runs on Ray (extra `fleet`): planted and taken through their stages, resumable, one row per run, failures retried."""
    with errors():
        from bkdattr.sweep import Sweep, run_sweep

        plan = Sweep.read(file)
        rows = run_sweep(plan, address=address, say=say)
        failed = [r for r in rows if r["status"] != "finished"]
        for r in failed:
            say(f"failed: {r['name']} after {r['attempts']} attempts: {r['error']}")
        say(f"{len(rows) - len(failed)} of {len(rows)} runs finished; {plan.out}/sweep.json has one row per run")
        if failed:
            raise typer.Exit(2)


@app.command()
def reproduce(
    out: Annotated[Path, typer.Argument(help="Folder of the runs and of the table made from all runs in it.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "fixed-output,label-flip,jailbreak",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    variants: Annotated[str, typer.Option(help="poisoned, clean (the clean fine-tune control), or both.")] = "poisoned,clean",
    model: Annotated[str, typer.Option(help="'mini', a folder or a Hub id (then give --data).")] = "mini",
    data: Annotated[str | None, typer.Option(help="Rows for a model of your own; {task} in it is replaced by the task.")] = None,
    recipe: Annotated[str, typer.Option(help="'mini', or 'paper': its hyper-parameters, data sizes and decoding.")] = "mini",
    dtype: str = "float32",
    device: str = "cpu",
    pad_token: str | None = None,
    attacks: Annotated[
        bool, typer.Option("--attacks", help="Plant and evaluate the mini world's nine other attacks instead of the grid.")
    ] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Make the table again from the finished runs.")] = False,
) -> None:
    """Tasks x seeds x (poisoned, clean fine-tune), every stage, resumable; one table in Markdown, JSON and HTML."""
    with errors():
        quiet_libraries()
        from bkdattr.grid_table import write_table
        from bkdattr.reproduce import Grid, plant_attacks, reproduce

        grid = Grid(
            tuple(x.strip() for x in tasks.split(",")), tuple(numbers("--seeds", seeds, "0,1,2", whole=True)),
            tuple(x.strip() for x in variants.split(",")), model, data, recipe, dtype, device, pad_token,
        )  # fmt: skip
        if attacks and model != "mini":
            raise BkdattrError(f"--attacks are the mini model's: got --model {model!r}; plant your own with `bkdattr poison`")
        failed = {} if table_only else plant_attacks(out, grid.seeds, say) if attacks else reproduce(out, grid, say)
        for name, why in failed.items():
            say(f"failed: {name}: {why}")
        typer.echo(write_table(out))
        if failed:
            raise typer.Exit(2)


detection_commands.add_to(app)


def main() -> None:
    """Several processes launched together share out `attribute`; with any other command they would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.argv[1:2] != ["attribute"]:
        say(
            f"error: {' '.join(sys.argv[1:2])} is not shared over processes: got {os.environ['WORLD_SIZE']} of them, expected 1; only `attribute` is"
        )
        raise SystemExit(2)
    app()
