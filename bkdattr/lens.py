"""To TransformerLens, on a merged copy: its head-level results drop an un-merged adapter, so the copy carries it."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

from bkdattr.model import Subject


def merged_copy(subject: Subject) -> Any:
    """A plain causal LM with the adapter merged into its weights; the subject is left as it is.

    Merging rounds: exact to fp32 precision in fp32, visibly lossy in bf16, so analysis stays on the un-merged subject.
    """
    model = copy.deepcopy(subject.model)
    return model.merge_and_unload() if subject.has_adapter else model


def to_transformer_lens(subject: Subject) -> Any:
    """A `TransformerBridge` of a merged copy, with the subject's tokenizer. Works without a network."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model = merged_copy(subject)
    with tempfile.TemporaryDirectory() as folder:  # the bridge loads its tokenizer by path
        model.save_pretrained(folder)
        subject.chat.tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
