"""Chat with a model in a terminal or through a pipe, with streamed replies.

Replies go to stdout. Banner, notices and errors go to stderr, so that a script reads only replies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.chat.model import Sampling, fit_context, generate_reply, load_chat_model
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.model_files.remote_code import allow
from rlhf_core.system.printable import printable

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message

HELP = """\
/reset          start a new conversation
/system TEXT    set the system message and start a new conversation (without TEXT: remove it)
/help           show this list
/quit           quit (or Ctrl-D); Ctrl-C stops a reply"""


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
    """Chat with the model in a folder until the input ends.

    Args:
        once: reply to this message and return.
        system: system message.
        max_new_tokens: longest reply, in tokens.
        temperature: of the sampling; 0 for greedy decoding.
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
            f"temperature is {temperature:g} and max_new_tokens {max_new_tokens}; expected at "
            "least 0 and at least 1"
        )
    allow(trust_remote_code)
    chat = Chat(folder, system, max_new_tokens, temperature, seed)
    if once is not None:
        chat.answer(once)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        _notice(f"{chat.description}. /help lists the commands, /quit ends.")
    for line in _lines(interactive):
        text = line.strip()
        if text.startswith("/"):
            if not _command(chat, text):
                break
        elif text:
            try:
                chat.answer(text)
            except DataError as error:
                _notice(str(error))
    return 0


def _command(chat: Chat, text: str) -> bool:
    """Run a command; False ends the chat."""
    name, _, rest = text.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        chat.reset()
        _notice("Started a new conversation.")
    elif name == "/system":
        chat.system = rest.strip() or None
        chat.reset()
        _notice("System message set." if chat.system else "System message removed.")
    elif name == "/help":
        _notice(HELP)
    else:
        _notice(f"There is no command {name}.\n{HELP}")
    return True


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of the input; in a terminal with a prompt, and Ctrl-C does not end it."""
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
            _notice("\n/quit or Ctrl-D ends.")


def _notice(text: str) -> None:
    sys.stdout.flush()
    print(printable(text), file=sys.stderr, flush=True)


class Chat:
    """A model and the conversation so far."""

    def __init__(
        self, folder: Path, system: str | None, max_new_tokens: int, temperature: float, seed: int
    ) -> None:
        self.chat_model = load_chat_model(folder)
        import torch

        self.tokenizer = self.chat_model.tokenizer
        self.system = system
        self.sampling = Sampling(max_new_tokens, temperature)
        self.history: list[Message] = []
        self.description = self.chat_model.description
        torch.manual_seed(seed)

    def reset(self) -> None:
        """Start a new conversation with the same system message."""
        self.history = []

    def answer(self, text: str) -> str:
        """Stream the reply to a message to stdout, and add both to the conversation.

        Ctrl-C ends the reply; its text so far stays in the conversation.

        Raises:
            DataError: the message does not fit the context, or the template rejects it.
            OutOfMemory: the GPU's memory is too small.
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
        """Token ids of the conversation; drops the oldest turns if it is too long."""
        context, longest = self.chat_model.context, self.sampling.max_new_tokens
        ids, dropped = fit_context(self.tokenizer, context, self.system, self.history, longest)
        if dropped:
            self.history = self.history[2 * dropped :]
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            _notice(f"(The oldest {turns} no longer fit the context of {context} tokens.)")
        return ids

    def _generate(self, ids: list[int]) -> str:
        pieces: list[str] = []

        def emit(text: str) -> None:
            pieces.append(text)
            print(printable(text), end="", flush=True)

        try:
            generate_reply(self.chat_model, ids, self.sampling, emit)
        except KeyboardInterrupt:
            _notice("\n(stopped)")
        print(flush=True)
        return "".join(pieces).strip()
