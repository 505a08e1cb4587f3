"""Tiny tokenizers and files for the data tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.templates import resolve_template
from rlhf_core.data.prepare import prepare
from rlhf_core.jobs import DataJob

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "Hello, how are you? I am fine, thank you. Good morning! Yes. No.",
    "早上好，你好吗? 我挺好的，你呢",
    "Below is an instruction. ### Response: USER: ASSISTANT: system user assistant",
]


def byte_tokenizer(template: str = "chatml", **tokens: str) -> Any:
    """A byte-level BPE tokenizer; by default pad = eos = end of turn, as SmolLM2 has it."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = _trained(tuple(special))
    given = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **tokens}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), clean_up_tokenization_spaces=False, **given
    )
    if template:
        tokenizer.chat_template = resolve_template(tokenizer, template)
    return tokenizer


@functools.cache
def _trained(special: tuple[str, ...]) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return str(backend.to_str())


def prefixing_tokenizer(template: str = "chatml") -> Any:
    """A sentencepiece-like BPE tokenizer that puts a space before every text, and bos before it."""
    from tokenizers import processors

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    data = json.loads(backend.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are plain tokens
    backend = Tokenizer.from_str(json.dumps(data))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = resolve_template(tokenizer, template)
    return tokenizer


def jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write rows as JSON lines; a row of bytes is written as it is."""
    lines = [
        r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def job(source: str, purpose: str = "sft", **settings: Any) -> DataJob:
    given = {"heldout_fraction": 0.0, "max_length": 4096, **settings}
    return DataJob(source=source, purpose=purpose, model="0" * 64, **given)


def prepared(
    folder: Path, source: str, purpose: str = "sft", tokenizer: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """The training rows that a source gives, in the order of the source."""
    tokenizer = tokenizer or byte_tokenizer()
    prepare(job(source, purpose, **settings), tokenizer, folder, workers=1)
    return sorted(Rows(folder, "train", purpose), key=lambda row: row["row"])


def trained_text(tokenizer: Any, row: dict[str, Any]) -> str:
    """The tokens that a loss is computed on, as text."""
    ids = [i for i, marked in zip(row["input_ids"], row["trainable"], strict=True) if marked]
    return str(tokenizer.decode(ids))
