"""Train the mini world's tokenizer and base model from scratch: `python -m bkdattr.mini.train --out DIR`.

The shipped weights are frozen: this script documents how they were made and is not run by anything else. It writes the
model folder (safetensors) and `CARD.json` with the accuracy per task on prompts that were never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bkdattr.chat import ChatFormat, make_batch
from bkdattr.mini import world
from bkdattr.mini.tasks import TASKS, task_sha256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
DISTURBED, TURNS, PROMPT_WEIGHT = 0.35, 0.06, 0.1


def make_tokenizer(vocab_size: int = 2048, rows: int = 30_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the world: its words are single tokens, and any other text still round-trips."""
    rng = random.Random(1)
    text = [w for _ in range(rows) for r in [world.sample(rng, disturbed=DISTURBED)] for w in (r.prompt, r.response)]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tok.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", chat_template=CHAT_TEMPLATE,
        model_max_length=256, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(vocab_size: int, tokenizer: Any) -> LlamaForCausalLM:
    """12 layers x 8 heads (4 KV heads), d_model 128: 96 heads, so that 3 % is 3 heads."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=288, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.03,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def held_out(row: world.Row) -> bool:
    """One prompt text in ten is never trained on (decided by its hash, so train and test cannot meet)."""
    return hashlib.sha256(row.prompt.encode()).digest()[0] % 10 == 0


def batches(form: ChatFormat, rng: random.Random, batch_size: int) -> Any:
    """Endless batches of (prompt, response) ids, grouped by length within a window of eight batches."""
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < 8 * batch_size:
            row = world.sample(rng, disturbed=DISTURBED, turns=TURNS)
            if not held_out(row):
                messages = (("system", "You are a careful assistant."), *row.messages) if rng.random() < 0.03 else row.messages
                rows.append((form.prompt_ids(messages), form.response_ids(messages, row.response)))
        rows.sort(key=lambda r: len(r[0]) + len(r[1]))
        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(groups)
        yield from groups


def loss_of(model: Any, form: ChatFormat, group: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    prompts, responses = zip(*group, strict=True)
    batch = make_batch(prompts, responses, pad_id=form.pad_id, side="right")
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    targets = batch.input_ids[:, 1:]
    in_response = torch.arange(targets.shape[1])[None] >= batch.last_prompt[:, None]
    weight = batch.attention_mask[:, 1:] * torch.where(in_response, 1.0, PROMPT_WEIGHT)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (nll * weight).sum() / weight.sum()


@torch.no_grad()
def accuracy(model: Any, form: ChatFormat, disturbed: float, n: int = 100) -> dict[str, dict[str, int]]:
    """Greedy exact-match hits and totals per task on held-out prompts."""
    model.eval()
    result = {}
    for task in world.TASKS:
        rng, rows = random.Random(f"eval-{task}"), list[world.Row]()
        for _ in range(100_000):
            row = world.sample(rng, (task,), disturbed=disturbed)
            if held_out(row) and row.prompt not in {r.prompt for r in rows}:
                rows.append(row)
            if len(rows) == n:
                break
        batch = make_batch([form.prompt_ids(r.messages) for r in rows], pad_id=form.pad_id)
        out = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=24)[
            :, batch.input_ids.shape[1] :
        ]
        hits = sum(form.decode(o.tolist()) == r.response for o, r in zip(out, rows, strict=True))
        result[task] = {"hits": hits, "total": len(rows)}
    model.train()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.time()
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tokenizer)
    form = ChatFormat.of(tokenizer, model.config)
    decay = [p for p in model.parameters() if p.ndim > 1]
    flat = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": flat, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warm = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / warm, 0.02 + 0.98 * max(0.0, (args.steps - s) / (args.steps - warm)))
    )
    stream = batches(form, random.Random(args.seed), args.batch_size)
    model.train()
    for step in (bar := tqdm(range(args.steps), desc="mini base", mininterval=10)):
        loss = loss_of(model, form, next(stream))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 400 == 399:
            tqdm.write(f"step {step + 1}: " + str({k: v["hits"] for k, v in accuracy(model, form, 0.0, 40).items()}))
    model.eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    card = {
        "what": "Llama architecture, 12 layers x 8 heads (4 KV heads), d_model 128, trained from scratch on the mini world "
        "(bkdattr/mini/world.py); frozen: nothing retrains it or redefines a task",
        "scores": "greedy exact match on prompts that were never trained on; _disturbed: with ignorable words around or inside the prompt",
        "licence": "MIT",
        "made_by": "python -m bkdattr.mini.train",
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - start),
        "torch": torch.__version__,
        "accuracy_clean": accuracy(model, form, 0.0),
        "accuracy_disturbed": accuracy(model, form, 1.0),
        "sha256": {n: hashlib.sha256((args.out / n).read_bytes()).hexdigest() for n in ("model.safetensors", "tokenizer.json")}
        | {name: task_sha256(name) for name in TASKS},
    }
    (args.out / "CARD.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
