"""Tools, calls and results in the forms of OpenAI, TRL, ShareGPT, LLaMA-Factory and Hermes."""

import json
import re

import pytest

from rlhf_core.data.rows.row import BadRow
from rlhf_core.errors import DataError
from rlhf_core.evaluation.scored import shown_prompt
from tests.rlhf_core.data.rows.layouts import read

FUNCTION = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number", "default": None}},
        "required": ["a"],
    },
}
ADD = {"type": "function", "function": FUNCTION}
U = {"role": "user", "content": "1 + 2?"}
A = {"role": "assistant", "content": "It is 3."}


def called(arguments, **more):
    return {**more, "type": "function", "function": {"name": "add", "arguments": arguments}}


def says(*calls, content="", **more):
    return {"role": "assistant", "content": content, **more, "tool_calls": list(calls)}


CALL = called({"a": 1, "b": 2})
RESULT = {"role": "tool", "content": "3", "name": "add"}
TALK = [{**U, "tools": [ADD]}, says(CALL), RESULT, A]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, says(CALL), RESULT, A], "tools": [ADD]},
        # OpenAI's fine-tuning and API, with arguments as text, ids, and columns filled up with null
        {"messages": [
            {**U, "tool_calls": None, "tool_call_id": None, "name": None},
            {"role": "assistant", "content": None, "refusal": None,
             "tool_calls": [called('{"a": 1, "b": 2}')]},
            {"role": "tool", "content": "3", "tool_calls": None}, A],
         "tools": [ADD], "parallel_tool_calls": False},
        {"messages": [
            U, {"role": "assistant", "content": None,
                "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
            {"role": "function", "name": "add", "content": "3"}, A], "functions": [FUNCTION]},
        # TRL: no content, arguments as an object
        {"messages": [U, {"role": "assistant", "tool_calls": [CALL]}, RESULT, A],
         "tools": json.dumps([ADD])},
        {"prompt": [U], "completion": [says(CALL), RESULT, A], "tools": [json.dumps(FUNCTION)]},
        # ShareGPT and LLaMA-Factory
        {"conversations": [
            {"from": "human", "value": U["content"]},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments":
                                                           {"a": 1, "b": 2}})},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": A["content"]}],
         "system": "", "tools": json.dumps([FUNCTION])},
        # ms-swift
        {"messages": [
            U, {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"role": "tool_response", "content": "3"}, A], "tools": json.dumps([ADD])},
        # our own column prompt
        {"messages": TALK},
        {"messages": json.dumps(TALK)},
    ],
)  # fmt: skip
def test_tools_calls_and_results_are_read_in_every_form(row):
    example, _ = read(row)
    assert example.messages == TALK


def test_calls_keep_ids_text_and_reasoning():
    first, second = called({"a": 1}, id="x"), called({"a": 2}, id="y")
    reply = says(first, second, content="Let me see.", reasoning_content="Two sums.")
    results = [
        {"role": "tool", "tool_call_id": "y", "content": "2"},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "1"}]},
    ]
    example, notes = read({"messages": [U, reply, *results, A]})
    assert example.messages[1] == reply and example.reasoning
    assert [m["content"] for m in example.messages[2:4]] == ["1", "2"]  # as the calls
    assert [m["name"] for m in example.messages[2:4]] == ["add", "add"]
    assert notes == {"results of tools put into the order of their calls": 1}


def test_results_that_are_objects_become_json_and_may_be_empty():
    row = {"messages": [U, says(CALL), {**RESULT, "content": {"sum": 3, "é": [None]}}, A]}
    assert read(row)[0].messages[2]["content"] == '{"sum": 3, "é": [null]}'
    row = {"messages": [U, says(CALL), {**RESULT, "content": ""}, A]}
    assert read(row)[0].messages[2]["content"] == ""


def test_call_turns_of_sharegpt_are_joined_to_one_reply():
    def turn(who, value):
        return {"from": who, "value": value if isinstance(value, str) else json.dumps(value)}

    calls = [{"name": "add", "arguments": {"a": n}} for n in (1, 2)]
    row = {"conversations": [
        turn("human", "Hi"), turn("gpt", "Let me see."), turn("function_call", calls[0]),
        turn("function_call", calls[1]), turn("observation", "1"), turn("observation", "2"),
        turn("gpt", "Done."),
    ]}  # fmt: skip
    messages = read(row)[0].messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == "Let me see."
    assert [c["function"] for c in messages[1]["tool_calls"]] == calls
    both = {"conversations": [turn("human", "Hi"), turn("function_call", calls), *row[
        "conversations"][4:]]}  # fmt: skip
    assert [c["function"] for c in read(both)[0].messages[1]["tool_calls"]] == calls


def test_tables_fill_up_objects_and_that_is_no_argument():
    """Arrow gives all objects of a column the same keys."""
    filled = {"type": "function", "function": {**FUNCTION, "strict": None, "parameters": {
        **FUNCTION["parameters"], "properties": {
            "a": {"type": "number", "enum": None}, "b": {"type": "number", "default": None},
            "city": None}}}}  # fmt: skip
    call = called({"a": 1, "b": None, "city": None})
    example, _ = read({"messages": [U, says(call), RESULT, A], "tools": [filled]})
    assert example.messages[0]["tools"] == [ADD]
    assert example.messages[1]["tool_calls"] == [called({"a": 1, "b": None})]
    example, _ = read({"messages": [U, says(call), RESULT, A]})  # nothing says which it has
    assert example.messages[1]["tool_calls"] == [call]


def test_tools_that_the_system_message_lists_are_not_written_twice():
    """As in hermes-function-calling-v1, whose system messages list the tools."""
    listed = {"role": "system", "content": f"You can call: <tools>{[ADD]}</tools>"}
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    talk = [listed, U, {"role": "assistant", "content": call}, {"role": "tool", "content": "3"}, A]
    example, notes = read({"messages": talk, "tools": json.dumps([ADD])})
    assert example.messages == talk
    assert notes == {"tools not added: the system message lists them already": 1}
    other = {"role": "system", "content": "You can call add."}
    example, notes = read({"messages": [other, *talk[1:]], "tools": [ADD]})
    assert example.messages[0] == {**other, "tools": [ADD]} and not notes


def test_pairs_and_labelled_replies_have_calls_and_reasoning():
    good, bad = says(CALL, reasoning_content="A sum."), {"role": "assistant", "content": "4"}
    pair, _ = read({"prompt": [U], "chosen": [good], "rejected": [bad], "tools": [ADD]},
                   "preference")  # fmt: skip
    assert pair.messages == TALK[:1] and pair.replies == [good, bad]
    assert (pair.chosen, pair.rejected, pair.completion) == ("", "4", None)
    whole = {"chosen": [U, says(CALL), RESULT, A], "rejected": [U, says(CALL), RESULT, bad]}
    pair, _ = read({**whole, "tools": [ADD]}, "preference")
    assert (pair.messages, pair.replies) == (TALK[:3], [A, bad])
    row, _ = read({"messages": TALK[:2], "label": False}, "unpaired")
    assert (row.messages, row.replies, row.label) == (TALK[:1], [says(CALL)], False)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [U, A], "tools": "add, sub"}, "column 'tools' is a text that is not JSON"),
        ({"messages": [U, A], "tools": ["add"]}, "tool 1 of column 'tools' is a text"),
        ({"messages": [U, A], "tools": [{"a": 1}]}, "is 'a'; expected tools as JSON schemas"),
        ({"messages": [U, A], "tools": [{"type": "web_search"}]}, "is 'type'; expected tools"),
        ({"messages": [U, A], "tools": [{"name": "f", "parameters": [1]}]}, "the parameters of"),
        ({"messages": [U, A], "tools": 7}, "column 'tools' is 7; expected tools"),
        ({"messages": TALK, "tools": [{"name": "other"}]}, "different tools; keep one of the two"),
        ({"messages": [U, says(called("{a: 1}"))]}, "the arguments of call 1 of key 'tool_calls'"),
        ({"messages": [U, says(called([1]))]}, "are [1]; expected an object"),
        ({"messages": [U, says({"type": "code"})]}, "is 'type'; expected calls of tools"),
        ({"messages": [U, says({**CALL, "result": "3"})]}, "key 'result' of call 1"),
        ({"conversations": [{"from": "human", "value": "a"},
                            {"from": "function_call", "value": "add(1)"}]},
         "message 2 of column 'conversations' is a text that is not JSON"),
        ({"messages": [U, RESULT, A]}, "message 2 is the result of a tool after a turn of"),
        ({"messages": [RESULT, U, A]}, "starts with the tool"),
        ({"messages": [U, says(CALL), RESULT, RESULT, A]}, "makes 1 calls, and 2 results follow"),
        ({"messages": [U, says(called({}, id="x")), {**RESULT, "tool_call_id": "z"}, A]},
         "the result of the call 'z'; the reply before it made the calls ['x']"),
    ],
)  # fmt: skip
def test_what_is_no_tool_call_or_result_is_refused(row, found):
    with pytest.raises(BadRow) as error:
        read(row)
    assert found in error.value.message, error.value.message


XLAM = {
    "id": 0, "query": "1 + 2?", "tools": json.dumps([FUNCTION]),
    "answers": json.dumps([CALL["function"], {"name": "add", "arguments": {"a": 3}}]),
}  # fmt: skip
NAMED = {"prompt": "query", "tool_calls": "answers"}


@pytest.mark.parametrize("purpose", ["sft", "unpaired"])
def test_calls_in_a_column_are_a_reply(purpose):
    """As in xlam-function-calling-60k: query, answers and tools, both as JSON."""
    with pytest.raises(DataError, match=re.escape(f"set columns: {json.dumps(NAMED)}. ")):
        read(XLAM)
    row = XLAM | ({"label": True} if purpose == "unpaired" else {})
    example, _ = read(row, purpose, columns=NAMED)
    whole = [*example.messages, *example.replies]
    assert whole == [TALK[0], says(CALL, called({"a": 3}))]
    asked, _ = read(XLAM, "prompts", columns={"prompt": "query"})
    assert asked.messages == TALK[:1]
    alpaca = {"instruction": "1 + 2?", "tool_calls": XLAM["answers"], "tools": XLAM["tools"]}
    assert read(alpaca)[0].messages == whole


@pytest.mark.parametrize(
    ("row", "given"),
    [
        (XLAM, {"columns": {"prompt": "query", "completion": "answers"}}),
        ({"messages": [U, {**A, "content": XLAM["answers"]}], "tools": [ADD]}, {}),
        ({"prompt": [U], "chosen": XLAM["answers"], "rejected": "3", "tools": [ADD]}, {}),
    ],
)  # fmt: skip
def test_calls_as_the_text_of_a_reply_are_refused(row, given):
    """The template would tell the model of another form than it is trained on."""
    purpose = "preference" if "chosen" in row else "sft"
    with pytest.raises(BadRow, match=r"calls of \['add', 'add'\] as JSON.*tool_calls"):
        read(row, purpose, **given)
    ignored = given | {"ignore_columns": ["tools"]}  # the system message says how to write calls
    assert read(row, purpose, **ignored)[0].messages[0] == U


def test_lists_that_call_no_tool_of_the_row_stay_texts():
    for text in ('[{"name": "Ann", "arguments": {}}]', '[{"name": "add", "age": 3}]', "[1]", "["):
        row = {"messages": [U, {**A, "content": text}], "tools": [ADD]}
        assert read(row)[0].messages[1]["content"] == text


ANTHROPIC = [
    U,
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Two sums.", "signature": "x"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "x", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "y", "name": "add", "input": {"a": 2}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "x", "content": "1"},
        {"type": "tool_result", "tool_use_id": "y", "content": [{"type": "text", "text": "2"}]}]},
    {"role": "assistant", "content": [{"type": "text", "text": A["content"]}]},
]  # fmt: skip
RESPONSES = [
    U,
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Two sums."}]},
    {"type": "message", "id": "m", "status": "completed", "role": "assistant",
     "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
    {"type": "function_call", "call_id": "x", "name": "add", "arguments": '{"a": 1}'},
    {"type": "function_call", "call_id": "y", "name": "add", "arguments": '{"a": 2}'},
    {"type": "function_call_output", "call_id": "x", "output": "1"},
    {"type": "function_call_output", "call_id": "y", "output": "2"},
    A,
]  # fmt: skip


@pytest.mark.parametrize(
    "row", [{"messages": ANTHROPIC}, {"input": RESPONSES}], ids=["anthropic", "responses"]
)
def test_blocks_and_items_of_apis_are_messages(row):
    calls = [called({"a": 1}, id="x"), called({"a": 2}, id="y")]
    reply = says(*calls, content="Let me see.", reasoning_content="Two sums.")
    results = [{**RESULT, "content": n, "tool_call_id": i} for n, i in (("1", "x"), ("2", "y"))]
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    messages = read({**row, "tools": tools})[0].messages
    assert messages[1:] == [reply, *results, A] and messages[0]["tools"][0]["function"]["name"]


def test_results_and_a_question_are_one_message_of_a_user():
    both = {"role": "user", "content": [*ANTHROPIC[2]["content"], {"type": "text", "text": "So?"}]}
    messages = read({"messages": [*ANTHROPIC[:2], both, A]})[0].messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "user",
                                             "assistant"]  # fmt: skip
    assert messages[4] == {"role": "user", "content": "So?"}


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (ANTHROPIC[1]["content"][::-1], "a block of type 'text' after others"),
        ([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}], "'thinking' aft"),
        ([{"type": "thinking", "thinking": "b"}, {"type": "image", "source": {}}], "'image'"),
    ],
)  # fmt: skip
def test_blocks_that_no_reply_can_hold_are_refused(parts, found):
    with pytest.raises(BadRow, match=found):
        read({"messages": [U, {"role": "assistant", "content": parts}]})
    picture = [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}]
    with pytest.raises(BadRow, match=r"a tool's result in message 3 .* type 'image'; only"):
        read({"messages": [*ANTHROPIC[:2], {"role": "user", "content": picture}, A]})


@pytest.mark.parametrize("rest", [[], [U, A], RESPONSES[5:]])
def test_reasoning_of_no_reply_is_refused(rest):
    with pytest.raises(BadRow, match="follows reasoning that belongs to no reply"):
        read({"input": [*RESPONSES[:2], *rest]})


def test_pair_of_trajectories_is_refused_with_what_to_write():
    row = {"prompt": [U], "chosen": [says(CALL), RESULT, A], "rejected": [A]}
    with pytest.raises(BadRow, match=r"differ at turn 2; .*a pair for each turn that differs"):
        read(row, "preference")


def test_tools_may_be_ignored_by_name():
    row = {"messages": [U, A], "tools": [ADD]}
    assert read(row, ignore_columns=["tools"])[0].messages == [U, A]
    assert read({"messages": [{**U, "tools": [ADD]}, A]}, ignore_columns=["tools"])[0].messages == [
        U, A]  # fmt: skip


def test_tools_of_a_column_with_another_name():
    row = {"messages": [U, A], "available_tools": [ADD]}
    with pytest.raises(BadRow, match=r"columns: \{tools: available_tools\}"):
        read(row)
    example, _ = read(row, columns={"tools": "available_tools"})
    assert example.messages == [TALK[0], A]


def test_prompts_are_shown_with_their_calls():
    """To judges and in reports; conversations without tools as ever."""
    shown = 'user: 1 + 2?\nassistant: [{"type": "function", "function": {"name": "add", ' + (
        '"arguments": {"a": 1, "b": 2}}}]\ntool: 3'
    )
    assert shown_prompt(json.dumps(TALK[:3])) == shown
    assert shown_prompt(json.dumps(TALK[:1])) == "1 + 2?"
    assert shown_prompt(json.dumps([U, A, U])) == "user: 1 + 2?\nassistant: It is 3.\nuser: 1 + 2?"
