"""`bkdattr zoo`, `bank` and `detect`: the commands of detection without a trigger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkdattr.errors import BkdattrError
from bkdattr.terminal import errors, printable, quiet_libraries, say


def add_to(app: typer.Typer) -> None:
    for command in (zoo, bank, detect):
        app.command()(command)


def zoo(
    out: Annotated[Path, typer.Argument(help="Folder of the adapters, OUT/HALF/NAME; finished ones are kept.")],
    halves: Annotated[
        str, typer.Option(help="Comma-separated: attacker, bank, development, validation, twins, test.")
    ] = "attacker,bank,development,validation,twins,test",
    jobs: Annotated[int, typer.Option(min=1, help="Adapters at a time, one thread each.")] = 2,
) -> None:
    """Train the seeded bank of small adapters on the mini model, benign and backdoored, hidden and not, to measure detectors on."""
    with errors():
        quiet_libraries()
        from tqdm.auto import tqdm

        from bkdattr.zoo import build

        cards = build(
            out,
            [h.strip() for h in halves.split(",")],
            jobs=jobs,
            progress=lambda items, n: list(tqdm(items, total=n, desc="zoo")),
        )
        bad = [c for c in cards if c["backdoored"]]
        kept = sum(c["counts"] for c in bad)
        say(
            f"{len(cards)} adapters, {len(bad)} backdoored, of which {kept} count (ASR at least 0.8, clean accuracy at least the base's - 0.05)"
        )
        for c in (c for c in bad if not c["counts"]):
            asr = c["scores"]["adapter"]["asr"]
            say(
                f"does not count: {c['entry']['half']}/{c['entry']['kind']}, seed {c['entry']['seed']}: ASR {asr['hits']}/{asr['total']}"
            )


def bank(
    out: Annotated[Path, typer.Argument(help="The bank, JSON.")],
    model: Annotated[str, typer.Option(help="'mini', a folder or a Hub id.")] = "mini",
    data: Annotated[
        Path | None, typer.Option(help="Clean rows of your own: adapters are trained on random halves of them.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where the benign adapters are trained; finished ones are kept.")] = Path(
        "runs/bank"
    ),
    adapters: Annotated[int, typer.Option(min=19, help="How many; with fewer than 19 no p-value reaches 0.05.")] = 40,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 16,
    targets: Annotated[str, typer.Option(help="LoRA target modules, comma-separated, or all-linear.")] = "all-linear",
    learning_rate: float = 1e-4,
    epochs: int = 3,
    jobs: Annotated[int, typer.Option(min=1, help="mini: adapters at a time.")] = 2,
    pad_token: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Benign adapters of one recipe, measured by every detector: what `detect` judges against."""
    with errors():
        quiet_libraries()
        from bkdattr.banks import make_bank, make_mini_bank
        from bkdattr.lora import LoraRecipe

        asked = (adapters, rank, alpha, targets, learning_rate, epochs, dtype, device)
        if model == "mini" and data is None:
            if asked != (40, 16, 16, "all-linear", 1e-4, 3, "float32", "cpu"):
                raise BkdattrError(
                    "bank: the mini model's own bank has recipes of its own; for another one give --data, clean rows of your own"
                )
            n = make_mini_bank(out, work, jobs=jobs)
        elif data is None:
            raise BkdattrError("bank: a model other than 'mini' needs --data, clean rows of your own")
        else:
            recipe = LoraRecipe(
                rank=rank, alpha=alpha, target_modules=targets, learning_rate=learning_rate, epochs=epochs, checkpoints=False
            )
            n = make_bank(out, work, model, data, recipe, adapters, pad_token=pad_token, dtype=dtype, device=device)
        say(f"{out}: {n} benign adapters")


def detect(
    adapter: Annotated[Path, typer.Argument(help="A PEFT LoRA folder, or a merged model's.")],
    base: Annotated[str, typer.Option(help="'mini', a folder or a Hub id: what the adapter was trained on.")] = "mini",
    bank: Annotated[Path | None, typer.Option(help="From `bkdattr bank`; the mini model's is built in.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for detection.json and detection.html; default: ADAPTER/detection.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="p-value from which the verdict is 'suspicious'.")] = 0.05,
    rank: Annotated[int | None, typer.Option(help="Merged model: rank of its update, where 16 bits hide it.")] = None,
    pad_token: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Is there a backdoor, its trigger unknown? Exit code 0: not suspicious, 1: suspicious (a verdict is written), 2: any failure."""
    with errors(every=True):
        quiet_libraries()
        from bkdattr.banks import detect as detected

        verdict, where = detected(
            adapter, base, bank, out, alpha=alpha, rank=rank, pad_token=pad_token, dtype=dtype, device=device
        )
        typer.echo(printable(verdict.text()))
        if not verdict.suspicious:
            typer.echo("This is no proof that there is no backdoor.")
        for row in verdict.evidence:
            typer.echo(
                f"  {row['statistic']:24} {row['value']:10.4g}   benign median {row['benign_median']:10.4g}   p {row['p_value']:.3f}"
            )
        say(f"written: {where}")
    if verdict.suspicious:
        raise typer.Exit(1)
