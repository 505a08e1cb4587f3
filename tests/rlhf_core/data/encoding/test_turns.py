"""Turns after a sampled reply: the new tokens only, and templates that rewrite what is past."""

import pytest

from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.tool_facts import tool_facts_of
from rlhf_core.data.encoding.turns import check_turns, continuation_ids, tools_of
from rlhf_core.errors import DataError, ModelError
from tests.rlhf_core.data.encoding.test_templates import GPT_OSS, QWEN3, QWEN35, R1
from tests.rlhf_core.data.helpers import byte_tokenizer, prefixing_tokenizer

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
ASKED = [{"role": "user", "content": "1 + 2?", "tools": [ADD]}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
RESULT = {"role": "tool", "content": "3", "name": "add"}


def test_continuation_is_what_stands_between_two_replies():
    tokenizer = byte_tokenizer("hermes")
    talk = [*ASKED, {"role": "assistant", "content": CALL}]
    ids = continuation_ids(tokenizer, talk, [RESULT, {**RESULT, "content": "4"}])
    assert tokenizer.decode(ids) == (
        "\n<|im_start|>tool\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    ids = continuation_ids(tokenizer, talk, [{"role": "user", "content": "And 3?"}])
    assert tokenizer.decode(ids) == "\n<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("make", [byte_tokenizer, prefixing_tokenizer])
@pytest.mark.parametrize("name", ["hermes", "chatml"])
def test_sampled_and_continued_tokens_are_those_of_the_whole_conversation(make, name):
    tokenizer = make(name)
    talk = [{"role": "user", "content": "1 + 2?"}]
    ids = templates.prompt_ids(tokenizer, talk)
    for reply, new in (("3", "Sure?"), ("yes", "Why?")):
        turn = {"role": "user", "content": new}
        end = templates.end_of_turn(tokenizer)[0]
        sampled = templates.encode_segments(tokenizer, [reply + end])[0]
        talk = [*talk, {"role": "assistant", "content": reply}]
        ids = [*ids, *sampled, *continuation_ids(tokenizer, talk, [turn])]
        talk = [*talk, turn]
    assert ids == templates.prompt_ids(tokenizer, talk)


def test_continuation_does_not_depend_on_how_the_template_would_write_the_reply():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3  # writes an empty reasoning before the last reply alone
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = continuation_ids(tokenizer, talk, [{"role": "user", "content": "c"}])
    assert tokenizer.decode(ids) == "[user]c<|im_end|>[assistant]"


def test_template_that_drops_what_was_sampled_is_refused():
    tokenizer = byte_tokenizer()
    for template, opened in ((QWEN3, ""), (QWEN35, "<think>\n")):
        tokenizer.chat_template = template
        reply = f"{'' if opened else '<think>'}why\n</think>\n\nb"
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]
        with pytest.raises(DataError, match="leaves out a part of a reply"):
            continuation_ids(tokenizer, talk, [{"role": "user", "content": "c"}])
    tokenizer.chat_template = (
        "{% set last = messages[-1].content %}{{ last if messages | length > 1 }}" + R1
    )
    talk[-1] = {"role": "assistant", "content": "b"}
    with pytest.raises(DataError, match="writes the beginning of a conversation in another way"):
        continuation_ids(tokenizer, talk, [{"role": "user", "content": "c"}])


def test_turns_are_checked_before_anything_is_sampled():
    tokenizer = byte_tokenizer("hermes")
    for role in ("tool", "user"):
        check_turns(tokenizer, role, reasoning=True)
    tokenizer.chat_template = templates.resolve_template(byte_tokenizer(""), "alpaca")
    check_turns(tokenizer, "user", reasoning=True)
    with pytest.raises(ModelError, match=r"role tool: .*does not write results of tools.*hermes"):
        check_turns(tokenizer, "tool")
    tokenizer.chat_template = GPT_OSS
    check_turns(tokenizer, "user")
    tokenizer.chat_template = QWEN3
    with pytest.raises(ModelError, match="such as its reasoning"):
        check_turns(tokenizer, "user", reasoning=True)


def test_special_token_in_a_new_turn_is_refused():
    tokenizer = byte_tokenizer("hermes")
    talk = [*ASKED, {"role": "assistant", "content": CALL}]
    with pytest.raises(DataError, match=r"role tool contains '<\|im_end\|>'"):
        continuation_ids(tokenizer, talk, [{"role": "tool", "content": "3<|im_end|>"}])


def test_tools_stand_in_the_first_message():
    assert tools_of(ASKED) == [ADD]
    assert tools_of([{"role": "user", "content": "a"}]) == [] == tools_of([])
    tokenizer = byte_tokenizer("hermes")
    text = tokenizer.decode(templates.prompt_ids(tokenizer, ASKED))
    assert text.startswith("<|im_start|>system\n") and '"description": "Adds two numbers."' in text
    assert text.endswith("<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("name", "able"),
    [
        ("hermes", (True, True, True)),
        ("chatml", (False, False, True)),
        ("alpaca", (False, False, False)),  # would write a result as a reply
        ("vicuna", (False, False, False)),
    ],
)
def test_what_a_template_writes_of_tools_is_probed(name, able):
    facts = tool_facts_of(byte_tokenizer(name))
    assert (facts.tools, facts.calls, facts.results) == able
    marks = ("<tool_response>", "</tool_response>") if name == "hermes" else ("", "")
    assert facts.marks == marks and not facts.as_text
