"""Runs a chat template on messages as it reads them."""

from __future__ import annotations

import itertools
from typing import Any

from rlhf_core.data.encoding.builtin_templates import SOURCES
from rlhf_core.data.encoding.tokenizer import compiled_template, overrides
from rlhf_core.data.rows.row import Message
from rlhf_core.errors import DataError, ModelError

ADVICE = "set model.chat_template to one of " + ", ".join(SOURCES)


def apply_chat(
    tokenizer: Any, chat: list[Message], tools: list[Any] | None, generation_prompt: bool
) -> str:
    """The rendered text.

    Args:
        tools: their JSON schemas; None: none.

    Raises:
        DataError: the template rejects the conversation. ModelError: it is no valid template.
    """
    import jinja2

    source = tokenizer.chat_template
    try:
        if not isinstance(source, str) or not chat or overrides(tokenizer, "apply_chat_template"):
            given = {"tools": tools} if tools else {}
            return str(
                tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=generation_prompt, **given
                )
            )
        return compiled_template(source)(
            messages=chat, tools=tools, documents=None, add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"The chat template is not valid Jinja ({error}); {ADVICE}.") from error
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:  # whatever the template's code does with a row
        said = [message["role"] for message in chat]
        todo = ""
        if "system" in said:
            todo = "; if it takes no system message, put that text into the first question"
        elif any(a == b for a, b in itertools.pairwise(said)):
            todo = "; join turns of the same role"
        raise DataError(
            f"the chat template rejects turns of {', '.join(said)}: {error}{todo}"
        ) from error
