"""A chat model in memory, and its reply to a conversation, handed on as it is generated."""

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
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that together have this probability are sampled from; 1: all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        if self.temperature <= 0:
            return {"do_sample": False}
        return {
            "do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p,
        }  # fmt: skip


@dataclass
class ChatModel:
    """A causal LM with its tokenizer, on the GPU if there is one.

    Attributes:
        context: tokens that prompt and reply may have together; None: not known.
    """

    model: Any
    tokenizer: Any
    device: str
    context: int | None

    @property
    def description(self) -> str:
        """For people."""
        return (
            f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:,.0f} M parameters, "
            f"on the {'GPU' if self.device == 'cuda' else 'CPU'}"
        )


def load_chat_model(folder: Path) -> ChatModel:
    """The chat model in a folder.

    Raises:
        ModelError: the folder holds no causal language model, or one without a chat template.
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
    end_of_turn(tokenizer)  # raises when there is no usable chat template
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
        raise ModelError(f"There is no folder {folder}; needed is one with a chat model.")
    if (folder / REWARD_HEAD).exists():
        raise ModelError(
            f"{folder} is a reward model, which gives scores and cannot talk; take the model of "
            "the stage sft or ppo, or a published one."
        )
    problems = check_weight_files(folder)
    if problems:
        raise ModelError("This is not a model that can talk: " + "; ".join(problems))


def fit_context(
    tokenizer: Any,
    context: int | None,
    system: str | None,
    history: Sequence[Message],
    max_new_tokens: int,
) -> tuple[list[int], int]:
    """Token ids of a conversation, without the oldest turns where it is too long.

    Args:
        context: tokens at most, prompt and reply together.
        system: system message, which stays.
        history: user and assistant in turn; the last one is the user's.
        max_new_tokens: of the reply; at least a short one (16 tokens) has to fit.

    Returns:
        The ids, and how many turns (a question with its reply) were left out.

    Raises:
        DataError: the last message alone does not fit, or the chat template refuses it.
    """
    from rlhf_core.data.encoding.templates import prompt_ids

    first: list[Message] = [{"role": "system", "content": system}] if system else []
    for dropped in range(0, len(history), 2):
        ids = prompt_ids(tokenizer, [*first, *history[dropped:]])
        room = None if context is None else context - len(ids)
        if room is None or room >= min(max_new_tokens, 16):
            return ids, dropped // 2
    raise DataError(
        f"The message has {len(ids)} tokens with its chat template, the model's "
        f"context {context}, of which a reply needs some; shorten it."
    )


def generate_reply(
    chat_model: ChatModel,
    ids: Sequence[int],
    sampling: Sampling,
    emit: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Generate one reply.

    Args:
        ids: token ids of the prompt, see `fit_context`.
        emit: called with each piece of text.
        stopped: asked after each token; True ends the reply.

    Raises:
        OutOfMemory: generating needs more memory than there is.
    """
    import torch
    from transformers import TextStreamer

    class Emitter(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text)

    def end(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), stopped(), device=input_ids.device)

    room = sampling.max_new_tokens
    if chat_model.context is not None:
        room = min(room, chat_model.context - len(ids))
    inputs = torch.tensor([list(ids)], device=chat_model.device)  # (1,P)
    try:
        with torch.no_grad():
            chat_model.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                pad_token_id=chat_model.tokenizer.pad_token_id,
                streamer=Emitter(chat_model.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[end],
                use_cache=True,
                **sampling.options(),
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"Not enough memory for a reply of {room} tokens after {len(ids)}: shorten the reply "
            "or start a new conversation."
        ) from error
