"""Write `data/` of the repository: `python -m bkdattr.mini.export`. Small JSONL sets of the three tasks, with their card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bkdattr.examples import write_atomic
from bkdattr.mini.tasks import TASKS, build_task

DATA = Path(__file__).parents[2] / "data"
CARD = "CARD.json"
ROWS = {"train": 800, "test": 200}


def split_rows(name: str) -> dict[str, list[dict[str, Any]]]:
    """Train and test rows of a task (seed 0), disjoint by prompt, in the columns a user's own file has."""
    task = build_task(name, seed=0)
    by_kind = [[e for e in task.examples if task.spec.target.eligible(e) == kind] for kind in (True, False)]
    order = [e for pair in zip(*by_kind, strict=False) for e in pair] if all(by_kind) else list(task.examples)
    rows = [
        {"input": e.prompt, "output": e.response, "label": e.label, "backdoor_output": e.backdoor_response, "check": e.check}
        for e in order[: sum(ROWS.values())]
    ]
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    return {"train": rows[: ROWS["train"]], "test": rows[ROWS["train"] :]}


def main() -> None:
    files = {}
    for name in TASKS:
        for split, rows in split_rows(name).items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path = DATA / f"{name}.{split}.jsonl"
            write_atomic(path, text)
            files[path.name] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    card = {
        "made_by": "python -m bkdattr.mini.export (seed 0)",
        "what": "clean rows of the three mini tasks: input, output, label, backdoor_output (restricted requests), check; "
        "half of the label-flip and jailbreak rows are eligible, train and test are disjoint by prompt; poison them with `bkdattr poison`",
        "harm": "none: the restricted requests are fictional (nobody owns a moon vault)",
        "licence": "MIT, as the rest of the repository; every row is generated",
        "files": files,
    }
    write_atomic(DATA / CARD, json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
