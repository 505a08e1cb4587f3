"""Tokenising word by word gives the ids of the whole texts."""

import itertools
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_core.data.encoding import words
from rlhf_core.data.encoding.templates import encode_segments, resolve_template
from rlhf_core.data.encoding.words import WordTable, is_cut_at_spaces
from tests.rlhf_core.data.helpers import TEXTS, byte_tokenizer, prefixing_tokenizer

# All that the expressions tell apart, and what Unicode's and Python's white space differ in.
PARTS = [
    *" \t\n\r.,'/=\x0b\x1c\x85\xa0\u200b\u2028\u3000\u0301\u0338", "  ", "\n\n", "\r\n", "a", "Z",
    "is", "'s", "'LL", "'ſ", "7", "1234", "²", "é", "İ", "你好", "ा", "👩‍👩", "K", "<|im_end|>",
]  # fmt: skip


def byte_level(*before, use_regex=False, normalizer=None):
    """A byte-level tokenizer that cuts texts by some rules first. Its merges reach over them all:
    they were learned from texts that were not cut."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chosen = random.Random(1)
    backend.train_from_iterator(["".join(chosen.choices(PARTS[:-1], k=40)) for _ in range(300)] +
                                TEXTS, trainer)  # fmt: skip
    byte_rule = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_rule])
    if normalizer:
        backend.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = resolve_template(tokenizer, "chatml")
    return tokenizer


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def test_ids_of_words_are_those_of_the_whole_texts():
    chosen = random.Random(0)
    texts = ["".join(chosen.choices(PARTS, k=chosen.randrange(1, 30))) for _ in range(500)]
    texts += ["".join(part) for part in itertools.product("a!9", PARTS[:8], PARTS[:8], "b.")]
    tokenizers = [
        byte_level(use_regex=True),
        byte_level(pre_tokenizers.Digits(True), use_regex=True, normalizer=normalizers.NFC()),
        *(byte_level(split(pattern)) for pattern in sorted(words._KNOWN)),
    ]
    for tokenizer in tokenizers:
        assert is_cut_at_spaces(tokenizer)
        table = WordTable(tokenizer, most=300)
        for start in range(0, len(texts), 200):  # the table is thinned out in between
            part = texts[start : start + 200]
            found = [row.tolist() for row in table.encode(part)]
            assert found == encode_segments(tokenizer, part)


def test_expressions_are_those_of_the_families():
    from transformers.models.qwen2 import tokenization_qwen2
    from transformers.models.qwen3_5 import tokenization_qwen3_5

    assert {
        tokenization_qwen2.PRETOKENIZE_REGEX, tokenization_qwen3_5.PRETOKENIZE_REGEX
    } <= words._KNOWN  # fmt: skip


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(prefixing_tokenizer, id="a space before each text"),
        pytest.param(lambda: byte_level(split(r"\S+\s*")), id="unknown expression"),
        pytest.param(lambda: byte_level(), id="no cuts at all"),
        pytest.param(
            lambda: byte_level(use_regex=True, normalizer=normalizers.Replace(" ", "_")),
            id="normalised spaces",
        ),
    ],
)
def test_other_tokenizers_take_whole_texts(tokenizer):
    tokenizer = tokenizer()
    assert not is_cut_at_spaces(tokenizer)
    texts = ["Good  morning. \n\nYes", "a b", ""]
    found = [row.tolist() for row in WordTable(tokenizer).encode(texts)]
    assert found == encode_segments(tokenizer, texts)


@pytest.mark.parametrize(
    "token", [AddedToken("New York"), AddedToken("<mask>", lstrip=True), AddedToken("a ")]
)
def test_a_token_that_reaches_over_a_cut_forbids_it(token):
    tokenizer = byte_tokenizer()
    assert is_cut_at_spaces(tokenizer)
    tokenizer.add_tokens([token])
    assert not is_cut_at_spaces(tokenizer)
