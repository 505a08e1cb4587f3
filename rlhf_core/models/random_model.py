"""Tiny random models of three layers and width 64, with a byte-level tokenizer.

At about 0.2 million parameters they have all parts of a real model of their architecture
(positions, tied or untied head, grouped queries, dropout), so that tests run the same code.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 960
CONTEXT = 1024  # tokens
WIDTH, LAYERS, HEADS = 64, 3, 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TEXT = """\
Hello! How are you today? I am fine, thank you. What can I do for you?
Please write a short story about a friendly dog that finds its way home.
The capital of France is Paris. Water boils at one hundred degrees Celsius.
Below is an instruction that describes a task. Write a response that completes the request.
I love this. That is wonderful, great, happy and good. This is bad, sad, terrible and wrong.
Explain why the sky is blue. Because the air scatters blue light more than red light.
system user assistant Human: Assistant: ### Instruction: ### Response:
0 1 2 3 4 5 6 7 8 9 10 12 20 25 50 75 100 1000 + - * / = ( ) [ ] { } . , ; : ! ? ' "
你好，今天怎么样？我很好，谢谢。请给我讲一个故事。
"""


def make_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of 960 tokens with ChatML's special tokens; deterministic.

    Trained on the text above and, if it is installed, on chatterbot-corpus (English, Chinese).
    End of turn is `<|im_end|>`, padding `<|endoftext|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _lines() -> list[str]:
    lines = TEXT.splitlines()
    spec = util.find_spec("chatterbot_corpus")
    if spec is not None and spec.origin is not None:
        data = Path(spec.origin).parent / "data"
        for language in ("english", "chinese"):
            for path in sorted((data / language).glob("*.yml")):
                text = path.read_text(encoding="utf-8")
                lines += [line.lstrip(" -") for line in text.splitlines()]
    return lines


def make_model(architecture: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model of `architecture` (llama, qwen2, gpt2, opt, bloom) with seeded fp32 weights."""
    llama: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    sizes: dict[str, dict[str, Any]] = {
        "llama": llama,
        "qwen2": {**llama, "tie_word_embeddings": True},
        "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT},
        "opt": {
            "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
        },
        "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "seq_length": CONTEXT},
    }  # fmt: skip
    return initialise(architecture, tokenizer, sizes[architecture], seed)


def initialise(
    architecture: str, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, Any], seed: int
) -> PreTrainedModel:
    """Seeded fp32 weights for a tokenizer's vocabulary; the global generator is unchanged.

    Args:
        sizes: fields of the architecture's transformers config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
