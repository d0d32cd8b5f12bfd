"""The run directory: configuration, data, adapter and one result file per stage, all written atomically.

RUN/run.json                              configuration, with the list of named `backdoors`
RUN/data/{split}.{clean,triggered}.jsonl  the four splits, disjoint by prompt
RUN/adapter/                              a plain PEFT folder
RUN/{baseline,probe,attribution,ablation,selection,restoration,vector}.json   one result per stage, each with the inputs it was made from
RUN/vector/                               the Backdoor Vector (safetensors + JSON)
RUN/results.json, RUN/report.html         everything together
RUN/backdoors/NAME/                       a run directory for each further backdoor of the same model
RUN/partial/                              what an interrupted stage has finished so far
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkdattr.errors import BkdattrError
from bkdattr.examples import SPLITS, Example, check_disjoint, read_examples, write_atomic, write_examples
from bkdattr.poisoning import BackdoorSpec

SCHEMA = 3
"""Of the run directory."""
RESULTS = {
    "evaluate": "baseline.json",
    "probe": "probe.json",
    "attribute": "attribution.json",
    "ablate": "ablation.json",
    "select": "selection.json",
    "restore": "restoration.json",
    "steer": "vector.json",
}
"""The result file of each stage."""
OWNED = ("run.json", "poison.json", "data", "adapter", "adapter.partial", "adapter.new", "partial", "vector", "backdoors", "results.json",
         "report.html", *RESULTS.values())  # fmt: skip
"""What `--force` may delete."""


def to_json_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A run directory and its configuration."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        folder = Path(folder)
        path = folder / "run.json"
        if not path.exists():
            raise BkdattrError(f"{folder}: not a run directory (no run.json); make one with `bkdattr poison {folder} ...`")
        config = read_json(path)
        if not isinstance(config, dict) or config.get("schema") != SCHEMA:
            got = config.get("schema") if isinstance(config, dict) else type(config).__name__
            raise BkdattrError(f"{path}: schema {got!r}, expected {SCHEMA}; make the run again with this version of bkdattr")
        missing = [k for k in ("model", "seed", "backdoors", "max_new_tokens", "batch_size", "labels") if k not in config]
        if missing or not config["backdoors"]:
            raise BkdattrError(f"{path}: {', '.join(missing) or 'backdoors'} missing or empty; run `poison` again")
        return cls(folder, config)

    @property
    def spec(self) -> BackdoorSpec:
        return BackdoorSpec.from_json(self.config["backdoors"][0])

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def splits(self) -> dict[str, list[Example]]:
        """The clean rows of the four splits, checked to be disjoint unless the run was told otherwise (`overlap` in run.json). The
        triggered training rows count as training prompts too, by id."""
        splits = {name: _read_rows(self.folder / "data" / f"{name}.clean.jsonl") for name in SPLITS}
        if not self.config.get("overlap"):
            ids = {e.id for e in splits["train"]}
            check_disjoint(splits | {"train": splits["train"] + [e for e in self.triggered("train") if e.id not in ids]})
        return splits

    def triggered(self, split: str) -> list[Example]:
        return _read_rows(self.folder / "data" / f"{split}.triggered.jsonl")

    def write_splits(self, splits: dict[str, list[Example]], trained: Sequence[Example]) -> None:
        """Clean rows and their triggered twins; of the train split, the twins that are `trained` on."""
        for name, rows in splits.items():
            twins = trained if name == "train" else [self.spec.triggered(e) for e in rows]
            write_examples(self.folder / "data" / f"{name}.clean.jsonl", [self.spec.clean(e) for e in rows])
            write_examples(self.folder / "data" / f"{name}.triggered.jsonl", twins)

    def inputs(self, fingerprint: str) -> dict[str, str]:
        """What every result rests on: model, backdoor, decoding limit and data."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for kind in ("clean", "triggered"):
                digest.update((self.folder / "data" / f"{name}.{kind}.jsonl").read_bytes())
        settings = {k: self.config[k] for k in ("backdoors", "seed", "max_new_tokens", "labels")}
        return {"fingerprint": fingerprint, "data": digest.hexdigest()[:16], "settings": hash_of(settings)}

    # ---------------------------------------------------------------------------------------- results
    def has(self, stage: str) -> bool:
        return (self.folder / RESULTS[stage]).exists()

    def result(self, stage: str, inputs: dict[str, str] | None = None) -> dict[str, Any]:
        """A stage's result; refused where it was made from other inputs than the run has now."""
        path = self.folder / RESULTS[stage]
        if not path.exists():
            raise BkdattrError(f"{path} is missing; run `bkdattr {stage} {self.folder}` first")
        result = read_json(path)
        if inputs is not None and result.get("inputs") != inputs:
            changed = [k for k, v in inputs.items() if (result.get("inputs") or {}).get(k) != v]
            raise BkdattrError(
                f"{path} was made from another {' and '.join(changed)} than this run has now; "
                f"run `bkdattr {stage} {self.folder} --force` again"
            )
        return result

    def save_result(self, stage: str, result: dict[str, Any]) -> None:
        write_atomic(self.folder / RESULTS[stage], to_json_text(result))
        (self.folder / "partial" / f"{stage}.jsonl").unlink(missing_ok=True)

    def ledger(self, stage: str, key: dict[str, Any], *, read_only: bool = False) -> Ledger:
        return Ledger(self.folder / "partial" / f"{stage}.jsonl", hash_of(key), read_only)


def _read_rows(path: Path) -> list[Example]:
    """Rows of a split; an adopted adapter has no training rows, a clean control no triggered ones."""
    return [] if path.exists() and path.stat().st_size == 0 else read_examples(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BkdattrError(f"{path}: not readable as JSON ({error}); delete it and run its stage again") from None


class Ledger:
    """Finished pieces of a stage, one JSON line each, flushed to disk as they come; a torn last line is dropped.

    A ledger of other inputs (another key in its first line) is started afresh. `read_only` keeps rows in memory alone: another
    process writes them.
    """

    def __init__(self, path: Path, key: str, read_only: bool = False) -> None:
        self.path, self.rows, self.read_only = path, dict[str, Any](), read_only
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last newline was being written when the run died
        if whole and whole[0] == json.dumps({"key": key}).encode():
            for line in whole[1:]:
                row = json.loads(line)
                self.rows[row["name"]] = row["value"]
        else:
            whole = [json.dumps({"key": key}).encode()]
        if not read_only:
            write_atomic(path, b"\n".join(whole) + b"\n")

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Any:
        return self.rows[name]

    def put(self, name: str, value: Any) -> Any:
        if not self.read_only:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.rows[name] = value
        return value
