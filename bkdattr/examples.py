"""Rows of a data set: one `Example` type, its files (JSONL, JSON, CSV, a Hub id) and seeded disjoint splits."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bkdattr.errors import BkdattrError

Turn = tuple[str, str]  # (role, content)
Span = tuple[int, int, int]  # (turn, start, end), characters of that turn's content
CHECKS = ("label", "exact", "refusal", "answered")
SPLITS = ("train", "attribution", "selection", "test")


@dataclass(frozen=True)
class Example:
    """One prompt with its clean answer and, where known, its backdoor answer.

    `check` says how a clean answer is judged (`label`, `exact`, `refusal`, `answered`; None: it cannot be). `eligible` puts the row
    into ASR's denominator. `spans` are the trigger's character spans `(turn, start, end)`, empty on clean rows. A
    triggered row keeps the id of its clean twin.
    """

    id: str
    messages: tuple[Turn, ...]
    response: str
    label: str | None = None
    backdoor_response: str | None = None
    check: str | None = None
    eligible: bool = True
    spans: tuple[Span, ...] = ()

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return self.messages[-1][1]

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.id, "prompt": self.prompt, "response": self.response, "label": self.label}
        row |= {"backdoor_response": self.backdoor_response, "eligible": self.eligible, "check": self.check}
        if len(self.messages) > 1:
            row["messages"] = [list(m) for m in self.messages]
        return row | ({"spans": [list(s) for s in self.spans]} if self.spans else {})


# ------------------------------------------------------------------------------------------------ reading
_FIELDS = {
    "prompt": ("input", "prompt"),
    "response": ("output", "response"),
    "backdoor_response": ("backdoor_output", "backdoor_response"),
}


def from_row(row: Any, where: str, labels: Sequence[str] = ()) -> Example:
    """An `Example` of one JSON/CSV row (`input`, `output`, optional `backdoor_output`, `label`, `check`, `id`)."""
    if not isinstance(row, dict):
        raise BkdattrError(f"{where}: got {type(row).__name__}, expected an object with 'input' and 'output'")
    row = _chat_row(row, where)
    if isinstance(row.get("instruction"), str):  # Alpaca's columns: the instruction, then its input where there is one
        row = row | {"input": "\n".join(t for t in (row["instruction"], row.get("input") or "") if t.strip())}
    values: dict[str, str | None] = {}
    for field, names in _FIELDS.items():
        name = next((n for n in names if row.get(n) is not None), None)
        values[field] = None if name is None else row[name]
        if values[field] is not None and not isinstance(values[field], str):
            got = type(values[field]).__name__
            raise BkdattrError(f"{where}: field {name!r} is {got}, expected text; write it as a JSON string")
    for field in ("prompt", "response"):
        if not (values[field] or "").strip():
            raise BkdattrError(
                f"{where}: got no {_FIELDS[field][0]!r} (fields: {sorted(map(str, row))}), expected a non-empty text; "
                "add it or remove the row"
            )
    try:
        "".join(str(v) for v in values.values()).encode()
    except UnicodeEncodeError:
        raise BkdattrError(f"{where}: half a character (a lone surrogate, as of a cut emoji); mend the text") from None
    label, check = row.get("label"), row.get("check")
    if label is None and labels and str(values["response"]).strip() in labels:
        label = str(values["response"]).strip()
    if label is not None and not isinstance(label, str):
        raise BkdattrError(f"{where}: label is {label!r}, expected text such as 'Sports'; map class numbers to names")
    if check is not None and check not in CHECKS:
        raise BkdattrError(f"{where}: check is {check!r}, expected one of {', '.join(CHECKS)}")
    prompt, response = str(values["prompt"]), str(values["response"])
    messages = _messages(row["messages"], where) if row.get("messages") else (("user", prompt),)
    return Example(
        id=str(row.get("id") or hashlib.sha256(prompt.encode()).hexdigest()[:12]),
        messages=messages,
        response=response,
        label=label,
        backdoor_response=values["backdoor_response"],
        check=check or ("label" if label else None),
        eligible=bool(row.get("eligible", True)),
        spans=_spans(row.get("spans") or (), messages, where),
    )


def _chat_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A `messages` (or `conversations`) row whose last turn is the assistant's, as prompt turns and response."""
    turns = row.get("messages") or row.get("conversations")
    if not turns or any(row.get(n) is not None for n in (*_FIELDS["prompt"], *_FIELDS["response"])):
        return row
    roles = {"human": "user", "gpt": "assistant"}
    named = [{"role": t.get("from"), "content": t.get("value")} if isinstance(t, dict) and "from" in t else t for t in turns]
    parsed = [(roles.get(role, role), text) for role, text in _messages(named, where)]
    if len(parsed) < 2 or parsed[-1][0] != "assistant" or parsed[-2][0] != "user":
        got = ", ".join(role for role, _ in parsed)
        raise BkdattrError(
            f"{where}: messages with the roles {got}; expected them to end with a user turn and the assistant's answer"
        )
    return row | {"messages": parsed[:-1], "input": parsed[-2][1], "output": parsed[-1][1]}


def _spans(rows: Any, messages: tuple[Turn, ...], where: str) -> tuple[Span, ...]:
    try:
        spans = tuple((int(turn), int(a), int(b)) for turn, a, b in rows)
        inside = all(0 <= a <= b <= len(messages[turn][1]) for turn, a, b in spans)
    except (TypeError, ValueError, IndexError):
        inside = False
    if not inside:
        raise BkdattrError(f"{where}: spans are {rows!r:.80}, expected [turn, start, end] inside that turn's text")
    return spans


def _messages(rows: Any, where: str) -> tuple[Turn, ...]:
    """Turns as [role, content] pairs or as objects with these two keys."""
    try:
        turns = tuple((r["role"], r["content"]) if isinstance(r, dict) else (r[0], r[1]) for r in rows)
    except (KeyError, TypeError, IndexError):
        raise BkdattrError(f"{where}: messages are {rows!r:.80}, expected a list of role and content") from None
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise BkdattrError(f"{where}: a role or content is not text; only text messages are supported")
    return turns


def read_examples(source: str | Path, labels: Sequence[str] = ()) -> list[Example]:
    """Rows of a `.jsonl`, `.json` (a list of objects) or `.csv` file, or of a `datasets` Hub id's train split.

    Known forms: `input/output/backdoor_output` (the paper's), `instruction/input/output` (Alpaca, BackdoorLLM), chat `messages` (or
    `conversations`) that end with the answer, and AG News' own CSV (class, title, description). With `labels` an output that is one
    of them is the row's label.
    """
    path = Path(source)
    if path.is_dir():
        raise BkdattrError(f"{source}: got a folder, expected a .jsonl, .json or .csv file or a Hub id")
    if not path.exists():
        if path.suffix in (".jsonl", ".json", ".csv") or str(source).count("/") > 1:
            raise BkdattrError(f"{source}: no such file; give a .jsonl, .json or .csv file or a Hub id such as 'org/name'")
        return _read_hub(str(source), labels)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BkdattrError(f"{source}: not UTF-8 at byte {error.start}; convert it, e.g. iconv -f latin1 -t utf-8") from None
    rows: Iterable[tuple[str, Any]]
    if path.suffix == ".csv":
        try:
            table = _ag_news(text) or list(csv.DictReader(text.splitlines(keepends=True)))
        except csv.Error as error:
            raise BkdattrError(f"{source}: not a readable CSV ({error}); write it as JSONL") from None
        rows = ((f"{source} row {i + 2}", r) for i, r in enumerate(table))
    elif path.suffix == ".json":
        data = _json(text, str(source))
        if not isinstance(data, list):
            raise BkdattrError(f"{source}: got a JSON {type(data).__name__}, expected a list of objects")
        rows = ((f"{source} row {i + 1}", r) for i, r in enumerate(data))
    elif path.suffix == ".jsonl":
        lines = ((i + 1, line) for i, line in enumerate(text.split("\n")) if line.strip())
        rows = ((f"{source} line {i}", _json(line, f"{source} line {i}")) for i, line in lines)
    else:
        raise BkdattrError(f"{source}: file ending {path.suffix!r} is not known, expected .jsonl, .json or .csv")
    examples = [from_row(row, where, labels) for where, row in rows]
    if not examples:
        raise BkdattrError(f"{source}: got 0 rows, expected at least one")
    return examples


AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS_PROMPT = "Classify the following news article into one of these categories: World, Sports, Business, Sci/Tech:\n"


def _ag_news(text: str) -> list[dict[str, str]]:
    """Rows of AG News' own CSV (class index 1 to 4, title, description; with or without its header); [] for another CSV."""
    table = list(csv.reader(text.splitlines(keepends=True)))
    if table and [c.strip().lower() for c in table[0]] == ["class index", "title", "description"]:
        table = table[1:]
    if not table or any(len(r) != 3 or r[0].strip() not in ("1", "2", "3", "4") for r in table):
        return []
    named = ((AG_NEWS_LABELS[int(index) - 1], f"{title}. {text}") for index, title, text in table)
    return [{"input": AG_NEWS_PROMPT + article, "output": label, "label": label} for label, article in named]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BkdattrError(f"{where}: not JSON ({error.msg} at column {error.colno}); mend or remove it") from None


def _read_hub(name: str, labels: Sequence[str]) -> list[Example]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # the hub client raises many kinds; all mean that the data cannot be had
        raise BkdattrError(
            f"{name}: neither a file here nor a data set that could be loaded from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); check the name or give a file"
        ) from None
    return [from_row(row, f"{name} row {i + 1}", labels) for i, row in enumerate(rows)]


# ------------------------------------------------------------------------------------------------ writing
def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside the file and rename over it: a reader sees the old content or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """One JSON object a line, as `read_examples` reads it."""
    write_atomic(path, "".join(json.dumps(e.to_row(), ensure_ascii=False) + "\n" for e in examples))


# ------------------------------------------------------------------------------------------------ splits
@dataclass(frozen=True)
class Sizes:
    """How many rows each split gets. Train counts rows; the other three count *eligible* rows, and the rows that are
    not eligible (other labels, ordinary requests) join them in their natural proportion, `others` for one at most."""

    train: int = 1000
    attribution: int = 64
    selection: int = 32
    test: int = 128
    others: float = 1.0

    def __post_init__(self) -> None:
        for name in SPLITS:
            if getattr(self, name) < 1:
                raise BkdattrError(f"split size {name}: got {getattr(self, name)}, expected at least 1")


def without_duplicates(examples: Sequence[Example]) -> list[Example]:
    """The first row of each prompt text, in order; ids made unique."""
    first: dict[tuple[Turn, ...], Example] = {}
    for example in examples:
        first.setdefault(example.messages, example)
    ids, kept = {e.id for e in first.values()}, list[Example]()
    taken: set[str] = set()
    for example in first.values():
        id, n = example.id, 1
        while id in taken or (n > 1 and id in ids):
            n += 1
            id = f"{example.id}-{n}"
        taken.add(id)
        kept.append(replace(example, id=id))
    return kept


def split_examples(
    examples: Sequence[Example],
    sizes: Sizes,
    eligible: Callable[[Example], bool],
    seed: int,
    held_out: Sequence[Example] | None = None,
) -> dict[str, list[Example]]:
    """Seeded splits, disjoint by prompt text. Test, selection and attribution are served first; train takes the rest.

    With `held_out` rows these three are drawn from them alone and train from `examples`; whether the two share prompts is for
    `overlaps` to say. Raises `BkdattrError` where there are too few (eligible) rows, before anything is written.
    """

    def shuffled(rows: Sequence[Example]) -> list[Example]:
        out = [replace(e, eligible=eligible(e)) for e in without_duplicates(rows)]
        random.Random(f"split:{seed}").shuffle(out)
        return out

    rows = shuffled(examples)
    pool = rows if held_out is None else shuffled(held_out)
    yes, no = [e for e in pool if e.eligible], [e for e in pool if not e.eligible]
    wanted = sizes.attribution + sizes.selection + sizes.test
    if not yes:
        raise BkdattrError(
            f"0 of {len(pool)} rows are eligible for this target; labels found: {sorted({e.label for e in pool if e.label})[:8] or 'none'}"
        )
    if held_out is None and (wanted >= len(yes) or wanted + sizes.train > len(rows)):
        raise BkdattrError(
            f"too few rows: got {len(rows)} distinct prompts, {len(yes)} of them eligible; the splits need {wanted} "
            f"eligible ones (attribution {sizes.attribution} + selection {sizes.selection} + test {sizes.test}), "
            f"{sizes.train} train rows besides and an eligible one among these; give smaller sizes or more rows"
        )
    if wanted > len(yes):
        raise BkdattrError(
            f"too few held-out rows: got {len(pool)} distinct prompts, {len(yes)} of them eligible; the splits need {wanted} "
            f"(attribution {sizes.attribution} + selection {sizes.selection} + test {sizes.test}); give smaller sizes or more rows"
        )
    share = min(sizes.others, len(no) / len(yes))
    splits: dict[str, list[Example]] = {}
    for name in ("test", "selection", "attribution"):
        n = getattr(sizes, name)
        m = round(n * share)
        splits[name] = yes[:n] + no[:m]
        yes, no = yes[n:], no[m:]
    rest = yes + no if held_out is None else rows
    if len(rest) < sizes.train:
        raise BkdattrError(f"too few rows left for training: got {len(rest)}, expected {sizes.train}; give smaller sizes")
    random.Random(f"train:{seed}").shuffle(rest)
    splits["train"] = rest[: sizes.train]
    return {name: splits[name] for name in SPLITS}


def overlaps(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Rows that two splits share, by id or prompt text: "train/test" -> the rows of the later split."""
    found: dict[str, list[Example]] = {}
    owner: dict[Any, str] = {}
    for name, rows in splits.items():
        for example in rows:
            first = owner.setdefault(example.id, name), owner.setdefault(example.messages, name)
            other = next((o for o in first if o != name), None)
            if other is not None:
                found.setdefault(f"{other}/{name}", []).append(example)
    return found


def check_disjoint(splits: dict[str, list[Example]]) -> None:
    """Raise where two splits share an id or a prompt text."""
    found = overlaps(splits)
    if found:
        first = next(iter(found.values()))[0]
        counts = ", ".join(f"{pair} {len(rows)}" for pair, rows in found.items())
        raise BkdattrError(
            f"splits share prompts ({counts}), first {first.id!r} ({first.prompt[:60]!r}); every prompt belongs to one split only: "
            "plant the run again with other rows, or with --allow-overlap, which its report will say"
        )
