"""What exact attribution costs against prompts, prompt length, answer length and heads: `python -m benchmarks.scaling [--figure PATH]`.

Random-weight Llama shapes; one thing is varied, the others stay. `patches` is the time of all heads' patches (prefixes, tails and the self-check
left out), `once` the rest. The fitted slope is the exponent of a power law through the points: 0 says that the time does not grow.
`memory` is what tracing n prompts keeps for Llama-2-7B's geometry (fp32 z at the read position), computed and measured.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.attribution import MINI, Peak, _device, continuation, shown, traces
from bkdattr.attribution import sites_of
from bkdattr.engine import Patcher
from bkdattr.examples import Example
from bkdattr.model import Subject, load_tokenizer
from bkdattr.traces import trace_prompts

BASE = {"prompts": 4, "prompt_tokens": 64, "answer_tokens": 8, "n_heads": 8}
VARIED = {"prompt_tokens": (32, 64, 128, 256), "answer_tokens": (4, 8, 16, 32), "prompts": (2, 4, 8), "n_heads": (4, 8, 16)}
LAYERS, WIDTH, VOCAB = 8, 512, 4096


def model(n_heads, **over):
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": n_heads, "num_key_value_heads": n_heads, "vocab_size": VOCAB, "max_position_embeddings": 1024,
    } | over  # fmt: skip
    config = AutoConfig.for_model("llama", **shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    return Subject.of(AutoModelForCausalLM.from_config(config).requires_grad_(False), load_tokenizer(MINI))


def point(prompts, prompt_tokens, answer_tokens, n_heads, rounds):
    subject = model(n_heads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB, (prompts + 2, prompt_tokens), generator=generator).tolist()
    taken, given = rows[:prompts], rows[prompts:]
    answers, donors = continuation(subject, taken, answer_tokens), traces(subject, given)
    best = {"once": float("inf"), "patches": float("inf")}
    for _ in range(rounds):
        start = time.perf_counter()
        patcher = Patcher(subject, taken, answers, batch_size=prompts)
        assert patcher.reason is None and patcher.base is not None
        best["once"] = min(best["once"], time.perf_counter() - start)
        start = time.perf_counter()
        for layer in range(LAYERS):
            patcher.patched([(s, donors.mean_at(s)) for s in sites_of(subject.geometry, "head") if s.layer == layer])
        best["patches"] = min(best["patches"], time.perf_counter() - start)
    return best


def memory(n, device="cpu"):
    """Tracing z of n prompts with 32 layers of 32 heads of 128: the widths of Llama-2-7B, a thin MLP and few words."""
    computed = n * 32 * 32 * 128 * 4
    small = model(32, num_hidden_layers=32, hidden_size=64, head_dim=128, intermediate_size=64)
    examples = [Example(f"e{i}", (("user", f"what is {i} ?"),), "yes") for i in range(n)]
    trace_prompts(small, examples[:8], read=("z",))
    with Peak(small.device) as peak:
        found = trace_prompts(small, examples, read=("z",), batch_size=16)
    assert found.z.numel() * 4 == computed
    return {"prompts": n, "computed_bytes": computed, "kept_bytes": found.z.numel() * 4, "peak_growth_bytes": peak.bytes}


def slope(xs, ys):
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def figure(found, path):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = list(found["varied"])
    page = make_subplots(1, len(names), subplot_titles=[n.replace("_", " ") for n in names], shared_yaxes=True)
    for column, name in enumerate(names, 1):
        v = found["varied"][name]
        for key in ("patches", "once"):
            page.add_trace(
                go.Scatter(x=v["at"], y=v[key], name=f"{key}, slope {v['slope'][key]:.2f} ({name.replace('_', ' ')})", mode="lines+markers"),
                row=1, col=column,
            )  # fmt: skip
    page.update_xaxes(type="log").update_yaxes(type="log", title="seconds", col=1)
    page.update_layout(title="Exact attribution: cost against one thing at a time (log-log)", template="plotly_white", height=420)
    path.write_text(page.to_html(include_plotlyjs="cdn"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--traced", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {
        "base": BASE,
        "layers": LAYERS,
        "d_model": WIDTH,
        "threads": args.threads,
        "device": _device(torch.device("cpu")),
        "varied": {},
    }
    for name, values in VARIED.items():
        points = [point(**(BASE | {name: value}), rounds=args.rounds) for value in values]
        v = {"at": list(values)} | {key: [p[key] for p in points] for key in ("once", "patches")}
        v["slope"] = {key: slope(values, v[key]) for key in ("once", "patches")}
        found["varied"][name] = v
    found["memory"] = memory(args.traced)
    if args.figure:
        figure(found, args.figure)
    shown(found, args.json)


if __name__ == "__main__":
    main()
