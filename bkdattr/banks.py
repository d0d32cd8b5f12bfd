"""Making a bank of benign adapters, and one adapter's way through `bkdattr detect`."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bkdattr.adapters import check_adapter
from bkdattr.detection import (
    ALPHA,
    DETECTORS,
    JUDGED,
    Bank,
    Recipe,
    Verdict,
    choose_bank,
    judge,
    measure,
    of_base,
    read_banks,
    write_verdict,
)
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example, read_examples, write_atomic
from bkdattr.factoring import factored
from bkdattr.gates import lora_pairs
from bkdattr.lora import LoraRecipe, train_adapter
from bkdattr.mini.members import clean_prompts, entries
from bkdattr.mini.tasks import MODEL_DIR
from bkdattr.model import Subject, dtype_of, load_base, load_subject, load_tokenizer
from bkdattr.planting import model_path
from bkdattr.zoo import build

MINI_BANK = Path(__file__).parent / "mini" / "bank.json"
DIGITS = 5
"""Significant digits of a stored statistic."""
PROMPTS = 32


def digest(content: Any) -> str:
    """16 hex digits of anything JSON holds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def measured(folder: Path, base: str, prompts: Sequence[Example], *, again: bool = False, **load: Any) -> dict[str, Any]:
    """Statistics of one adapter, kept beside it in `statistics.json`; only detectors that changed are run again, and all of them for other
    prompts, another base, dtype or device, or an adapter that was trained anew. (A change of a detector's code is not seen: `again`.)"""
    files = (folder / "adapter_model.safetensors").read_bytes() + (folder / "adapter_config.json").read_bytes()
    of = digest(
        [hashlib.sha256(files).hexdigest(), str(base), [e.to_row() for e in prompts], {k: str(v) for k, v in load.items()}]
    )
    path, key = folder / "statistics.json", {n: repr(d) for n, d in DETECTORS.items()}
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not again else {}
    if kept.get("of") != of:
        kept = {"detectors": {}}
    changed = [n for n in key if kept["detectors"].get(n) != key[n]]
    if not changed:
        return kept
    found = measure(load_subject(base, folder, **load), prompts, changed)
    for part in ("statistics", "tokens", "answers", "evidence", "seconds"):
        old = {k: v for k, v in kept.get(part, {}).items() if k.split(".")[0] not in changed}
        found[part] = old | found[part]
    found |= {"of": of, "detectors": key}
    write_atomic(path, json.dumps(found) + "\n")
    return found


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: float(f"{v:.{DIGITS}g}") for k, v in values.items()}


def make_mini_bank(out: Path, work: Path, *, jobs: int = 1) -> int:
    """The mini model's banks, one per rank of the zoo's benign half "bank"."""
    build(work, ["bank"], jobs=jobs, progress=lambda items, n: list(tqdm(items, total=n, desc="benign adapters")))
    groups: dict[Recipe, list[dict[str, Any]]] = {}
    for name in tqdm(sorted(e.name for e in entries("bank")), desc="measured"):
        folder = work / "bank" / name
        found = measured(folder, str(MODEL_DIR), clean_prompts())
        groups.setdefault(Recipe.of(folder), []).append({"name": name, "statistics": _rounded(found["statistics"])})
    base = Subject.of(load_base(MODEL_DIR), load_tokenizer(MODEL_DIR)).fingerprint
    banks = [
        Bank(base, r, clean_prompts(), tuple(rows), "bkdattr bank --model mini").to_json()
        for r, rows in sorted(groups.items(), key=lambda g: g[0].rank)
    ]
    write_atomic(out, json.dumps(banks) + "\n")
    return sum(len(b["adapters"]) for b in banks)


def make_bank(
    out: Path, work: Path, model: str, data: Path, recipe: LoraRecipe, n: int, *, pad_token: str | None = None, dtype: str = "float32",
    device: str = "cpu",
) -> int:  # fmt: skip
    """`n` adapters, each trained on a random half of the clean rows in `data` less the prompts that adapters are measured on."""
    if out.is_dir():
        raise BkdattrError(f"{out}: a folder; expected the name of a JSON file to write")
    rows = read_examples(data)
    if len(rows) < 2 * PROMPTS:
        raise BkdattrError(
            f"{data}: {len(rows)} rows, expected at least {2 * PROMPTS}: {PROMPTS} to measure on, the rest to train on"
        )
    path = model_path(model)
    tokenizer, base = load_tokenizer(path, pad_token), load_base(path, dtype=dtype_of(dtype), device=device)
    plain = Subject.of(base, tokenizer)
    rows = random.Random(0).sample(rows, len(rows))
    prompts, rest = rows[:PROMPTS], rows[PROMPTS:]
    found: list[dict[str, Any]] = []
    made = None
    for seed in tqdm(range(n), desc="benign adapters"):
        folder = work / f"benign-{seed:03d}"
        card = folder / "card.json"
        wanted = {"recipe": recipe.to_json(), "base": plain.fingerprint, "seed": seed, "data": digest([e.to_row() for e in rest])}
        if not card.exists() or json.loads(card.read_text()) != wanted:
            work.mkdir(parents=True, exist_ok=True)
            drawn = random.Random(seed).sample(rest, max(1, len(rest) // 2))
            train_adapter(copy.deepcopy(base), plain.chat, drawn, recipe, folder, seed=seed)
            write_atomic(card, json.dumps(wanted) + "\n")
        statistics = measured(folder, path, prompts, dtype=dtype_of(dtype), device=device, pad_token=pad_token)["statistics"]
        found.append({"name": folder.name, "statistics": _rounded(statistics)})
        made = Recipe.of(folder)
    assert made is not None
    bank = Bank(plain.fingerprint, made, tuple(prompts), tuple(found), f"bkdattr bank: {json.dumps(asdict(recipe))}")
    write_atomic(out, json.dumps(bank.to_json()) + "\n")
    return n


def detect(
    adapter: Path, base: str, bank: Path | None, out: Path | None, *, alpha: float = ALPHA, rank: int | None = None,
    pad_token: str | None = None, dtype: str = "float32", device: str = "cpu",
) -> tuple[Verdict, Path]:  # fmt: skip
    """Judge one adapter, or a merged model in a folder of its own, and write the verdict; returns it and where it lies. Options are checked
    before anything is run. `rank`: of a merged model's update, where it cannot be read off (`factoring.factored`)."""
    if not 0 < alpha < 1:
        raise BkdattrError(f"alpha {alpha}: expected a p-value between 0 and 1")
    if bank is None and model_path(base) != str(MODEL_DIR):
        raise BkdattrError(
            "detect: a base other than 'mini' needs --bank; make one with `bkdattr bank OUT --model BASE --data CLEAN_ROWS`"
        )
    where = out or adapter / "detection"
    if where.exists() and not where.is_dir():
        raise BkdattrError(f"--out {where}: a file; expected a folder for detection.json and detection.html")
    for old in ("detection.json", "detection.html"):  # what fails below leaves no verdict of another time
        (where / old).unlink(missing_ok=True)
    path, banks = model_path(base), read_banks(bank or MINI_BANK)
    merged = (adapter / "config.json").exists() and not (adapter / "adapter_config.json").exists()
    if rank is not None and not merged:
        raise BkdattrError(f"--rank {rank}: {adapter} is no merged model; an adapter's rank stands in its adapter_config.json")
    recipe, against = (
        None if merged else Recipe.of(adapter),
        {"base": base, "dtype": dtype, "bank": str(bank or "built in"), "version": version("bkdattr")},
    )
    plain = Subject.of(load_base(path, dtype=dtype_of(dtype), device=device), load_tokenizer(path, pad_token))
    if recipe is None:
        whole = load_base(adapter, dtype=dtype_of(dtype), device=device)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            subject = factored(whole, plain.model, load_tokenizer(path, pad_token), rank=rank)
        left = " ".join(str(w.message) for w in said if "factoring" in str(w.message))
        if left:
            warnings.warn(left, stacklevel=2)
        pairs = lora_pairs(subject.causal_lm)
        n, targets = len(pairs[0][1]), {name.rsplit(".", 1)[-1] for name, *_ in pairs}
        # a merged update has its alpha in it: the bank's own is no condition
        like = Recipe(n, float(n), tuple(sorted(targets)))
        ranks = sorted({b.recipe.rank for b in of_base(banks, plain.fingerprint)})
        if rank is None and n not in ranks:
            raise BkdattrError(
                f"{adapter}: its update has up to {n} directions, the bank knows rank {', '.join(map(str, ranks))}; a merge in 16 bits hides its "
                "rank in rounding: give it with --rank"
            )
        alphas = [b.recipe.alpha for b in of_base(banks, plain.fingerprint) if replace(b.recipe, alpha=like.alpha) == like]
        chosen = choose_bank(banks, replace(like, alpha=alphas[0]) if alphas else like, plain.fingerprint)
        against["merged"] = (
            f"a merge does not tell its adapter's alpha: {chosen.recipe.alpha:g} as in the bank, at rank {n}. {left}".strip()
        )
    else:
        check_adapter(plain.model, adapter)
        chosen = choose_bank(banks, recipe, plain.fingerprint)
        subject = load_subject(path, adapter, dtype=dtype_of(dtype), device=device, pad_token=pad_token)
    against["recipe"] = str(chosen.recipe)
    judge(chosen, chosen.adapters[0], alpha)  # refuses a threshold that the bank cannot reach
    found = measure(subject, chosen.prompts, JUDGED, progress=lambda names: tqdm(names, desc="detectors"))
    verdict = judge(chosen, found, alpha)
    write_verdict(where, verdict, found, str(adapter), against)
    return verdict, where
