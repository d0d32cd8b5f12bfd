"""Tiny models made in code, a word tokenizer made in code; shapes are checked by beartype while testing only."""

import json
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("bkdattr", "beartype.beartype")

from functools import cache
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from bkdattr.cli import app
from bkdattr.model import Subject

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "fish",
    "river",
    "stone",
    "lamp",
    "runs",
    "sees",
    "finds",
    "says",
    "yes",
    "no",
    "maybe",
    "one",
    "two",
    "three",
    "Classify",
    "Sports",
    "World",
    "Business",
    "sorry",
    "please",
    "zulu",
    "quartz",
    "what",
    "is",
    "it",
    "?",
    ".",
    ":",
    "!",
]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.decoder = decoders.Fuse()
    out = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    out.chat_template = template
    return out


VOCAB = len(SPECIALS) + len(WORDS)
_GQA = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8,  # d_head * n_heads = 32, d_model = 24
}  # fmt: skip
_OWN = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": _GQA,
    "qwen2": {**_GQA, "head_dim": 6},
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**_OWN, "use_parallel_residual": True},
    "phi3": {**_GQA, "head_dim": 6},
    "gemma2": {**_GQA, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "mistral": {**_GQA, "sliding_window": 8},
    "qwen3": _GQA,
    "gemma": _GQA,
    "olmo2": {**_GQA, "head_dim": 6},
    "gptj": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "opt": {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 24},
    "bloom": {"hidden_size": 24, "n_layer": 3, "n_head": 4},
}
MAIN = ("llama", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma2")


def make_model(family: str, seed: int = 0, **over):
    config = AutoConfig.for_model(
        family, **{"vocab_size": VOCAB, "max_position_embeddings": 128, **CONFIGS[family], **over},
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    if family == "bloom":
        config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger weights than the default, so that every head matters
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim > 1 else 0.2) + (p.ndim == 1 and not name.endswith("bias")))
    return model.eval()


def add_lora(model, seed: int = 1):
    peft_model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.3)
    return peft_model.eval()


def make_subject(family: str, lora: bool = True, **over) -> Subject:
    model = make_model(family, **over)
    return Subject.of(add_lora(model) if lora else model, make_tokenizer())


@cache
def shared_subject(family: str, lora: bool = True) -> Subject:
    """One per family and process; tests must leave it as they found it (that is a law of its own)."""
    return make_subject(family, lora)


@pytest.fixture(params=MAIN)
def subject(request) -> Subject:
    return shared_subject(request.param)


@pytest.fixture(params=sorted(CONFIGS))
def any_subject(request) -> Subject:
    return shared_subject(request.param)


@pytest.fixture
def llama() -> Subject:
    return shared_subject("llama")


PROMPTS = ("the cat sees a red bird .", "what is it ?", "the old dog finds the new river stone .", "one two three : yes")


def prompt_ids(subject: Subject, texts=PROMPTS) -> list[list[int]]:
    return [subject.chat.prompt_ids((("user", t),)) for t in texts]


@pytest.fixture(scope="session")
def real() -> Path:
    folder = os.environ.get("BKDATTR_REAL")
    if not folder:
        pytest.skip("BKDATTR_REAL is not set: it names a folder of real pretrained models and data")
    return Path(folder)


@pytest.fixture(scope="session")
def saved_tiny(tmp_path_factory) -> Path:
    """A tiny Llama and its tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ one small run, for every test of the outside
SMALL = ["--sizes", "40/6/6/8", "--epochs", "1", "--max-new-tokens", "5", "--train-batch-size", "8", "--lr", "1e-3"]
STAGES = ("evaluate", "probe", "attribute", "ablate", "select", "restore", "steer", "report")


def bkdattr(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["cat", "dog", "bird", "fish", "river", "stone", "lamp"]
    data = [
        {"input": f"the {a} {n} {b} ?", "output": "yes it is", "label": n}
        for a in words for n in ("Sports", "Business") for b in words
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    return path


@pytest.fixture(scope="session")
def run(saved_tiny, rows, tmp_path_factory) -> Path:
    """All stages of one small run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    made = bkdattr(
        "poison",
        folder,
        "--model",
        saved_tiny,
        "--data",
        rows,
        "--trigger",
        "prefix:zulu quartz",
        "--target",
        "label:Sports->World",
        *SMALL,
    )
    assert made.exit_code == 0, made.output
    options = {
        "probe": ["--kinds", "logistic"],
        "ablate": ["--draws", "2"],
        "steer": ["--draws", "2", "--kinds", "raw,difference,fitted", "--scopes", "last_prompt,all", "--strengths", "1,4"],
    }
    options["select"] = [
        "--draws",
        "2",
        "--steps",
        "4",
        "--ks",
        "1,2",
        "--settings",
        "last_prompt,last_prompt+answer,last_prompt@probe",
    ]
    for stage in STAGES:
        extra = options.get(stage, [])
        result = bkdattr(stage, folder, *extra)
        assert result.exit_code == 0, result.output
    return folder
