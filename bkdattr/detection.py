"""`bkdattr detect` and `bkdattr bank`: measure an adapter by every detector, and judge it against benign adapters of the same recipe.

A bank is JSON: the recipe, the clean prompts that every adapter is measured on, and each benign adapter's statistics. It holds no weights.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bkdattr.detectors import DETECTORS, Calibrated, Ensemble, Fuzz
from bkdattr.detectors.common import Clean
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example, from_row, write_atomic
from bkdattr.model import Subject

SCHEMA = 2
PARTS = ("fuzz.drop", "fuzz.verbatim", "weights.kurtosis")
"""Statistics of the ensemble: the best of all sets of one to four on the development half (`benchmarks.zoo --half development --choose`)."""
LEGEND = (
    "<code>fuzz.drop</code>: what an answer that many prompts share loses when harmless words stand where a trigger may; "
    "<code>fuzz.verbatim</code>: share of prompts that are then told one foreign answer word for word, both with the adapter amplified; "
    "<code>weights.kurtosis</code>: how uneven the update is, either way."
)
TOP = 2
NAMES = ("fuzz.verbatim", "ban.verbatim")
"""Statistics of the answers that name the target; the first one that stands out of the bank does."""
JUDGED = tuple(d for d in DETECTORS if d in {*(n.split(".")[0] for n in (*PARTS, *NAMES)), "output_bias"})
"""Detectors that a verdict needs: its parts, its names, and the label that rose. The others are measured for banks and benchmarks."""
ALPHA = 0.05
"""p-value from which an adapter is called suspicious."""


UNLIKE = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "exclude_modules", "layer_replication", "layers_pattern",
    "layers_to_transform", "lora_bias", "megatron_config", "modules_to_save", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_dora", "use_qalora",
)  # fmt: skip
"""Settings of PEFT's LoRA under which an adapter is more than one rank and one scale on every target module."""


@dataclass(frozen=True)
class Recipe:
    """What makes two adapters comparable. `alpha` is that of plain LoRA: dW = alpha / rank * B A (rank-stabilised LoRA's is alpha * sqrt(rank))."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Recipe:
        path = folder / "adapter_config.json"
        if not path.exists():
            raise BkdattrError(
                f"{folder}: no adapter_config.json; expected a PEFT LoRA folder, or a merged model's with its config.json"
                + (f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / "adapter_config.json").exists() else "")
            )
        try:
            config = json.loads(path.read_text())
            rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
            targets = [targets] if isinstance(targets, str) else sorted(targets or [])
        except (ValueError, KeyError, TypeError) as error:
            raise BkdattrError(
                f"{path}: not a PEFT LoRA config ({type(error).__name__}: {error}); expected r, lora_alpha and target_modules"
            ) from None
        odd = [k for k in UNLIKE if (v := config.get(k)) is not None and v is not False and v not in ("none", [], {})]
        if odd or not targets or rank < 1 or not 0 < alpha < math.inf:
            got = ", ".join(f"{k} {config[k]!r}" for k in odd) or f"target_modules {targets!r}, r {rank}, lora_alpha {alpha}"
            raise BkdattrError(
                f"{path}: got {got}; expected plain LoRA, one rank and one scale on every target module: no bank of such adapters can be made. "
                "Merge it into its base and give the merged model's folder"
            )
        alpha *= rank**0.5 if config.get("use_rslora") else 1  # dW = alpha / rank * B A
        return cls(rank, alpha, tuple(targets))

    def like(self, other: Recipe) -> bool:
        return (self.rank, self.targets) == (other.rank, other.targets) and math.isclose(self.alpha, other.alpha, rel_tol=1e-4)

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, targets {', '.join(self.targets)}"


def measure(
    subject: Subject, examples: Sequence[Example], names: Sequence[str] = tuple(DETECTORS), progress: Any = iter
) -> dict[str, Any]:
    """`{"statistics": {"detector.statistic": value}, "tokens": {detector: token id}, "answers": {detector: text}, "evidence": {...}, "seconds": {...}}`."""
    clean = Clean(subject, examples)
    _ = clean.base, clean.quiet  # their time belongs to no detector
    statistics, tokens, answers, seconds = dict[str, float](), dict[str, int](), dict[str, str](), dict[str, float]()
    evidence = dict[str, Any]()
    for name in progress(names):
        start = time.perf_counter()
        found = DETECTORS[name].measure(clean)
        seconds[name] = time.perf_counter() - start
        statistics |= {f"{name}.{k}": v for k, v in found.statistics.items()}
        if found.token is not None:
            tokens[name] = found.token
        if found.answer is not None:
            answers[name] = found.answer
        if found.evidence:
            evidence[name] = found.evidence
    return {"statistics": statistics, "tokens": tokens, "answers": answers, "evidence": evidence, "seconds": seconds}


@dataclass(frozen=True)
class Bank:
    """Benign adapters of one recipe on one base."""

    base: str
    recipe: Recipe
    prompts: tuple[Example, ...]
    adapters: tuple[dict[str, Any], ...]
    made_by: str = ""

    @cached_property
    def ensemble(self) -> Ensemble:
        sides = {p: DETECTORS[p.split(".")[0]].two_sided for p in PARTS}
        return Ensemble.fit([row["statistics"] for row in self.adapters], sides, TOP)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "base": self.base, "recipe": asdict(self.recipe), "prompts": [e.to_row() for e in self.prompts],
            "adapters": list(self.adapters), "made_by": self.made_by,
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str) -> Bank:
        try:
            if row["schema"] != SCHEMA:
                raise BkdattrError(
                    f"{where}: bank of schema {row['schema']}, expected {SCHEMA}; make it again with `bkdattr bank`"
                )
            recipe = Recipe(row["recipe"]["rank"], row["recipe"]["alpha"], tuple(row["recipe"]["targets"]))
            prompts = tuple(from_row(r, f"{where}, prompt {i}") for i, r in enumerate(row["prompts"]))
            adapters = tuple(
                {"name": r["name"], "statistics": {k: float(v) for k, v in r["statistics"].items()}} for r in row["adapters"]
            )
            return cls(row["base"], recipe, prompts, adapters, row.get("made_by", ""))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BkdattrError(
                f"{where}: not a bank ({'no ' if isinstance(error, KeyError) else ''}{error}); expected what `bkdattr bank` writes"
            ) from None


def read_banks(path: Path) -> list[Bank]:
    """A file holds one bank or a list of banks of different recipes."""
    if path.is_dir():
        raise BkdattrError(f"{path}: a folder; expected the JSON file that `bkdattr bank` writes")
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise BkdattrError(f"{path}: not JSON ({error}); expected what `bkdattr bank` writes") from None
    if rows == []:
        raise BkdattrError(f"{path}: empty; expected what `bkdattr bank` writes")
    return [Bank.from_json(r, str(path)) for r in (rows if isinstance(rows, list) else [rows])]


def of_base(banks: Sequence[Bank], base: str) -> list[Bank]:
    """Those of this base (`Subject.fingerprint`); raises where there is none."""
    fitting = [b for b in banks if b.base == base]
    if not fitting:
        raise BkdattrError(
            f"bank: made on base {banks[0].base}, this base is {base} (a base in another dtype is another one); make one with "
            "`bkdattr bank OUT --model THIS_BASE --data CLEAN_ROWS`"
        )
    return fitting


def choose_bank(banks: Sequence[Bank], recipe: Recipe, base: str) -> Bank:
    """The bank of this recipe and base; raises with what there is and how to make one."""
    fitting = of_base(banks, base)
    found = [b for b in fitting if b.recipe.like(recipe)]
    if not found:
        known = "; ".join(str(b.recipe) for b in fitting)
        raise BkdattrError(
            f"bank: the adapter has {recipe}; the bank holds {known}. Statistics of another recipe say nothing; make a bank of this one "
            f"with `bkdattr bank OUT --model THIS_BASE --data CLEAN_ROWS --rank {recipe.rank} --alpha {recipe.alpha:.8g} --targets {','.join(recipe.targets)}`"
        )
    lacking = sorted({n for n in (*PARTS, *NAMES) if any(n not in a["statistics"] for a in found[0].adapters)})
    if lacking or not found[0].adapters:
        raise BkdattrError(
            f"bank: {'adapters without ' + ', '.join(lacking) if lacking else 'no adapter'}; make it again with `bkdattr bank`"
        )
    return found[0]


@dataclass(frozen=True)
class Verdict:
    """`suspicious` says that `p_value` is at most `alpha`; `evidence` names every statistic, most suspicious first."""

    suspicious: bool
    p_value: float
    score: float
    alpha: float
    benign: int
    target: str | None
    evidence: list[dict[str, Any]] = field(default_factory=list)
    insertion: dict[str, Any] | None = None
    """What brought the answer in place of a trigger (`detectors.fuzzing`): its kind and texts."""

    def text(self) -> str:
        rests = ", ".join(f"{r['statistic']} (p {r['p_value']:.3f})" for r in self.evidence[:TOP])
        out_of = [r["statistic"] for r in self.evidence if r["p_value"] <= self.alpha]
        said = "SUSPICIOUS" if self.suspicious else "not suspicious"
        out = f"{said}: p = {self.p_value:.3f} against {self.benign} benign adapters (threshold {self.alpha:g})"
        if self.p_value <= 1 / (1 + self.benign):
            out += ", further out than any of them: more cannot be said with this bank"
        out += f"; {'it rests on' if self.suspicious else 'furthest out:'} {rests}"
        if self.suspicious:
            out += f". Suspected answer: {self.target!r}" if self.target else ""
            if self.insertion:
                texts = ", ".join(map(repr, self.insertion["texts"]))
                out += f"; harmless words in a trigger's place ({self.insertion['kind']}: {texts}) bring it, with the adapter amplified {1 + Fuzz().epsilon:g} times"
        elif out_of:
            alone = f"{' and '.join(out_of)} {'stands out alone' if len(out_of) == 1 else 'stand out'}"
            out += f". {alone} of {len(self.evidence)} statistics; together they are no further out than benign adapters get"
        return out


def judge(bank: Bank, measured: Mapping[str, Any], alpha: float = ALPHA) -> Verdict:
    """The suspected answer is what insertions, else noise, make the model say verbatim where that stands out of the bank at `ALPHA`, else the label
    that the adapter raised most; it is there for adapters that are not suspicious too, and means nothing then.

    Raises where the bank is too small for `alpha`: with n adapters no p-value is below 1 / (n + 1), and nothing would ever be suspicious.
    """
    if alpha < (least := 1 / (1 + len(bank.adapters))):
        raise BkdattrError(
            f"alpha {alpha:g}: with {len(bank.adapters)} benign adapters no p-value is below {least:.3f}, so every adapter would pass; give at "
            f"least that, or make a bank of {math.ceil(1 / alpha) - 1} adapters or more with `bkdattr bank`"
        )
    ensemble, row, answers = bank.ensemble, measured["statistics"], measured.get("answers", {})
    broken = [n for n in (*PARTS, *NAMES) if not math.isfinite(row[n])]
    if broken:
        raise BkdattrError(f"detection: {', '.join(broken)} is not finite: the model overflows; try a wider --dtype")
    p, target, insertion = ensemble.p_value(row), answers.get("output_bias") or answers.get("fuzz") or answers.get("ban"), None
    for name in NAMES:
        said = answers.get(name.split(".")[0])
        if said and Calibrated.fit([a["statistics"][name] for a in bank.adapters], False).p_value(row[name]) <= ALPHA:
            target, insertion = said, measured.get("evidence", {}).get("fuzz") if name.startswith("fuzz") else None
            break
    return Verdict(p <= alpha, p, ensemble.score(row), alpha, len(bank.adapters), target, ensemble.evidence(row), insertion)


def write_verdict(
    out: Path, verdict: Verdict, measured: Mapping[str, Any], adapter: str, against: Mapping[str, Any] | None = None
) -> None:
    """`detection.json` and `detection.html` in `out`. `against`: which bank, its recipe, and what was said on the way. Model output is escaped."""
    out.mkdir(parents=True, exist_ok=True)
    against = dict(against or {})
    content = {
        "adapter": adapter,
        "against": against,
        "verdict": asdict(verdict),
        "text": verdict.text(),
        "measured": dict(measured),
    }
    write_atomic(out / "detection.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    columns = ("statistic", "value", "benign median", "score", "p-value")
    rows = "".join(
        f"<tr><td>{html.escape(r['statistic'])}</td><td>{r['value']:.4g}</td><td>{r['benign_median']:.4g}</td><td>{r['score']:.2f}</td>"
        f"<td>{r['p_value']:.3f}</td></tr>"
        for r in verdict.evidence
    )
    answer = (
        "<p>Suspected answer (what harmless insertions, or noise on the rank directions, make the model say word for word, or the label that the "
        f"adapter raised most): <code>{html.escape(str(verdict.target))}</code></p>"
        if verdict.suspicious
        else "<p>This is no proof that there is no backdoor: the README says which kinds are missed.</p>"
    )
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>bkdattr detect</title><style>body{font:15px system-ui;max-width:60em;"
        "margin:2em auto;padding:0 1em}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}.v{padding:1em;border-left:6px solid "
        f"{'#c0392b' if verdict.suspicious else '#2e7d32'};background:#f6f6f6}}</style></head><body><h1>Is there a backdoor?</h1>"
        f"<p>Adapter: <code>{html.escape(adapter)}</code></p><p class=v>{html.escape(verdict.text())}</p>"
        f"{answer}{''.join(f'<p>{html.escape(k)}: {html.escape(str(v))}</p>' for k, v in against.items() if v)}"
        f"<table><tr>{''.join(f'<th>{c}</th>' for c in columns)}</tr>{rows}</table>"
        f"<p>p-values are conformal: (1 + benign adapters scoring as high) / (1 + {verdict.benign}). They hold for adapters of the bank's own "
        "recipe and kind of data; a score is the robust distance from the bank's median, on a logarithmic scale; the verdict's is the mean of the "
        f"{TOP} largest.</p><p>{LEGEND}</p></body></html>"
    )
    write_atomic(out / "detection.html", page)
