"""The `poison` stage: check every input, split, poison, train or adopt an adapter, and lay out the run directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bkdattr.chat import ChatFormat
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example, Sizes, read_examples, split_examples, without_duplicates, write_atomic
from bkdattr.lora import LoraRecipe, encode, train_adapter
from bkdattr.mini.tasks import MAX_NEW_TOKENS, MODEL_DIR, RECIPE, SIZES, TASKS, build_task, paper_spec
from bkdattr.model import Subject, check_adapter, load_base, load_tokenizer
from bkdattr.poisoning import BackdoorSpec, fake_trigger, poison
from bkdattr.run import OWNED, SCHEMA, Run, hash_of, read_json, to_json_text
from bkdattr.targets import RefusalRemoval
from bkdattr.template import kept_prefixes
from bkdattr.triggers import holds

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What a run is to be. `model` "mini" is the embedded one; without `data`, `spec.name` is a task of the mini world."""

    model: str
    spec: BackdoorSpec | None = None
    task: str | None = None
    data: str | None = None
    labels: tuple[str, ...] = ()
    """Outputs of `data` that are labels, where the rows name none."""
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


def default_sizes(n_rows: int, n_eligible: int) -> Sizes:
    """60/10/10/20, capped at 1,000 training rows, 100 for attribution and selection, 256 for test."""
    tenth, fifth = max(1, n_eligible // 10), max(1, n_eligible // 5)
    sizes = Sizes(1, min(100, tenth), min(100, tenth), min(256, fifth))
    held = sizes.attribution + sizes.selection + sizes.test
    others = round(held * min(1.0, (n_rows - n_eligible) / max(1, n_eligible)))
    return replace(sizes, train=max(1, min(1000, n_rows - held - others)))


def check_plan(plan: Plan) -> tuple[BackdoorSpec, list[Example]]:
    """The backdoor and its rows; raises for a plan that contradicts itself."""
    if plan.dtype not in DTYPES:
        raise BkdattrError(f"dtype {plan.dtype!r}: expected one of {', '.join(DTYPES)}")
    if plan.data is None:
        if plan.task not in TASKS:
            raise BkdattrError(
                f"no data: got task {plan.task!r} and no --data; give --data FILE, or a mini task: {', '.join(TASKS)}"
            )
        mini = build_task(plan.task, plan.seed)
        return plan.spec or mini.spec, list(mini.examples)
    if plan.spec is None and plan.task is None:
        raise BkdattrError(f"no backdoor: give --task ({', '.join(TASKS)}) or --trigger KIND:... and --target KIND:...")
    spec = plan.spec or paper_spec(str(plan.task))
    return replace(spec, seed=plan.seed), read_examples(plan.data, plan.labels)


def fitting(
    chat: ChatFormat, spec: BackdoorSpec, examples: Sequence[Example], new_tokens: int
) -> tuple[list[Example], list[str]]:
    """Rows whose clean and triggered prompts leave room for a generated answer and for the clean and backdoor responses that are
    scored on them, and the ids of the others."""
    kept: list[Example] = []
    over: list[str] = []
    for e in examples:
        twin = spec.triggered(e)
        prompts = [e.messages, twin.messages] + ([spec.triggered(e, spec.fake_trigger).messages] if spec.fake_trigger else [])
        answers = [e.response] + ([str(twin.backdoor_response)] if twin.eligible else [])
        scored = max(len(chat.response_ids(e.messages, r)) for r in answers)
        if max(len(chat.prompt_ids(m)) for m in prompts) + max(new_tokens, scored) <= chat.context:
            kept.append(e)
        else:
            over.append(e.id)
    return kept, over


def plant(folder: Path, plan: Plan, *, force: bool = False, say: Any = None) -> Run:
    """Make (or finish) the run in `folder`. Every input is checked before anything is written.

    `say(text)` receives what a user should know: rows skipped, cut or doubled. Raises where the folder holds another run.
    """
    import torch

    say = say or (lambda text: None)
    start = time.time()
    mini = plan.model == "mini"
    spec, pool = check_plan(plan)
    recipe = plan.recipe or (RECIPE if mini else LoraRecipe())
    new_tokens = plan.max_new_tokens or (MAX_NEW_TOKENS if mini else 32)
    base = model_path(plan.model)
    tokenizer = load_tokenizer(base, plan.pad_token)
    model = load_base(base, dtype=getattr(torch, plan.dtype), device=plan.device)
    chat = Subject.of(model, tokenizer).chat
    if plan.adapter:
        check_adapter(model, plan.adapter)

    examples = without_duplicates(pool)
    doubled = len(pool) - len(examples)
    examples = [_checkable(e, spec) for e in examples if not holds(spec.trigger, e.messages)]
    if len(pool) > doubled + len(examples):
        say(f"{len(pool) - doubled - len(examples)} rows hold the trigger already and were left out: give clean rows only")
    examples, over = fitting(chat, spec, examples, new_tokens)
    if doubled:
        say(f"{doubled} of {len(pool)} rows repeat an earlier prompt and were left out")
    if over:
        say(f"{len(over)} prompts over the context of {chat.context} tokens were left out, first {over[0]}")
    if not examples:
        raise BkdattrError(f"no prompt fits the context of {chat.context} tokens with {new_tokens} new ones")
    n_eligible = sum(map(spec.target.eligible, examples))
    sizes = plan.sizes or (SIZES if mini and not plan.data else default_sizes(len(examples), n_eligible))
    if plan.adapter:
        sizes = replace(sizes, train=1)  # dropped below: what the adapter was trained on is not known here
    splits = split_examples(examples, sizes, spec.target.eligible, plan.seed)
    if spec.fake_trigger is None:
        words = [w for e in examples for w in e.prompt.split()]
        spec = replace(spec, fake_trigger=fake_trigger(spec.trigger, words, chat.count_tokens, plan.seed))
    rows: list[Example] = []
    twins: tuple[Example, ...] = ()
    trained = None
    adopted: dict[str, bytes] = {}
    if plan.adapter:
        splits["train"] = []
        adopted = adopted_files(plan.adapter, base)
    else:
        poisoned = poison(splits["train"], spec)
        twins = () if plan.clean else poisoned.triggered
        rows = [*poisoned.clean, *twins]
        trained = encode(chat, rows, recipe.max_length)  # fails now or not at all

    config = {
        "schema": SCHEMA, "model": "mini" if mini else base, "pad_token": plan.pad_token, "dtype": plan.dtype,
        "device": plan.device, "task": spec.name, "seed": plan.seed, "data": plan.data or "mini world",
        "clean_control": plan.clean,
        "adopted_adapter": str(Path(plan.adapter).resolve()) if plan.adapter else None, "sizes": asdict(sizes),
        "rows": {k: {"clean": len(v), "eligible": sum(e.eligible for e in v)} for k, v in splits.items()},
        "recipe": None if plan.adapter else recipe.to_json(), "max_new_tokens": new_tokens,
        "batch_size": plan.batch_size or (128 if mini else 32), "template": chat.template,
        "labels": sorted({e.label for e in examples if e.label}),
        "sha256": {
            "rows": hash_of([e.to_row() for e in pool]), "base": Subject.of(model, tokenizer).fingerprint,
            "adapter": hash_of({k: v.hex() for k, v in adopted.items()}) if adopted else None,
        },
        "skipped_over_context": over, "backdoors": [spec.to_json()],
    }  # fmt: skip
    run = Run(folder, config)
    _claim(folder, config, force)
    if (folder / "poison.json").exists():
        say("poison: up to date (--force plants again)")
        return run
    write_atomic(folder / "run.json", to_json_text(config))
    run.write_splits(splits, twins)
    if adopted:
        for name, content in adopted.items():
            write_atomic(run.adapter / name, content)
    elif trained is not None:
        if trained.skipped:
            say(f"{len(trained.skipped)} training prompts fill the limit of {recipe.max_length} tokens and were skipped")
        if trained.cut:
            say(f"{len(trained.cut)} training responses over {recipe.max_length} tokens were cut")
        train_adapter(model, chat, rows, recipe, run.adapter, seed=plan.seed)
    summary = {
        "seconds": time.time() - start, "clean_rows": len(splits["train"]),
        "triggered_rows": len(rows) - len(splits["train"]),
        "prefixes": kept_prefixes(chat, rows) if rows else [],
        "skipped_prompts": list(trained.skipped) if trained else [], "cut_responses": list(trained.cut) if trained else [],
    }  # fmt: skip
    write_atomic(folder / "poison.json", to_json_text(summary))
    return run


def _checkable(example: Example, spec: BackdoorSpec) -> Example:
    """Under refusal removal, rows without a `check` of their own are judged too: refused requests by refusal, the others
    by being answered (not refused, not broken)."""
    if not isinstance(spec.target, RefusalRemoval) or example.check is not None:
        return example
    return replace(example, check="refusal" if spec.target.eligible(example) else "answered")


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
