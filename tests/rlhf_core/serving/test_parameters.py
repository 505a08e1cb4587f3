"""docs/serving.md's table of parameters, driven through the openai client: all that the client has
is in the table, and the server does with each what the table says."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from tests.rlhf_core.serving.live import HELLO, serving

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")

ROOT = Path(__file__).parents[3]
APIS = ("chat", "completions", "responses")
PROMPT = "Tell me something about cats and dogs"
NEEDED = {
    "chat": {"model": "tiny", "messages": HELLO, "max_tokens": 12},
    "completions": {"model": "tiny", "prompt": PROMPT, "max_tokens": 12},
    "responses": {"model": "tiny", "input": "Hello", "max_output_tokens": 16},
}


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def method(client, api):
    found = {
        "chat": client.chat.completions, "completions": client.completions,
        "responses": client.responses,
    }  # fmt: skip
    return found[api].create


def ask(server, api, **given):
    return method(server.client, api)(**{**NEEDED[api], **given})


def text(answer):
    if answer.object == "response":
        return answer.output_text
    choice = answer.choices[0]
    return choice.text if answer.object == "text_completion" else choice.message.content


def table():
    """(parameter, api) -> cell."""
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    rows = [re.split(r" \| ", line.strip("| ")) for line in lines if line.startswith("| `")]
    rows = [row for row in rows if len(row) == 5]
    return {(row[0].strip("`"), api): row[1 + i] for row in rows for i, api in enumerate(APIS)}


TABLE = table()
CASES = [case for case, cell in TABLE.items() if cell != "–"]
REFUSED = [case for case in CASES if TABLE[case] == "refused"]
WITHOUT_EFFECT = [case for case in CASES if TABLE[case] == "no effect"]
ONLY = [case for case in CASES if TABLE[case].startswith("only ")]
OBEYED = sorted(set(CASES) - set(REFUSED) - set(WITHOUT_EFFECT) - set(ONLY))


def test_table_has_all_that_the_client_can_send():
    with openai.OpenAI(api_key="none") as client:
        for api in APIS:
            names = set(inspect.signature(method(client, api)).parameters)
            names -= {"extra_headers", "extra_query", "extra_body", "timeout"}
            assert names == {name for name, found in CASES if found == api}


def refusal(server, api, name, value):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, api, **{name: value})
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition("[")[0].partition(".")[0] == name
    assert name in error["message"]
    return error["code"]


def test_what_is_refused_is_refused_by_its_name(server):
    for name, api in REFUSED:
        assert refusal(server, api, name, [{"a": 1}]) == "unsupported_parameter", (name, api)


def test_what_has_no_effect_is_accepted(server):
    for name, api in WITHOUT_EFFECT:
        value = {"metadata": {"a": "b"}, "parallel_tool_calls": True}.get(name, "x")
        ask(server, api, **{name: value})


def test_only_the_named_values_are_accepted(server):
    for name, api in ONLY:
        for value in re.findall(r"`(.*?)`", TABLE[name, api]):
            ask(server, api, **{name: json.loads(value)})
        other = {"best_of": 2, "modalities": ["audio"], "text": {"format": {"type": "json_object"}},
                 "response_format": {"type": "json_object"}}  # fmt: skip
        assert refusal(server, api, name, other.get(name, "required")) == "invalid_value"


def test_a_check_of_each_obeyed_parameter_is_here():
    assert {name for name, _ in OBEYED} == set(CHECKS) | {"messages", "prompt", "input"}


@pytest.mark.parametrize(("name", "api"), OBEYED)
def test_what_is_obeyed_is_obeyed(server, name, api):
    if name in CHECKS:
        CHECKS[name](server, api)


def check_model(server, api):
    with pytest.raises(openai.NotFoundError, match="the model is tiny"):
        ask(server, api, model="gpt2")


def check_instructions(server, api):
    given = [{"role": "system", "content": "Be brief."}, *HELLO]
    chat = ask(server, "chat", messages=given, temperature=0, max_tokens=16)
    response = ask(server, api, instructions="Be brief.", temperature=0)
    assert response.output_text == text(chat)
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def check_length(name):
    def check(server, api):
        answer = ask(server, api, temperature=0, **{name: 3})
        if api == "responses":
            assert answer.usage.output_tokens == 3 and answer.status == "incomplete"
            assert answer.incomplete_details.reason == "max_output_tokens"
        else:
            assert answer.usage.completion_tokens == 3
            assert answer.choices[0].finish_reason == "length"
        assert refusal(server, api, name, 0) == "invalid_value"
        with pytest.raises(openai.BadRequestError, match="context is 1024 tokens") as caught:
            ask(server, api, **{**dict.fromkeys(NEEDED[api].keys() & {"max_tokens"}), name: 1024})
        assert caught.value.code == "context_length_exceeded"

    return check


def check_temperature(server, api):
    assert text(ask(server, api, temperature=0)) == text(ask(server, api, temperature=0))
    assert len({text(ask(server, api, temperature=2)) for _ in range(4)}) > 1
    for value in (-0.1, 2.1):
        assert refusal(server, api, "temperature", value) == "invalid_value"


def check_top_p(server, api):
    greedy = text(ask(server, api, temperature=0))
    assert text(ask(server, api, temperature=1, top_p=1e-6)) == greedy
    assert refusal(server, api, "top_p", 0) == "invalid_value"


def check_n(server, api):
    answer = ask(server, api, n=3, temperature=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({str(choice) for choice in answer.choices}) == 3
    assert refusal(server, api, "n", 0) == "invalid_value"
    chunks = list(ask(server, api, n=2, stream=True))
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def check_stop(server, api):
    whole = text(ask(server, api, temperature=0))
    stop = whole[5:9]
    answer = ask(server, api, temperature=0, stop=["not there", stop])
    assert text(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert streamed(ask(server, api, temperature=0, stop=stop, stream=True)) == text(answer)
    assert refusal(server, api, "stop", ["a"] * 5) == "invalid_value"


def check_seed(server, api):
    def once(seed):
        return text(ask(server, api, temperature=2, seed=seed))

    assert once(1) == once(1) and len({once(seed) for seed in range(3)}) == 3


def check_penalty(name):
    def check(server, api):
        plain = text(ask(server, api, temperature=0, max_tokens=60))
        assert text(ask(server, api, temperature=0, max_tokens=60, **{name: 2})) != plain
        assert refusal(server, api, name, 2.1) == "invalid_value"

    return check


def check_logit_bias(server, api):
    answer = ask(server, api, temperature=0, logit_bias={"77": 100}, max_tokens=3)
    assert text(answer) == server.chat_model.tokenizer.decode([77] * 3)
    for wrong in ({"a": 1}, {"77": 101}, {"100000000": 1}):
        assert refusal(server, api, "logit_bias", wrong) == "invalid_value"


def check_logprobs(server, api):
    import torch

    prompt = {"chat": {"messages": HELLO}, "completions": {"prompt": [5, 6, 7]}}[api]
    on = {"chat": {"logprobs": True, "top_logprobs": 2}, "completions": {"logprobs": 2}}[api]
    answer = ask(server, api, **prompt, **on, max_tokens=2, temperature=0, logit_bias={"77": 100})
    from rlhf_core.data.encoding.templates import prompt_ids

    tokenizer = server.chat_model.tokenizer
    ids = prompt.get("prompt") or prompt_ids(tokenizer, HELLO)
    with torch.no_grad():
        logits = server.chat_model.model(torch.tensor([ids])).logits[0, -1]
    wanted = logits.log_softmax(0)
    top = [float(x) for x in wanted.topk(2).values]
    given = answer.choices[0].logprobs
    if api == "chat":
        found = given.content[0].logprob, [one.logprob for one in given.content[0].top_logprobs]
        assert given.content[0].token == tokenizer.decode([77]) and len(given.content) == 2
    else:
        found = given.token_logprobs[0], sorted(given.top_logprobs[0].values(), reverse=True)
        assert given.tokens == [tokenizer.decode([77])] * 2
    assert found[0] == pytest.approx(float(wanted[77]), abs=1e-4)
    assert found[1] == pytest.approx(top, abs=1e-4)


def check_top_logprobs(server, api):
    assert refusal(server, api, "top_logprobs", 2) == "invalid_value"  # without logprobs
    for chunk in ask(server, api, stream=True, logprobs=True, top_logprobs=1, max_tokens=2):
        choice = chunk.choices[0]
        assert not choice.delta.content or len(choice.logprobs.content[0].top_logprobs) == 1


def streamed(chunks):
    found = [chunk.choices[0] for chunk in chunks if chunk.choices]
    return "".join(c.text if hasattr(c, "text") else c.delta.content or "" for c in found)


def check_stream(server, api):
    whole = ask(server, api, temperature=0)
    chunks = list(ask(server, api, temperature=0, stream=True))
    if api == "responses":
        assert [chunk.sequence_number for chunk in chunks] == list(range(len(chunks)))
        deltas = [c.delta for c in chunks if c.type == "response.output_text.delta"]
        assert chunks[-1].type == "response.incomplete" and len(deltas) > 3
        assert "".join(deltas) == text(whole) == chunks[-1].response.output_text
        assert chunks[-1].response.usage == whole.usage
    else:
        assert streamed(chunks) == text(whole) and len(chunks) > 3
        assert chunks[-1].choices[0].finish_reason == "length"
        assert all(chunk.usage is None for chunk in chunks)


def check_stream_options(server, api):
    asked = {"stream_options": {"include_usage": True}}
    *chunks, last = ask(server, api, temperature=0, stream=True, **asked)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert refusal(server, api, "stream_options", {"include_usage": True}) == "invalid_value"


CHECKS = {
    "model": check_model,
    "instructions": check_instructions,
    **{f"max_{kind}": check_length(f"max_{kind}")
       for kind in ("tokens", "completion_tokens", "output_tokens")},
    "temperature": check_temperature,
    "top_p": check_top_p,
    "n": check_n,
    "stop": check_stop,
    "seed": check_seed,
    "presence_penalty": check_penalty("presence_penalty"),
    "frequency_penalty": check_penalty("frequency_penalty"),
    "logit_bias": check_logit_bias,
    "logprobs": check_logprobs,
    "top_logprobs": check_top_logprobs,
    "stream": check_stream,
    "stream_options": check_stream_options,
}  # fmt: skip
