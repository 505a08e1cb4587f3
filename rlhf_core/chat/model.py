"""Loads a chat model, and streams its reply to a conversation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import DataError, ModelError, OutOfMemory
from rlhf_core.model_files.folder_check import REWARD_HEAD, check_weight_files
from rlhf_core.model_files.remote_code import is_trusted

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message


@dataclass(frozen=True)
class Sampling:
    """How a reply is sampled.

    Attributes:
        max_new_tokens: longest reply, in tokens.
        temperature: 0 for greedy decoding.
        top_p: nucleus sampling: sample from the most likely tokens with this total probability.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature <= 0:
            return {"do_sample": False}
        return {
            "do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p,
        }  # fmt: skip


@dataclass
class ChatModel:
    """A causal language model with its tokenizer, on the GPU if there is one.

    Attributes:
        context: longest prompt and reply together, in tokens; None: unknown.
    """

    model: Any
    tokenizer: Any
    device: str
    context: int | None

    @property
    def description(self) -> str:
        """Architecture, number of parameters and device, for people."""
        return (
            f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:,.0f} M parameters, "
            f"on the {'GPU' if self.device == 'cuda' else 'CPU'}"
        )


def load_chat_model(folder: Path) -> ChatModel:
    """The chat model in a folder.

    Raises:
        ModelError: the folder holds no causal language model, or one without a chat template.
        OutOfMemory: the model does not fit the GPU.
    """
    folder = Path(folder)
    _check(folder)
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    from rlhf_core.data.encoding.templates import end_of_turn
    from rlhf_core.data.encoding.tokenizer import load_tokenizer

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    trust = is_trusted(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    end_of_turn(tokenizer)  # raises without a usable chat template
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=trust
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded as a chat model: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = model.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{folder} does not fit the GPU's memory: {error}") from error
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return ChatModel(model, tokenizer, device, context)


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}; expected one with a chat model.")
    if (folder / REWARD_HEAD).exists():
        raise ModelError(
            f"{folder} is a reward model, which only gives scores; use the model of the stage sft "
            "or ppo, or a published one."
        )
    problems = check_weight_files(folder)
    if problems:
        raise ModelError("This is not a chat model: " + "; ".join(problems))


def fit_context(
    tokenizer: Any,
    context: int | None,
    system: str | None,
    history: Sequence[Message],
    max_new_tokens: int,
) -> tuple[list[int], int]:
    """Token ids of a conversation, without its oldest turns if it is too long.

    Args:
        context: longest prompt and reply together, in tokens; None: unlimited.
        system: system message, which is always kept.
        history: user's and assistant's messages in turn; the last one is the user's.
        max_new_tokens: longest reply; at least min(max_new_tokens, 16) tokens must fit.

    Returns:
        The ids, and the number of dropped turns (a message with its reply).

    Raises:
        DataError: the last message alone does not fit, or the chat template rejects it.
    """
    from rlhf_core.data.encoding.templates import prompt_ids

    first: list[Message] = [{"role": "system", "content": system}] if system else []
    for dropped in range(0, len(history), 2):
        ids = prompt_ids(tokenizer, [*first, *history[dropped:]])
        left = None if context is None else context - len(ids)
        if left is None or left >= min(max_new_tokens, 16):
            return ids, dropped // 2
    raise DataError(
        f"The message has {len(ids)} tokens with its chat template, but the model's context of "
        f"{context} tokens must hold the reply too; shorten the message."
    )


def generate_reply(
    chat_model: ChatModel,
    ids: Sequence[int],
    sampling: Sampling,
    emit: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Generate one reply and stream its text.

    Args:
        ids: token ids of the prompt, see `fit_context`.
        emit: called with each new piece of text.
        stopped: called after each token; True ends the reply.

    Raises:
        OutOfMemory: the GPU's memory is too small.
    """
    import torch
    from transformers import TextStreamer

    class Emitter(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text)

    def end(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), stopped(), device=input_ids.device)

    max_new_tokens = sampling.max_new_tokens
    if chat_model.context is not None:
        max_new_tokens = min(max_new_tokens, chat_model.context - len(ids))
    inputs = torch.tensor([list(ids)], device=chat_model.device)  # (1,P)
    try:
        with torch.no_grad():
            chat_model.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                pad_token_id=chat_model.tokenizer.pad_token_id,
                streamer=Emitter(chat_model.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[end],
                use_cache=True,
                **sampling.options(),
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"Not enough memory for a reply of {max_new_tokens} tokens after {len(ids)}: shorten "
            "the reply or start a new conversation."
        ) from error
