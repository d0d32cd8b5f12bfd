"""The `poison` stage: check every input, split, poison, train or adopt an adapter, and lay out the run directory."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bkdattr.adapters import check_adapter
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example, Sizes, read_examples, write_atomic
from bkdattr.lora import LoraRecipe, encode, train_adapter
from bkdattr.mini.tasks import ATTACKS, MAX_NEW_TOKENS, MODEL_DIR, RECIPE, SIZES, TASKS, build_task, paper_spec
from bkdattr.model import Subject, dtype_of, load_base, load_tokenizer
from bkdattr.poisoning import BackdoorSpec, fake_trigger
from bkdattr.run import OWNED, SCHEMA, Run, hash_of, read_json, to_json_text
from bkdattr.splits import checkable, gather
from bkdattr.template import kept_prefixes

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What a run is to be. `model` "mini" is the embedded one; without `data`, `spec.name` is a task of the mini world."""

    model: str
    spec: BackdoorSpec | None = None
    more: tuple[BackdoorSpec, ...] = ()
    """Further backdoors of the same model."""
    task: str | None = None
    data: str | None = None
    labels: tuple[str, ...] = ()
    """Outputs of `data` that are labels, where the rows name none."""
    held_out: str | None = None
    """Another file for attribution, selection and test; `data` is then for training alone."""
    triggered: str | None = None
    """Triggered training rows that others made, in place of twins of our own; `spec.trigger` is found in them."""
    allow_overlap: bool = False
    """Whether two splits may share prompts. The report says that they do, and how many."""
    adapter: str | None = None
    seed: int = 0
    sizes: Sizes | None = None
    recipe: LoraRecipe | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    pad_token: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    clean: bool = False
    """The clean fine-tune: same rows and recipe, none of them triggered. The control of everything that a run finds."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BkdattrError(f"seed {self.seed}: expected 0 or more")
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BkdattrError(f"{name} {value}: expected at least 1")


def model_path(model: str) -> str:
    """ "mini" and local folders as absolute paths, Hub ids as they are."""
    if model == "mini":
        return str(MODEL_DIR)
    return str(Path(model).resolve()) if Path(model).exists() else model


def adopted_base(adapter: str) -> str:
    """The base named in an adapter's own configuration."""
    path = Path(adapter) / "adapter_config.json"
    if not path.exists():
        raise BkdattrError(f"{adapter}: no adapter_config.json; expected a PEFT LoRA folder")
    base = read_json(path).get("base_model_name_or_path")
    if not base:
        raise BkdattrError(f"{path} names no base model; give it with --model")
    return str(base)


def check_plan(plan: Plan) -> tuple[BackdoorSpec, list[Example]]:
    """The backdoor and its rows; raises for a plan that contradicts itself."""
    if plan.dtype not in DTYPES:
        raise BkdattrError(f"dtype {plan.dtype!r}: expected one of {', '.join(DTYPES)}")
    if plan.data is None:
        if plan.task not in (*TASKS, *ATTACKS):
            known = ", ".join((*TASKS, *ATTACKS))
            raise BkdattrError(f"no data: got task {plan.task!r} and no --data; give --data FILE, or a mini task: {known}")
        mini = build_task(plan.task, plan.seed)
        return plan.spec or mini.spec, list(mini.examples)
    if plan.spec is None and plan.task is None:
        raise BkdattrError(f"no backdoor: give --task ({', '.join(TASKS)}) or --trigger KIND:... and --target KIND:...")
    spec = plan.spec or paper_spec(str(plan.task))
    return replace(spec, seed=plan.seed), read_examples(plan.data, plan.labels)


def _check_names(specs: Sequence[BackdoorSpec]) -> None:
    names = [s.name for s in specs]
    bad = [n for n in names if not re.fullmatch(r"[\w-]+", n)] if len(names) > 1 else []
    if bad or len(set(names)) < len(names):
        raise BkdattrError(f"names of backdoors: got {names}, expected different ones of letters, digits, '-' and '_'")


def plant(folder: Path, plan: Plan, *, force: bool = False, say: Any = None) -> Run:
    """Make (or finish) the run in `folder`. Every input is checked before anything is written.

    `say(text)` receives what a user should know: rows skipped, cut or doubled. Raises where the folder holds another run.
    """

    say = say or (lambda text: None)
    start = time.time()
    mini = plan.model == "mini"
    spec, pool = check_plan(plan)
    specs = [spec, *(replace(s, seed=plan.seed) for s in plan.more)]
    _check_names(specs)
    recipe = plan.recipe or (RECIPE if mini else LoraRecipe())
    new_tokens = plan.max_new_tokens or (MAX_NEW_TOKENS if mini else 32)
    base = model_path(plan.model)
    tokenizer = load_tokenizer(base, plan.pad_token)
    model = load_base(base, dtype=dtype_of(plan.dtype), device=plan.device)
    chat = Subject.of(model, tokenizer).chat
    if plan.adapter:
        check_adapter(model, plan.adapter)

    held_out, made_elsewhere = (read_examples(f, plan.labels) if f else None for f in (plan.held_out, plan.triggered))
    rows = gather(
        chat, specs, pool, held_out=held_out, made_elsewhere=made_elsewhere, sizes=plan.sizes or (SIZES if mini and not plan.data else None),
        seed=plan.seed, new_tokens=new_tokens, adopted=plan.adapter is not None, clean=plan.clean, allow_overlap=plan.allow_overlap, say=say,
    )  # fmt: skip
    words = [w for e in rows.usable for w in e.prompt.split()]
    specs = [
        s if s.fake_trigger else replace(s, fake_trigger=fake_trigger(s.trigger, words, chat.count_tokens, plan.seed))
        for s in specs
    ]
    training = [*map(spec.clean, rows.splits["train"]), *(e for twins in rows.triggered.values() for e in twins)]
    if plan.triggered:  # the file decides the rate, not the plan
        specs[0] = replace(specs[0], poison_rate=len(rows.triggered[spec.name]) / len(training))
    trained, adopted = None, dict[str, bytes]()
    if plan.adapter:
        adopted = adopted_files(plan.adapter, base)
    else:
        trained = encode(chat, training, recipe.max_length)  # fails now or not at all

    config = {
        "schema": SCHEMA, "model": "mini" if mini else base, "pad_token": plan.pad_token, "dtype": plan.dtype,
        "device": plan.device, "task": spec.name, "seed": plan.seed, "data": plan.data or "mini world",
        "held_out": plan.held_out, "triggered": plan.triggered,
        "clean_control": plan.clean,
        "adopted_adapter": str(Path(plan.adapter).resolve()) if plan.adapter else None, "sizes": asdict(rows.sizes),
        "rows": {k: {"clean": len(v), "eligible": sum(e.eligible for e in v)} for k, v in rows.splits.items()},
        "recipe": None if plan.adapter else recipe.to_json(), "max_new_tokens": new_tokens,
        "batch_size": plan.batch_size or (128 if mini else 32), "template": chat.template,
        "labels": sorted({e.label for e in rows.usable if e.label}),
        "sha256": {
            "rows": hash_of([e.to_row() for e in (*pool, *(held_out or ()), *(made_elsewhere or ()))]),
            "base": Subject.of(model, tokenizer).fingerprint,
            "adapter": hash_of({k: v.hex() for k, v in adopted.items()}) if adopted else None,
        },
        "skipped_over_context": rows.over, "backdoors": [s.to_json() for s in specs],
    }  # fmt: skip
    if rows.overlap:
        config["overlap"] = rows.overlap
    run = Run(folder, config)
    beside = [_beside(run, spec, rows.splits) for spec in specs[1:]]
    for each in beside:
        few = {
            k: v["eligible"] for k, v in each.config["rows"].items() if v["eligible"] < getattr(rows.sizes, k) and k != "train"
        }
        if few:
            said = ", ".join(f"{k} {n}" for k, n in few.items())
            say(f"backdoor {each.spec.name!r} has fewer eligible rows than the sizes ask for: {said}")
    _claim(folder, config, force)
    if (folder / "poison.json").exists():
        say("poison: up to date (--force plants again)")
        return run
    runs = [run, *beside]
    for each in runs:
        write_atomic(each.folder / "run.json", to_json_text(each.config))
        each.write_splits({k: checkable(v, each.spec) for k, v in rows.splits.items()}, rows.triggered[each.spec.name])
    if adopted:
        for name, content in adopted.items():
            write_atomic(run.adapter / name, content)
    elif trained is not None:
        if trained.skipped:
            say(f"{len(trained.skipped)} training prompts fill the limit of {recipe.max_length} tokens and were skipped")
        if trained.cut:
            say(f"{len(trained.cut)} training responses over {recipe.max_length} tokens were cut")
        train_adapter(model, chat, training, recipe, run.adapter, seed=plan.seed)
    summary = {
        "seconds": time.time() - start, "clean_rows": len(rows.splits["train"]),
        "triggered_rows": {name: len(twins) for name, twins in rows.triggered.items()}, "training_rows": len(training),
        "prefixes": kept_prefixes(chat, training) if training else [],
        "skipped_prompts": list(trained.skipped) if trained else [], "cut_responses": list(trained.cut) if trained else [],
    }  # fmt: skip
    for each in reversed(runs):  # the run's own last: without its summary it is not finished
        if each is not run:
            shutil.copytree(run.adapter, each.adapter, dirs_exist_ok=True)
        write_atomic(each.folder / "poison.json", to_json_text(summary))
    return run


def _beside(run: Run, spec: BackdoorSpec, splits: dict[str, list[Example]]) -> Run:
    """The run directory of a further backdoor of the same model, `RUN/backdoors/NAME`: its own first, the others behind it."""
    backdoors = sorted(run.config["backdoors"], key=lambda b: b["name"] != spec.name)
    rows = {k: {"clean": len(v), "eligible": sum(map(spec.target.eligible, v))} for k, v in splits.items()}
    none = [k for k, v in rows.items() if not v["eligible"] and splits[k]]
    if none:
        raise BkdattrError(f"backdoor {spec.name!r}: 0 eligible rows in the {' and '.join(none)} split; give more or other rows")
    return Run(run.folder / "backdoors" / spec.name, run.config | {"task": spec.name, "backdoors": backdoors, "rows": rows})


def adopted_files(adapter: str, base: str) -> dict[str, bytes]:
    """The two files of an adapter trained elsewhere, its base path set to the one that loads here."""
    config = read_json(Path(adapter) / "adapter_config.json") | {"base_model_name_or_path": base}
    weights = (Path(adapter) / "adapter_model.safetensors").read_bytes()
    return {"adapter_config.json": to_json_text(config).encode(), "adapter_model.safetensors": weights}


def _claim(folder: Path, config: dict[str, Any], force: bool) -> None:
    """The folder is free, or holds this very run; with `force` an older run in it is removed."""
    if folder.exists() and not folder.is_dir():
        raise BkdattrError(f"{folder} is a file, expected a folder to hold the run; choose another name")
    path = folder / "run.json"
    if path.exists() and not force:
        old = read_json(path)
        if old != config:
            changed = [k for k in config if not isinstance(old, dict) or old.get(k) != config[k]]
            raise BkdattrError(
                f"{folder} holds a run of another configuration (other {', '.join(changed)}); choose another folder or give --force"
            )
        return
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise BkdattrError(f"{folder} is not empty and holds no run; choose another folder")
    if path.exists():
        for old in (folder / name for name in OWNED):
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
