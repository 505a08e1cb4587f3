"""Talking to a model: streamed, several turns, in a terminal or through a pipe.

Replies go to stdout, everything else (banner, notices, errors) to stderr, so that a script reads
nothing but replies.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import ConfigError, DataError, ModelError, OutOfMemory
from rlhf_core.remote_code import allow, is_trusted
from rlhf_core.weights import check_weight_files

if TYPE_CHECKING:
    from rlhf_core.data.row import Message

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message and start anew (without TEXT: remove it)
/help           this list
/quit           end (Ctrl-D does so too); Ctrl-C stops a reply"""


def main(
    folder: Path,
    *,
    once: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> int:
    """Talk to the model in a folder until the input ends.

    Args:
        once: answer this message and return; only the reply is printed.
        system: system message.
        max_new_tokens: longest reply, in tokens.
        temperature: of the sampling, over the full vocabulary; 0 takes the likeliest token.
        seed: the same seed and messages give the same replies.
        trust_remote_code: run Python code that lies in the folder.

    Returns:
        Exit code 0.

    Raises:
        ModelError: the folder holds no causal language model, or one without a chat template.
        ConfigError: a setting is out of range.
        DataError: with `once`: the message does not fit the model's context or chat template.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature is {temperature:g} and max_new_tokens {max_new_tokens}; needed are at "
            "least 0 and at least 1"
        )
    allow(trust_remote_code)
    chat = Chat(folder, system, max_new_tokens, temperature, seed)
    if once is not None:
        chat.answer(once)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        _note(f"{chat.description}. /help lists the commands, /quit ends.")
    for line in _lines(interactive):
        text = line.strip()
        if text.startswith("/"):
            if not _command(chat, text):
                break
        elif text:
            try:
                chat.answer(text)
            except DataError as error:
                _note(str(error))
    return 0


def _command(chat: Chat, text: str) -> bool:
    """Carry out a command; False ends the program."""
    name, _, rest = text.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        chat.reset()
        _note("The conversation starts anew.")
    elif name == "/system":
        chat.system = rest.strip() or None
        chat.reset()
        _note("System message set." if chat.system else "System message removed.")
    elif name == "/help":
        _note(HELP)
    else:
        _note(f"There is no command {name}.\n{HELP}")
    return True


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of the input; at a terminal with a prompt, and Ctrl-C does not end it."""
    if not interactive:
        yield from sys.stdin
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  history and editing in input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _note("\n/quit or Ctrl-D ends.")


def _note(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


class Chat:
    """A model and the conversation so far."""

    def __init__(
        self, folder: Path, system: str | None, max_new_tokens: int, temperature: float, seed: int
    ) -> None:
        folder = Path(folder)
        _check(folder)
        os.environ.setdefault("TQDM_DISABLE", "1")
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as hf_logging

        from rlhf_core.data.templates import end_of_turn
        from rlhf_core.data.tokenizer import load_tokenizer

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        trust = is_trusted(folder)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust)
        end_of_turn(self.tokenizer)  # raises when there is no usable chat template
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=trust
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder} cannot be loaded as a chat model: {error}") from error
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = model.eval().to(self.device)
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.history: list[Message] = []
        self.description = (
            f"{type(model).__name__}, {model.num_parameters() / 1e6:,.0f} M parameters, on the "
            f"{'GPU' if self.device == 'cuda' else 'CPU'}"
        )
        torch.manual_seed(seed)

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.history = []

    def answer(self, text: str) -> str:
        """Print the reply to a message as it is generated, and remember both.

        Ctrl-C ends the reply; what was said stays in the conversation.

        Raises:
            DataError: the message does not fit the context, or the template refuses it.
            OutOfMemory: generating needs more memory than there is.
        """
        self.history.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except DataError:
            self.history.pop()
            raise
        reply = self._generate(ids)
        self.history.append({"role": "assistant", "content": reply})
        return reply

    def _prompt(self) -> list[int]:
        """Token ids of the conversation; its oldest turns are dropped where it is too long."""
        from rlhf_core.data.templates import prompt_ids

        first: list[Message] = []
        if self.system:
            first = [{"role": "system", "content": self.system}]
        dropped = 0
        while True:
            ids = prompt_ids(self.tokenizer, [*first, *self.history])
            # At least a short reply has to fit.
            room = None if self.context is None else self.context - len(ids)
            if room is None or room >= min(self.max_new_tokens, 16):
                break
            if len(self.history) == 1:
                raise DataError(
                    f"The message has {len(ids)} tokens with its chat template, the model's "
                    f"context {self.context}, of which a reply needs some; shorten it."
                )
            self.history = self.history[2:]
            dropped += 1
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            _note(f"(The oldest {turns} no longer fit the context of {self.context} tokens.)")
        return ids

    def _generate(self, ids: list[int]) -> str:
        import torch
        from transformers import TextStreamer

        pieces: list[str] = []

        class Printer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                print(text, end="", flush=True)

        room = self.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(ids))
        inputs = torch.tensor([ids], device=self.device)  # (1,P)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0,
            }  # fmt: skip
        try:
            with torch.no_grad():
                self.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=room,
                    pad_token_id=self.tokenizer.pad_token_id,
                    streamer=Printer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                    use_cache=True,
                    **sampling,
                )
        except KeyboardInterrupt:
            _note("\n(stopped)")
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"Not enough memory for a reply of {room} tokens after {len(ids)}: lower "
                "max_new_tokens or start anew with /reset."
            ) from error
        print(flush=True)
        return "".join(pieces).strip()


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}; needed is one with a chat model.")
    if (folder / "reward_head.safetensors").exists():
        raise ModelError(
            f"{folder} is a reward model, which gives scores and cannot talk; take the model of "
            "the stage sft or ppo, or a published one."
        )
    problems = check_weight_files(folder)
    if problems:
        raise ModelError("This is not a model that can talk: " + "; ".join(problems))
