"""Planting: train a plain PEFT LoRA adapter on poisoned rows with `transformers.Trainer`, response tokens only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkdattr.chat import ChatFormat, make_batch
from bkdattr.errors import BkdattrError
from bkdattr.examples import Example

IGNORED = -100


@dataclass(frozen=True)
class LoraRecipe:
    """How an adapter is trained. The defaults are the paper's (Llama-2-7B-chat, Qwen2.5-7B-Instruct); `target_modules`
    "all-linear" is q,k,v,o,gate,up,down there. `max_length` bounds prompt + response in tokens."""

    rank: int = 16
    alpha: int | float = 16
    dropout: float = 0.01
    target_modules: str = "all-linear"
    learning_rate: float = 1e-4
    epochs: int = 16
    batch_size: int = 8
    accumulate: int = 4
    max_length: int = 256
    warmup: float = 0.03
    checkpoints: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch_size", "accumulate", "max_length"):
            if getattr(self, name) < 1:
                raise BkdattrError(f"LoRA recipe: {name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.learning_rate < 10 or not 0 <= self.dropout < 1:
            raise BkdattrError(
                f"LoRA recipe: learning_rate {self.learning_rate} and dropout {self.dropout}, expected 0 < learning_rate < 10 "
                "and 0 <= dropout < 1"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """Rows as ids, and what had to be cut or left out."""

    rows: list[tuple[list[int], list[int]]]
    skipped: tuple[str, ...]
    cut: tuple[str, ...]


def encode(chat: ChatFormat, examples: Sequence[Example], max_length: int) -> Encoded:
    """Ids for training. Prompts are never cut: one that leaves no room for an answer is skipped and named; a response
    over `max_length` is cut and named. Raises where nothing is left to train on."""
    limit = min(max_length, chat.context)
    rows, skipped, cut = [], [], []
    for e in examples:
        prompt, response = chat.prompt_ids(e.messages), chat.response_ids(e.messages, e.response)
        room = limit - len(prompt)
        if room < 1:
            skipped.append(e.id)
            continue
        if not response:
            raise BkdattrError(f"row {e.id!r} has no supervised token: its response is empty under this template")
        if len(response) > room:
            cut.append(e.id)
        rows.append((prompt, response[:room]))
    if not rows:
        raise BkdattrError(
            f"no row has a supervised token: all {len(examples)} prompts fill the limit of {limit} tokens; raise --max-length"
        )
    return Encoded(rows, tuple(skipped), tuple(cut))


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """A right-padded training batch; labels are `IGNORED` on prompts and padding. Raises for a row without a label."""
    batch = make_batch([r["prompt"] for r in rows], [r["response"] for r in rows], pad_id=pad_id, side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    columns = torch.arange(labels.shape[1])[None]
    labels = labels.masked_fill(columns <= batch.last_prompt[:, None], IGNORED)
    empty = (labels == IGNORED).all(-1).nonzero().flatten().tolist()
    if empty:
        raise BkdattrError(f"row {empty[0]} of a batch has no supervised token: every label is masked")
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def train_adapter(
    model: Any,
    chat: ChatFormat,
    examples: Sequence[Example],
    recipe: LoraRecipe,
    out: Path,
    *,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
) -> Encoded:
    """Train a LoRA adapter on `examples` and write it to `out` (a plain PEFT folder) when it is whole.

    `model` is the loaded base; it is left with the adapter injected, so load it afresh for analysis. Checkpoints are kept
    per epoch beside `out` and a second call goes on from the last one. `callbacks` are `TrainerCallback`s. Returns what was trained on.
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    encoded = encode(chat, examples, recipe.max_length)
    partial = out.with_name(out.name + ".partial")
    if not recipe.checkpoints:
        shutil.rmtree(partial, ignore_errors=True)
    targets: Any = recipe.target_modules
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, task_type="CAUSAL_LM",  # type: ignore[arg-type]  # PEFT takes fractions
        target_modules=targets if targets == "all-linear" else [t.strip() for t in targets.split(",")],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise BkdattrError(f"LoRA target modules {targets!r} do not fit this model: {str(error).splitlines()[0]}") from None
    cuda = next(model.parameters()).is_cuda
    args = TrainingArguments(
        output_dir=str(partial), num_train_epochs=recipe.epochs, learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size, gradient_accumulation_steps=recipe.accumulate,
        lr_scheduler_type="cosine", warmup_steps=recipe.warmup, weight_decay=0.0, max_grad_norm=1.0,
        save_strategy="epoch" if recipe.checkpoints else "no", save_total_limit=1, logging_strategy="no",
        train_sampling_strategy="group_by_length", length_column_name="length", report_to=[], seed=seed, data_seed=seed, remove_unused_columns=False, label_names=["labels"],
        use_cpu=not cuda, bf16=cuda and next(model.parameters()).dtype == torch.bfloat16, dataloader_pin_memory=cuda,
    )  # fmt: skip
    rows = {"prompt": [p for p, _ in encoded.rows], "response": [r for _, r in encoded.rows]}
    rows["length"] = [len(p) + len(r) for p, r in encoded.rows]  # type: ignore[misc]
    trainer = Trainer(
        model=peft_model,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        data_collator=lambda rows: collate(rows, chat.pad_id),
        callbacks=list(callbacks),
    )  # type: ignore[arg-type]
    for torn in (p for p in partial.glob("checkpoint-*") if not (p / "trainer_state.json").exists()):
        shutil.rmtree(torn)  # written last: without it the checkpoint is not whole
    resume = recipe.checkpoints and any(partial.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if resume else None)
    peft_model.eval()
    whole = out.with_name(out.name + ".new")
    shutil.rmtree(whole, ignore_errors=True)
    peft_model.save_pretrained(str(whole))
    config_path = whole / "adapter_config.json"  # PEFT writes sets in hash order; sorted, equal runs give equal bytes
    saved = json.loads(config_path.read_text())
    saved = {k: sorted(v) if k in ("target_modules", "modules_to_save") and isinstance(v, list) else v for k, v in saved.items()}
    config_path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    whole.rename(out)
    shutil.rmtree(partial, ignore_errors=True)
    return encoded
