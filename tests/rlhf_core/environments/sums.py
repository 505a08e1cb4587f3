"""A tiny model that solves sums in two ways: it guesses, or it asks a calculator and copies the
result. Which way is better, reinforcement learning has to find out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.builtin_templates import fill
from rlhf_core.data.encoding.turns import continuation_ids
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import batch_on, pad_right

OPEN = '<tool_call>{"name": "calculator", "arguments": {"expression": "'
CLOSE = '"}}</tool_call>'
KINDS = {
    "+": ("Tom has ", " apples and gets ", " more. How many?"),
    "*": ("Ann has ", " boxes of ", " pears. How many?"),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def question(kind: str, a: int, b: int) -> str:
    first, between, last = KINDS[kind]
    return f"{first}{a}{between}{b}{last}"


def call(kind: str, a: int, b: int) -> str:
    return f"{OPEN}{a}{kind}{b}{CLOSE}"


def sums(count: int, seed: int) -> list[tuple[str, int, int, int]]:
    """(kind, a, b, result)."""
    chance, found = random.Random(seed), []
    for _ in range(count):
        kind, a, b = chance.choice("+*"), chance.randint(1, 9), chance.randint(1, 9)
        found.append((kind, a, b, a + b if kind == "+" else a * b))
    return found


def write_prompts(path: Path, count: int, seed: int) -> Path:
    """Prompts with their answers, as a file."""
    rows = [
        {"prompt": question(kind, a, b), "answer": str(result)}
        for kind, a, b, result in sums(count, seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tokenizer() -> Any:
    """Bytes, and a token for each of the texts that come again and again."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    pieces = [OPEN, CLOSE, *(part for kind in KINDS.values() for part in kind)]
    pieces += ["user\n", "assistant\n", "tool\n"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in pieces])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = fill("chatml", "", "<|im_end|>")
    return made


def example(
    tokenizer: Any, one: tuple[str, int, int, int], asks: bool, guess: int
) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, and which of them the model writes."""
    kind, a, b, result = one
    asked = [{"role": "user", "content": question(kind, a, b)}]
    end = templates.end_of_turn(tokenizer)[1]

    def reply(text: str) -> list[int]:
        return [*templates.encode_segments(tokenizer, [text])[0], end]

    parts = [(templates.prompt_ids(tokenizer, asked), False)]
    if asks:
        text = call(kind, a, b)
        talk = [*asked, {"role": "assistant", "content": text}]
        told = [{"role": "tool", "content": str(result), "name": "calculator"}]
        parts += [(reply(text), True), (continuation_ids(tokenizer, talk, told), False)]
        parts.append((reply(str(result)), True))
    else:
        parts.append((reply(str(guess)), True))
    ids = [token for part, _ in parts for token in part]
    return ids, [own for part, own in parts for _ in part]


def make_model(folder: Path, steps: int = 100, asks: float = 0.5, seed: int = 0) -> Path:
    """A folder with a model that was trained on such conversations, of which a share asks.

    One layer with learned positions copies from where sums always have their numbers.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    policy, chance = Policy(model), random.Random(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10) * (1.0 - 0.9 * step / steps)
        rows = [
            example(tokenizer, one, chance.random() < asks, chance.randint(1, 81))
            for one in sums(32, seed + 1 + step)
        ]
        input_ids, mask = pad_right([ids for ids, _ in rows])
        loss_mask = pad_right([own for _, own in rows])[0].bool()
        batch = batch_on(torch.device("cpu"), input_ids, mask, loss_mask)
        loss = -policy(*batch).sum() / loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
