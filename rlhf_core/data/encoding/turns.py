"""The turns that follow a sampled reply, as tokens: token in, token out.

In a conversation of several turns the model goes on from the tokens that it sampled. They are never
rendered again: the template could write them otherwise, and another tokenisation of the same text
would be another sequence than the sampled one. So only what stands between two replies is rendered:

    prompt | reply 1 <|im_end|> | ...<|im_start|>tool ... <|im_start|>assistant | reply 2 <|im_end|>
           | sampled            | continuation_ids                              | sampled

Training on the whole conversation sees the same only if the template writes what came before in the
same way once more turns follow. Templates that do not (some drop the reasoning of earlier replies)
are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rlhf_core.data.encoding.template_facts import (
    CLOSE,
    OPEN,
    PROBE,
    apply_template,
    facts_of,
    generated_reply,
    has_letters,
)
from rlhf_core.data.encoding.templates import encode_segments, find_special_token
from rlhf_core.data.encoding.tool_facts import (
    PROBE_TOOL,
    check_tools,
    check_written,
    probe_call,
    tool_facts_of,
)
from rlhf_core.data.rows.row import REASONING, TOOLS, Message
from rlhf_core.errors import DataError, ModelError


def tools_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The tools of a conversation, as JSON schemas; `messages` as the column `prompt` has them."""
    return list(messages[0].get(TOOLS, [])) if messages else []


def continuation_ids(
    tokenizer: Any, messages: Sequence[Message], new_messages: Sequence[Message]
) -> list[int]:
    """Token ids that follow a sampled reply, from behind its end of turn to the next generation
    prompt.

    The ids of the next prompt are those of this one's prompt, those sampled (with the end of turn),
    and these.

    Args:
        messages: the conversation up to the sampled reply, its last message. As `content` take the
            reply's decoded text with everything in it (reasoning, the text of a tool call); it only
            serves to find the place behind the reply, and to check what the template does with it.
            The first message may have `tools`.
        new_messages: what follows: results of tools ({"role": "tool", "content": text,
            "name": ...}) or a turn of the user.

    Raises:
        DataError: the template rejects the turns, does not write all of a result, or changes what
            stands before it; or a turn contains a special token's text.
    """
    for message in new_messages:
        if found := find_special_token(tokenizer, message["content"]):
            raise DataError(
                f"a turn of the role {message['role']} contains {found!r}, which the tokenizer "
                "reads as a special token; take it out of the text"
            )
    check_tools(tokenizer, new_messages)
    text = _between(tokenizer, messages, new_messages)
    check_written(new_messages, text)
    return encode_segments(tokenizer, [text])[0]


def check_turns(tokenizer: Any, role: Literal["tool", "user"], reasoning: bool = False) -> None:
    """Check that conversations can go on with turns of a role, before anything is sampled.

    Args:
        reasoning: the model reasons in its replies.

    Raises:
        ModelError: the template cannot write such turns, or changes what stands before them.
    """
    thought = f"{OPEN}\nStripes.\n{CLOSE}\n\n" if reasoning else ""
    reply: Message = {"role": "assistant", "content": thought + PROBE}
    new: Message = {"role": role, "content": "Stripes 41"}
    if role == "tool":
        new |= {"name": "count", "tool_call_id": "call00007"}
    talk: list[Message] = [{"role": "user", "content": "Question 1"}, reply]
    try:
        continuation_ids(tokenizer, talk, [new])
        continuation_ids(tokenizer, [*talk, new, reply], [new])
    except DataError as error:
        raise ModelError(
            f"The model cannot go on after a turn of the role {role}: {error}."
        ) from error


def written_call(tokenizer: Any) -> str:
    """A reply that calls a made-up tool (`tool_facts.probe_call`), in the form in which the chat
    template tells the model to write one; "" if it tells of no tools, or writes no calls."""
    facts = tool_facts_of(tokenizer)
    if not facts.tools or not facts.calls:
        return ""
    asked: list[Message] = [{"role": "user", "content": "How many?", TOOLS: [PROBE_TOOL]}]
    try:
        prompt = apply_template(tokenizer, asked, True)
        talk = [*asked, probe_call()]
        text = generated_reply(tokenizer, facts_of(tokenizer), talk, prompt)
    except DataError:
        return ""
    return text.removesuffix(facts_of(tokenizer).end_text)


def _between(tokenizer: Any, messages: Sequence[Message], new: Sequence[Message]) -> str:
    """The text from behind a reply's end of turn to the next generation prompt."""
    facts, reply = facts_of(tokenizer), messages[-1]
    prompt = apply_template(tokenizer, messages[:-1], True)
    full = apply_template(tokenizer, [*messages, *new], True)
    head, opened, blank = prompt.rpartition(OPEN)
    start = head if opened and not blank.strip() else prompt  # the reply may open its reasoning
    stop = full.find(facts.end_text, len(start))
    if not full.startswith(start) or stop < 0:
        raise _changed("writes the beginning of a conversation in another way", new)
    written = full[len(start) : stop]
    if not all(has_letters(reply.get(part, ""), written) for part in ("content", REASONING)):
        raise _changed("leaves out a part of a reply, such as its reasoning", new)
    return full[stop + len(facts.end_text) :]


def _changed(how: str, new: Sequence[Message]) -> DataError:
    return DataError(
        f"the chat template {how} once turns of the role {new[0]['role']} follow, so the model "
        "would not go on from the tokens that it sampled; take another chat template, or a single "
        "turn"
    )
