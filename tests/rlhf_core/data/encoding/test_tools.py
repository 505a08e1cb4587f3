"""Conversations with tools: the tokens and masks of each template family, and what is refused."""

import json
import re

import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.tool_facts import tool_facts_of
from rlhf_core.data.prepare import prepare
from rlhf_core.stages.import_model import prepare_tokenizer
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl
from tests.rlhf_core.data.rows.layouts import encoded
from tests.rlhf_core.data.rows.test_tools import ADD, CALL, RESULT, TALK, A, U, called, says

# In the style of real templates, with turns in short marks. Qwen 2.5 writes all replies alike;
# Qwen 3 drops the reasoning before the last question; Llama 3.1 has one call and no text beside it,
# and writes a result as a JSON string; DeepSeek V3.1 takes arguments as text; Mistral asks for ids,
# and writes the tools before the last question.
TOOLS = "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>'
    "{% endfor %}"
)
RESULTS = (
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}[user]{% endif %}"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{% endif %}"
)
START = "{% for m in messages %}{% if m.role == 'assistant' %}"
REST = (
    "{% else %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QWEN25 = TOOLS + START + "[assistant]{{ m.content }}" + CALLS + "<|im_end|>" + RESULTS + REST
QWEN3 = (
    TOOLS + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + START
    + "{% set why = m.reasoning_content or '' %}[assistant]"
    "{% if loop.index0 > ns.last and (loop.last or why) %}<think>\n{{ why }}\n</think>\n\n"
    "{% endif %}{{ m.content }}" + CALLS + "<|im_end|>" + RESULTS + REST
)  # fmt: skip
LLAMA = (
    TOOLS + START + "[assistant]{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|im_end|>"
    "{% elif m.role == 'tool' %}[ipython]{{ m.content | tojson }}<|im_end|>" + REST
)
DEEPSEEK = (
    TOOLS + START + "[assistant]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '<sep>' + c.function.arguments + '</call>' }}{% endfor %}"
    "<|im_end|>{% elif m.role == 'tool' %}<output>{{ m.content }}</output>" + REST
)
MISTRAL = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}" + START
    + "[assistant]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if (c.id or '') | length != 9 %}{{ raise_exception('ids of 9 letters') }}{% endif %}"
    "{{ c.function | tojson }}{{ c.id }}{% endfor %}<|im_end|>"
    "{% elif m.role == 'tool' %}[result]{{ m.content }}{{ m.tool_call_id }}<|im_end|>"
    "{% else %}{% if tools and m == asked[-1] %}[tools]{{ tools | tojson }}{% endif %}"
    + REST.removeprefix("{% else %}")
)  # fmt: skip
# gpt-oss ends calls with another token, and drops the reasoning before a call once an answer
# follows.
HARMONY = (
    TOOLS + "{% for m in messages %}{% if m.tool_calls %}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant')"
    " | rejectattr('tool_calls', 'defined') | list %}[assistant]"
    "{% if m.thinking and not later %}<why>{{ m.thinking }}<end>[assistant]{% endif %}"
    "to={{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
    "<|endoftext|>{% elif m.role == 'assistant' %}[assistant]{% if m.thinking and loop.last %}"
    "<why>{{ m.thinking }}<end>[assistant]{% endif %}<final>{{ m.content }}"
    "{{ '<|im_end|>' if loop.last else '<end>' }}" + REST
)
LISTED = "[tools]" + json.dumps(ADD) + "<|im_end|>"
QUESTION = "[user]1 + 2?<|im_end|>[assistant]"
QWEN_CALL = '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call><|im_end|>'
QWEN_RESULT = "[user]<tool_response>\n3\n</tool_response><|im_end|>[assistant]"
HARMONY_CALL = '<why>Sum.<end>[assistant]to=add {"a": 1, "b": 2}<|endoftext|>'
NOTHING = "<think>\n\n</think>\n\n"
SURE = {"role": "user", "content": "Sure?"}
ID = {"id": "call00001"}


def tokenizer_of(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def by_hand(tokenizer, parts):
    """(ids, mask) of texts in turn, the first of which is not trained on, the second is, ..."""
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts]
    ids = [token for piece in pieces for token in piece]
    return ids, [bool(n % 2) for n, piece in enumerate(pieces) for _ in piece]


def rows_of(tokenizer, row, purpose="sft", **settings):
    batch = encoded(tokenizer, [row], purpose, **settings)
    return batch.rows.to_pylist()


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        (QWEN25, TALK, [[LISTED + QUESTION, QWEN_CALL, QWEN_RESULT, "It is 3.<|im_end|>"]]),
        # two calls, and text before them
        (QWEN25,
         [U, says(CALL, called({}), content="Wait."), RESULT, {**RESULT, "content": "{}"}, A],
         [[QUESTION, "Wait." + QWEN_CALL.replace("<|im_end|>", "")
           + '<call>{"name": "add", "arguments": {}}</call><|im_end|>',
           "[user]<tool_response>\n3\n</tool_response><tool_response>\n{}\n</tool_response><|im_end|>"
           "[assistant]", "It is 3.<|im_end|>"]]),
        # past replies are written otherwise: a row for each
        (QWEN3, TALK, [
            [LISTED + QUESTION, NOTHING + QWEN_CALL],
            [LISTED + QUESTION + QWEN_CALL + QWEN_RESULT, NOTHING + "It is 3.<|im_end|>"],
        ]),
        (QWEN3, [TALK[0], says(CALL, reasoning_content="Sum."), RESULT,
                 {**A, "reasoning_content": "Say."}], [
            [LISTED + QUESTION, "<think>\nSum.\n</think>\n\n" + QWEN_CALL],
            [LISTED + QUESTION + "<think>\nSum.\n</think>\n\n" + QWEN_CALL + QWEN_RESULT,
             "<think>\nSay.\n</think>\n\nIt is 3.<|im_end|>"],
        ]),
        (LLAMA, TALK, [[
            LISTED + QUESTION, '{"name": "add", "parameters": {"a": 1, "b": 2}}<|im_end|>',
            '[ipython]"3"<|im_end|>[assistant]', "It is 3.<|im_end|>",
        ]]),
        (DEEPSEEK, TALK, [[
            LISTED + QUESTION, '<call>add<sep>{"a": 1, "b": 2}</call><|im_end|>',
            "<output>3</output>[assistant]", "It is 3.<|im_end|>",
        ]]),
        (MISTRAL, [TALK[0], says(called({"a": 1}, **ID)), {**RESULT, "tool_call_id": ID["id"]}, A],
         [["[tools][" + json.dumps(ADD) + "]" + QUESTION,
           '{"name": "add", "arguments": {"a": 1}}call00001<|im_end|>',
           "[result]3call00001<|im_end|>[assistant]", "It is 3.<|im_end|>"]]),
        (HARMONY, [TALK[0], says(CALL, reasoning_content="Sum."), RESULT,
                   {**A, "reasoning_content": "Say."}], [
            [LISTED + QUESTION, HARMONY_CALL],
            [LISTED + QUESTION + HARMONY_CALL + "[tool]3<|im_end|>[assistant]",
             "<why>Say.<end>[assistant]<final>It is 3.<|im_end|>"],
        ]),
        # only the last answer is trained on
        (QWEN25, [TALK[0], {**says(CALL), "weight": 0}, RESULT, A],
         [[LISTED + QUESTION + QWEN_CALL + QWEN_RESULT, "It is 3.<|im_end|>"]]),
        (QWEN25, [TALK[0], says(CALL), RESULT, {**A, "weight": 0}],
         [[LISTED + QUESTION, QWEN_CALL, QWEN_RESULT + "It is 3.<|im_end|>"]]),
    ],
    ids=["qwen2.5", "two-calls", "qwen3", "qwen3-reasoning", "llama3.1", "deepseek", "mistral",
         "gpt-oss", "weight-of-call", "weight-of-answer"],
)  # fmt: skip
def test_calls_and_answers_are_trained_on_and_nothing_else(template, talk, expected):
    tokenizer = tokenizer_of(template)
    rows = rows_of(tokenizer, {"messages": talk})
    found = sorted(((r["input_ids"], r["trainable"]) for r in rows), key=lambda row: len(row[0]))
    assert found == [by_hand(tokenizer, parts) for parts in expected]


def test_system_message_of_the_settings_leaves_the_tools():
    tokenizer = tokenizer_of(QWEN25)
    [row] = rows_of(tokenizer, {"messages": [U, A], "tools": [ADD]}, system="Be kind.")
    parts = [LISTED + "[system]Be kind.<|im_end|>" + QUESTION, "It is 3.<|im_end|>"]
    assert (row["input_ids"], row["trainable"]) == by_hand(tokenizer, parts)


def test_pair_of_a_call_and_an_answer_has_the_texts_that_the_template_writes():
    tokenizer = tokenizer_of(QWEN3)
    good = says(CALL, reasoning_content="Sum.")
    row = {"prompt": [U], "chosen": [good], "rejected": [A], "tools": [ADD]}
    [out] = rows_of(tokenizer, row, "preference")
    text = "<think>\nSum.\n</think>\n\n" + QWEN_CALL
    assert out["prompt_ids"] == tokenizer(LISTED + QUESTION)["input_ids"]
    assert out["chosen_ids"] == tokenizer(text)["input_ids"]
    assert out["rejected_ids"] == tokenizer(NOTHING + "It is 3.<|im_end|>")["input_ids"]
    assert json.loads(out["prompt"]) == TALK[:1]
    assert (out["chosen"], out["rejected"]) == (text.removesuffix("<|im_end|>"), "It is 3.")
    row = {"messages": [*TALK[:3], {**A, "thinking": "Say."}], "label": False}
    [out] = rows_of(tokenizer, row, "unpaired")
    text = "<think>\nSay.\n</think>\n\nIt is 3."
    assert out["prompt_ids"] == tokenizer(LISTED + QUESTION + QWEN_CALL + QWEN_RESULT)["input_ids"]
    assert out["completion_ids"] == tokenizer(text + "<|im_end|>")["input_ids"]
    assert (out["completion"], out["label"]) == (text, False)


def test_ids_are_those_that_a_template_takes():
    """Mistral's take nine letters and digits; OpenAI's are longer, and many data have none."""
    tokenizer = tokenizer_of(MISTRAL)
    assert tool_facts_of(tokenizer).short_ids
    assert not any(tool_facts_of(tokenizer_of(t)).short_ids for t in (QWEN25, LLAMA, PLAIN))
    first, second = called({"a": 1}, id="call_abcdefghijkl"), called({"a": 1}, id="call_m")
    later = {"role": "tool", "tool_call_id": "call_m", "content": "4"}
    for calls, results in (
        ([first, second], [later, {**RESULT, "tool_call_id": first["id"]}]),
        ([called({"a": 1}), called({"a": 1})], [RESULT, {**RESULT, "content": "4"}]),
    ):
        rows = rows_of(tokenizer, {"messages": [U, says(*calls), *results, A]})
        text = tokenizer.decode(rows[-1]["input_ids"])
        ids = re.findall(r"}([0-9a-f]{9})", text)
        assert len({*ids}) == 2 and f"[result]3{ids[0]}<|im_end|>[result]4{ids[1]}" in text


def test_calls_that_end_with_another_token_end_replies_too():
    tokenizer = tokenizer_of(HARMONY)
    row = {"prompt": [U], "chosen": [says(CALL, reasoning_content="Sum.")], "rejected": [A]}
    [out] = rows_of(tokenizer, row, "preference")
    assert out["chosen_ids"] == tokenizer(HARMONY_CALL)["input_ids"]
    assert out["chosen"] == HARMONY_CALL.removesuffix("<|endoftext|>")
    assert out["rejected_ids"] == tokenizer("<final>It is 3.<|im_end|>")["input_ids"]
    ends = ["<|im_end|>", "<|endoftext|>"]
    assert templates.ends_of_turns(tokenizer) == ends
    assert prepare_tokenizer(tokenizer, "auto", "a") == tokenizer.convert_tokens_to_ids(ends)
    assert prepare_tokenizer(tokenizer_of(QWEN25), "auto", "a") == [tokenizer.eos_token_id]


def test_pairs_that_differ_in_an_argument_are_no_duplicates_and_equal_ones_are_dropped():
    tokenizer = tokenizer_of(QWEN25)
    pair = {"prompt": [U], "chosen": [says(CALL)], "rejected": [says(called({"a": 1}))]}
    batch = encoded(tokenizer, [pair, {**pair, "rejected": [says(CALL)]}], "preference")
    assert batch.rows.num_rows == 1 and batch.dropped == {"identical_replies": 1}


@pytest.mark.parametrize(
    ("talk", "prompt", "reference"),
    [
        (TALK, TALK[:1], "It is 3."),  # the answer, not the call before it
        (TALK[:3], TALK[:3], None),  # goes on after the result
        ([*TALK, SURE], [*TALK, SURE], None),
        (TALK[:2], TALK[:1], None),
    ],
)  # fmt: skip
def test_prompts_carry_their_tools(talk, prompt, reference):
    tokenizer = tokenizer_of(QWEN25)
    settings = {"columns": {"extra": "extra"}}
    row = {"messages": talk, "extra": {"sum": 3}}
    [out] = rows_of(tokenizer, row, "prompts", **settings)
    assert json.loads(out["prompt"]) == prompt
    assert (out["reference"], json.loads(out["extra"])) == (reference, {"sum": 3})
    text = tokenizer.apply_chat_template(
        [{k: v for k, v in m.items() if k != "tools"} for m in prompt],
        tools=[ADD], tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert tokenizer.decode(out["prompt_ids"]) == text


def test_prompts_keep_the_reasoning_before_a_call():
    tokenizer = tokenizer_of(QWEN3)
    talk = [TALK[0], says(CALL, reasoning_content="Sum."), RESULT]
    [out] = rows_of(tokenizer, {"messages": talk}, "prompts")
    text = LISTED + QUESTION + "<think>\nSum.\n</think>\n\n" + QWEN_CALL + QWEN_RESULT
    assert tokenizer.decode(out["prompt_ids"]) == text
    tokenizer = tokenizer_of(QWEN25)
    batch = encoded(tokenizer, [{"messages": talk}], "prompts", on_bad_row="skip")
    assert "does not read" in batch.bad[0][3]


def test_hermes_rows_with_everything_in_texts_work_as_they_are():
    """Marks around results are written once, by the template or by the data."""
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    results = "".join(f"<tool_response>\n{n}\n</tool_response>\n" for n in (3, 4))
    row = {"conversations": [
        {"from": "system", "value": f"Tools: {ADD}"}, {"from": "human", "value": "1 + 2?"},
        {"from": "gpt", "value": call}, {"from": "tool", "value": results},
        {"from": "gpt", "value": "It is 3."}], "tools": json.dumps([ADD])}  # fmt: skip
    tokenizer = tokenizer_of(QWEN25)
    [out] = rows_of(tokenizer, row)
    before = f"[system]Tools: {ADD}<|im_end|>{QUESTION}"
    after = QWEN_RESULT.replace("3\n</tool_response>", "3\n</tool_response><tool_response>\n4\n"
                                "</tool_response>")  # fmt: skip
    parts = [before, call + "<|im_end|>", after, "It is 3.<|im_end|>"]
    assert (out["input_ids"], out["trainable"]) == by_hand(tokenizer, parts)
    tokenizer = byte_tokenizer("chatml")
    [out] = rows_of(tokenizer, row)
    assert f"<|im_start|>tool\n{results}<|im_end|>" in tokenizer.decode(out["input_ids"])


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}" + REST[-58:]
NO_DESCRIPTION = QWEN25.replace("{{ t | tojson }}", "{{ t.function.name }}")
ONLY_NAMES = QWEN25.replace("c.function.arguments | tojson", "c.function.arguments.keys() | list")
FIRST_CALL = QWEN25.replace(
    "{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [])[:1] %}"
)
VICUNA = byte_tokenizer("vicuna").chat_template


@pytest.mark.parametrize(
    ("template", "talk", "purpose", "found"),
    [
        (PLAIN, [TALK[0], A], "sft", "does not write tools that the model may call"),
        (PLAIN, [U, says(CALL)], "sft", "does not write calls of tools (tool_calls): take a model"),
        (PLAIN, TALK, "prompts", "tools that the model may call (column 'tools') and calls of"),
        (VICUNA, [U, A, RESULT, A], "sft", "does not write results of tools (role tool)"),
        (NO_DESCRIPTION, [TALK[0], A], "sft", "leaves out 'Adds two numbers.' of the tool 'add'"),
        (NO_DESCRIPTION, TALK, "prompts", "leaves out 'Adds two numbers.' of the tool 'add'"),
        (FIRST_CALL, [U, says(CALL, called({"a": 98})), RESULT, A], "sft",
         "leaves out 98 of a call of 'add'"),
        (ONLY_NAMES, [U, says(CALL)], "sft", "does not write calls of tools"),
        (LLAMA, [U, says(CALL, content="Wait.")], "sft", "leaves out a part of the reply"),
        (LLAMA, [U, says(CALL, CALL), RESULT, A], "sft", "one call at once"),
    ],
)  # fmt: skip
def test_what_a_template_would_leave_out_is_refused(template, talk, purpose, found):
    batch = encoded(tokenizer_of(template), [{"messages": talk}], purpose, on_bad_row="skip")
    [(_, _, reason, message)] = batch.bad
    assert reason == "template" and found in message, message


@pytest.mark.parametrize("where", ["arguments", "result", "tools"])
def test_special_tokens_are_found_everywhere(where):
    end = "<|im_end|>"
    talk = {
        "arguments": [U, says(called({"a": end})), RESULT, A],
        "result": [U, says(CALL), {**RESULT, "content": end}, A],
        "tools": [{**U, "tools": [{"name": "f", "description": end}]}, A],
    }[where]
    batch = encoded(tokenizer_of(QWEN25), [{"messages": talk}], "sft", on_bad_row="skip")
    assert [bad[2] for bad in batch.bad] == ["special_token"]


def test_form_of_arguments_is_probed():
    for template, as_text in ((QWEN25, False), (DEEPSEEK, True)):
        facts = tool_facts_of(tokenizer_of(template))
        assert (facts.tools, facts.calls, facts.results) == (True, True, True)
        assert facts.as_text is as_text
    # Python's repr of an object is no JSON
    either = QWEN25.replace("c.function.arguments | tojson", "c.function.arguments")
    assert tool_facts_of(tokenizer_of(either)).as_text


def test_data_set_with_and_without_tools_is_prepared(tmp_path):
    """Rows without tools have the same bytes beside rows with them."""
    tokenizer = byte_tokenizer("hermes")
    plain = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [A], "rejected": "No."}
    with_tools = {"prompt": [U], "chosen": [says(CALL)], "rejected": [A], "tools": [ADD]}
    source = jsonl(tmp_path / "a.jsonl", [with_tools, plain])
    card = prepare(job(source, "preference"), tokenizer, tmp_path / "out", workers=1)
    assert (card.kept, card.bad) == (2, {})
    rows = {row["row"]: row for row in Rows(tmp_path / "out", "train", "preference")}
    assert rows[2]["prompt"] == '[{"role": "user", "content": "Hi"}]'
    assert json.loads(rows[1]["prompt"]) == TALK[:1]


def test_calls_of_tools_that_no_one_lists_are_counted(tmp_path):
    """A forgotten column tools: the model would learn to call what it was never told of."""
    tokenizer = byte_tokenizer("hermes")
    told = {"role": "system", "content": 'You may call {"name": "add"}.'}
    rows = [
        {"messages": TALK},
        {"messages": [told, U, *TALK[1:]]},
        {"messages": [U | {"content": "Another question"}, *TALK[1:]]},
    ]
    source = jsonl(tmp_path / "a.jsonl", rows)
    card = prepare(job(source, "sft"), tokenizer, tmp_path / "out", workers=1)
    assert card.notes == {"calls of tools that the row does not list: no column tools": 1}
