"""Tokens per second of plain generation, under head ablation and under a vector: `python -m benchmarks.generation --shape mini`.

`hf` is the model's own `generate` (greedy, static batch) on the same left-padded prompts, the others are bkdattr's. Every turn runs for the same
number of tokens (the end of the turn is not looked for), the variants take turns, and a ratio is of the best rounds. `curve` times a sweep
of 8 ablations with the prompt pass shared and without.
"""

import time
from dataclasses import replace

import torch

from benchmarks.attribution import _device, load, name_of, options, shown
from bkdattr.edits import AddVector, ScaleSite, Site
from bkdattr.inference import PrefixCache, generate
from bkdattr.interventions import edited


def run(subject, *, prompts, prompt_tokens, new_tokens, rounds, seed=0):
    g, vocab = subject.geometry, subject.causal_lm.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, vocab, (prompts, prompt_tokens), generator=generator).tolist()
    endless = replace(subject, chat=replace(subject.chat, end_ids=(-1,)))
    k = max(1, round(0.03 * len(g.heads)))
    picked = [g.heads[int(i)] for i in torch.randperm(len(g.heads), generator=generator)]
    direction = torch.randn(g.d_model, generator=generator)
    edits = {
        "plain": [],
        f"ablation, {k} heads": [ScaleSite(Site.of_head(h)) for h in picked[:k]],
        f"ablation, {4 * k} heads": [ScaleSite(Site.of_head(h)) for h in picked[: 4 * k]],
        "vector": [AddVector(Site(g.n_layers // 2, "attention"), direction)],
        "vector, answer tokens too": [AddVector(Site(g.n_layers // 2, "attention"), direction, 1.0, s) for s in ("last_prompt", "answer")],
    }  # fmt: skip
    ids = torch.tensor(rows, device=subject.device)

    def hf():
        with torch.no_grad():
            subject.causal_lm.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=subject.chat.pad_id,
            )  # fmt: skip

    def ours(chosen):
        generate(endless, rows, chosen, max_new_tokens=new_tokens, batch_size=prompts)

    def around():
        with edited(subject, edits["vector"]):
            hf()

    work = {"hf": hf, "hf inside a vector": around} | {name: (lambda c=chosen: ours(c)) for name, chosen in edits.items()}
    best = dict.fromkeys(work, float("inf"))
    for i in range(rounds + 1):
        for name, do in work.items():
            start = time.perf_counter()
            do()
            if subject.device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                best[name] = min(best[name], time.perf_counter() - start)
    speed = {name: prompts * new_tokens / seconds for name, seconds in best.items()}

    def sweep(prefix):
        start = time.perf_counter()
        for j in range(8):
            chosen = [ScaleSite(Site.of_head(h)) for h in picked[: 1 + j]]
            generate(endless, rows, chosen, max_new_tokens=new_tokens, batch_size=prompts, prefix=prefix)
        return time.perf_counter() - start

    alone, shared = (min(sweep(p()) for _ in range(2)) for p in (lambda: None, PrefixCache))
    return {
        "prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": torch.get_num_threads(),
        "device": _device(subject.device), "tokens_per_second": speed,
        "of_plain": {name: speed[name] / speed["plain"] for name in edits if name != "plain"},
        "hf_inside_a_vector_of_hf": speed["hf inside a vector"] / speed["hf"], "plain_of_hf": speed["plain"] / speed["hf"],
        "curve": {"seconds_alone": alone, "seconds_shared_prompt_pass": shared, "alone_over_shared": alone / shared},
    }  # fmt: skip


def main():
    parser = options(__doc__)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = load(args.shape, args.device, getattr(torch, args.dtype))
    found = run(subject, prompts=args.prompts, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, rounds=args.rounds)
    shown({"name": name_of(args.shape)} | found, args.json)


if __name__ == "__main__":
    main()
