"""Head attribution, engine against engine on the same prompts: `python -m benchmarks.attribution --shape gpt2-small`.

published   the procedure as released: every prompt padded to 256 tokens, one forward pass of all layers and positions per head
dynamic     the same, padded to the longest prompt of the batch
tl          TransformerLens activation patching on a merged copy (`hook_z`), padded to the longest
exact       ours: resumed at the patched layer, prefixes once, all heads of a layer in one batch
nnsight     the same by an nnsight 0.8 trace per head, where it is installed (it is no dependency)
hybrid      ours: screened by gradient, the best of them and a random sample patched exactly
gradient    ours: attribution patching

Slow engines are timed on some heads, spread evenly over the layers, and scaled to all; the output says on how many. Prompts are random
tokens, the scored answer is the model's own greedy continuation (GPT-2 small's random weights are drawn wide, or every token would have
a probability of about nothing). The first four compute the logits of every position, as the released procedure does; the log-softmax is
taken at the answer alone in all of them. `max_abs_diff_logp` and `max_rel_diff_acie` (of the largest ACIE) compare exact with whole passes of one
prompt at a time without padding or cache, `engine_differs_from_exact_by` the slow engines with exact. On a CPU `peak_bytes` is the growth of
resident memory, which is less for what runs later in the process. `self_check_seconds` is what exact spends once per model and prompt lengths
to prove that it can be resumed; it is not in its seconds.
"""

import argparse
import importlib.util
import json
import platform
import threading
import time
from pathlib import Path

import torch

from bkdattr.attribution import sites_of
from bkdattr.engine import Patcher, prefix_cache
from bkdattr.gradient import gradient_effects
from bkdattr.lens import to_transformer_lens
from bkdattr.metrics import spearman
from bkdattr.model import Subject, load_base, load_tokenizer
from bkdattr.screening import FRACTION, screen
from bkdattr.traces import Traces

MINI = Path(__file__).parents[1] / "bkdattr" / "mini" / "model"
PADDED = 256
SHAPES = {
    "gpt2-small": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
                            "initializer_range": 0.12}),
    "llama-7b": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                           "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}),
}  # fmt: skip


def load(shape, device="cpu", dtype=torch.float32):
    """The mini model, a folder, or random weights of a known shape."""
    folder = MINI if shape == "mini" or shape in SHAPES else Path(shape)
    tokenizer = load_tokenizer(folder, None if folder == MINI else "eos")
    if shape not in SHAPES:
        return Subject.of(load_base(folder, dtype=dtype, device=device).requires_grad_(False), tokenizer)
    from transformers import AutoConfig, AutoModelForCausalLM

    family, over = SHAPES[shape]
    config = AutoConfig.for_model(family, **over, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Subject.of(model.requires_grad_(False), tokenizer)


@torch.no_grad()
def continuation(subject, prompts, n):
    """n greedy tokens, end of turn or not."""
    ids = torch.tensor(prompts, device=subject.device)
    for _ in range(n):
        logits = subject.causal_lm(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, len(prompts[0]) :].tolist()


@torch.no_grad()
def traces(subject, prompts):
    """z at the last token, one prompt at a time."""
    seen = []
    for p in prompts:
        row = []
        handles = [
            s.out_proj.register_forward_pre_hook(lambda m, args, row=row: row.append(args[0][0, -1].float().cpu()))
            for s in subject.sites
        ]
        subject.causal_lm(input_ids=torch.tensor([p], device=subject.device), use_cache=False)
        for h in handles:
            h.remove()
        seen.append(torch.stack(row))
    z = torch.stack(seen).unflatten(-1, (subject.geometry.n_heads, -1))
    empty = z.new_zeros(len(prompts), subject.geometry.n_layers, subject.geometry.d_model)
    return Traces(tuple(map(str, range(len(prompts)))), z, empty, empty, empty, subject.fingerprint)


def mean_logp(logits, starts, answers):
    """Mean log p of each answer; `starts[i]` is the column that predicts its first token. All answers are of one length."""
    token = torch.tensor(answers, device=logits.device)
    columns = torch.tensor(starts, device=logits.device)[:, None] + torch.arange(token.shape[1], device=logits.device)
    picked = logits[torch.arange(len(token), device=logits.device)[:, None], columns].float()
    return picked.log_softmax(-1).gather(-1, token[..., None])[..., 0].mean(-1).cpu()


class Slow:
    """One forward pass of all prompts per head, right-padded to `width` (None: the longest)."""

    def __init__(self, subject, prompts, answers, width=None):
        self.subject, self.answers = subject, answers
        rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        width = max(map(len, rows)) if width is None else width
        self.ids = torch.full((len(rows), width), subject.chat.pad_id)
        self.mask = torch.zeros_like(self.ids)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)], self.mask[i, : len(row)] = torch.tensor(row), 1
        self.last = [len(p) - 1 for p in prompts]
        self.ids, self.mask = self.ids.to(subject.device), self.mask.to(subject.device)
        self.tokens = 0

    @torch.no_grad()
    def __call__(self, site=None, value=None):
        handles = []
        if site is not None:
            d = self.subject.geometry.d_head

            def hook(_module, args):
                z = args[0].clone()
                z[range(len(self.last)), self.last, site.head * d : (site.head + 1) * d] = value.to(z)
                return (z, *args[1:])

            handles = [self.subject.sites[site.layer].out_proj.register_forward_pre_hook(hook)]
        try:
            logits = self.subject.causal_lm(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        finally:
            for h in handles:
                h.remove()
        self.tokens += self.ids.numel()
        return mean_logp(logits, self.last, self.answers)


class Lens(Slow):
    """The same through a TransformerLens bridge of a merged copy."""

    def __init__(self, subject, prompts, answers):
        super().__init__(subject, prompts, answers)
        self.bridge = to_transformer_lens(subject)

    @torch.no_grad()
    def __call__(self, site=None, value=None):
        def hook(z, hook):
            z = z.clone()
            z[range(len(self.last)), self.last, site.head] = value.to(z)
            return z

        hooks = [] if site is None else [(f"blocks.{site.layer}.attn.hook_z", hook)]
        self.tokens += self.ids.numel()
        return mean_logp(self.bridge.run_with_hooks(self.ids, attention_mask=self.mask, fwd_hooks=hooks), self.last, self.answers)


class Sight(Slow):
    """The same through nnsight, which wraps the model as it is."""

    def __init__(self, subject, prompts, answers):
        from nnsight import NNsight

        super().__init__(subject, prompts, answers)
        row = subject.architecture
        self.path, self.model = f"{row.layers}.{{}}.{row.out_proj}", NNsight(subject.causal_lm)

    @torch.no_grad()
    def __call__(self, site, value):
        d, rows, last = self.subject.geometry.d_head, list(range(len(self.last))), self.last
        proj = self.model
        for name in self.path.format(site.layer).split("."):
            proj = proj[int(name)] if name.isdigit() else getattr(proj, name)
        with self.model.trace(input_ids=self.ids, attention_mask=self.mask, use_cache=False):
            z = proj.input.clone()
            z[rows, last, site.head * d : (site.head + 1) * d] = value.to(z)
            proj.input = z
            logits = self.model.output.logits.save()
        self.tokens += self.ids.numel()
        return mean_logp(logits, self.last, self.answers)


class Peak:
    """Highest resident memory (CPU, sampled) or allocated memory (CUDA) above that at the start, in bytes."""

    def __init__(self, device):
        self.cuda, self.bytes, self._stop = device.type == "cuda", 0, threading.Event()

    @staticmethod
    def _resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def _watch(self):
        while not self._stop.wait(0.003):
            self.bytes = max(self.bytes, self._resident() - self._start)

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = self._resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc):
        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._stop.set()
            self._thread.join()


def timed(device, work):
    with Peak(device) as peak:
        start = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return found, seconds, peak.bytes


def run(subject, *, prompts, prompt_tokens, answer_tokens, sample, checked, seed=0, engines=None):
    """Everything on one set of prompts; returns the JSON of the module's docstring."""
    g, device = subject.geometry, subject.device
    vocab = subject.causal_lm.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, vocab, (2 * prompts, prompt_tokens), generator=generator).tolist()
    taken, given = rows[:prompts], rows[prompts:]
    answers = continuation(subject, taken, answer_tokens)
    donors, heads = traces(subject, given), sites_of(g, "head")
    some = heads[:: max(1, len(heads) // sample)][:sample]
    out = {
        "shape": {"n_layers": g.n_layers, "n_heads": g.n_heads, "d_model": g.d_model, "vocab": vocab, "heads": len(heads)},
        "prompts": prompts, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "threads": torch.get_num_threads(),
        "dtype": str(next(subject.causal_lm.parameters()).dtype), "device": _device(device), "engines": {},
    }  # fmt: skip

    def note(name, seconds, tokens, peak, timed_heads):
        scale = len(heads) / timed_heads
        out["engines"][name] = {
            "seconds": seconds * scale,
            "tokens": int(tokens * scale),
            "peak_bytes": peak,
            "timed_heads": timed_heads,
        }

    def patch(sites, prefix=None):
        patcher = Patcher(subject, taken, answers, batch_size=prompts, prefix=prefix)
        found = {}
        for layer in sorted({s.layer for s in sites}):
            group = [s for s in sites if s.layer == layer]
            found |= dict(zip(group, patcher.patched([(s, donors.mean_at(s)) for s in group]), strict=True))
        return patcher, found

    def estimate(prefix=None):
        return gradient_effects(subject, taken, answers, donors, batch_size=prompts, prefix=prefix)

    def hybrid():
        prefix = prefix_cache(subject)
        best, rest = screen(estimate(prefix), FRACTION, seed)
        return patch([*best, *rest], prefix)

    _, out["self_check_seconds"], _ = timed(device, lambda: Patcher(subject, taken, answers, batch_size=prompts).reason)
    patch(heads[-2:])  # warm, as the slow engines are
    (patcher, exact), seconds, peak = timed(device, lambda: patch(heads))
    note("exact", seconds, patcher.tokens, peak, len(heads))
    effects = {s: x.exp() - patcher.base.exp() for s, x in exact.items()}
    guess, seconds, peak = timed(device, estimate)
    passes = prompts * (prompt_tokens - 1 + 2 * (answer_tokens + 1))  # the tails forward and backward
    note("gradient", seconds, passes, peak, len(heads))
    (screened, _), seconds, peak = timed(device, hybrid)
    note("hybrid", seconds, prompts * 2 * (answer_tokens + 1) + screened.tokens, peak, len(heads))
    builders = {
        "published": lambda: Slow(subject, taken, answers, PADDED),
        "dynamic": lambda: Slow(subject, taken, answers),
        "tl": lambda: Lens(subject, taken, answers),
    }
    if importlib.util.find_spec("nnsight"):
        builders["nnsight"] = lambda: Sight(subject, taken, answers)
    off = {}
    for name, build in builders.items():
        if engines and name not in engines:
            continue
        slow = build()
        slow(some[0], donors.mean_at(some[0]))  # warm
        slow.tokens = 0
        (_, logp), seconds, peak = timed(device, lambda slow=slow: (None, {s: slow(s, donors.mean_at(s)) for s in some}))
        note(name, seconds, slow.tokens, peak, len(some))
        off[name] = max(float((logp[s] - exact[s]).abs().max()) for s in some)
        del slow
    e = out["engines"]
    out["ratio"] = {f"{a}_over_exact": e[a]["seconds"] / e["exact"]["seconds"] for a in builders if a in e}
    out["ratio"] |= {f"exact_over_{b}": e["exact"]["seconds"] / e[b]["seconds"] for b in ("gradient", "hybrid")}
    out["engine_differs_from_exact_by"] = off
    reference = [s for s in heads[:: max(1, len(heads) // checked)]][:checked]
    alone = [Slow(subject, [p], [a]) for p, a in zip(taken, answers, strict=True)]
    base = torch.cat([x() for x in alone])
    slow = {s: torch.cat([x(s, donors.mean_at(s)) for x in alone]) for s in reference}
    largest = max(abs(float(x.mean())) for x in effects.values())
    acie = [abs(float((slow[s].exp() - base.exp()).mean() - effects[s].mean())) for s in reference]
    out["reference_heads"] = len(reference)
    out["max_abs_diff_logp"] = max(float((slow[s] - exact[s]).abs().max()) for s in reference)
    out["max_rel_diff_acie"], out["largest_acie"] = max(acie) / largest, largest
    true, mine = [float(effects[s].mean()) for s in heads], [float(guess[s].mean()) for s in heads]
    n = max(1, round(0.05 * len(heads)))
    best = [set(sorted(range(len(heads)), key=lambda i: -x[i])[:n]) for x in (true, mine)]
    out["gradient_spearman"], out["gradient_top5_overlap"] = spearman(true, mine), len(best[0] & best[1]) / n
    out["resumed"] = patcher.reason is None
    return out


def _device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def options(description):
    """What the benchmarks of a shape share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mini", help="mini, gpt2-small, llama-7b or a model folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser


def shown(found, path):
    """Print it, and keep it where a path is given."""
    text = json.dumps(found, indent=1)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    print(text)


def name_of(shape):
    return shape if shape in ("mini", *SHAPES) else Path(shape).name


def main():
    parser = options(__doc__)
    parser.add_argument("--answer-tokens", type=int, default=12)
    parser.add_argument("--sample-heads", type=int, default=12, help="heads on which the slow engines are timed")
    parser.add_argument("--check-heads", type=int, default=24, help="heads that are compared with the reference")
    parser.add_argument("--engines", help="of published,dynamic,tl,nnsight; default all there are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = load(args.shape, args.device, getattr(torch, args.dtype))
    found = run(
        subject, prompts=args.prompts, prompt_tokens=args.prompt_tokens, answer_tokens=args.answer_tokens, sample=args.sample_heads,
        checked=args.check_heads, engines=args.engines and args.engines.split(","),
    )  # fmt: skip
    shown({"name": name_of(args.shape)} | found, args.json)


if __name__ == "__main__":
    main()
