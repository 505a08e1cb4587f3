"""Chat templates: what is prompt, what is trained on, and that rollouts see the same tokens."""

import pytest

from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.builtin_templates import SOURCES
from rlhf_core.errors import DataError, ModelError
from tests.rlhf_core.data.helpers import byte_tokenizer, prefixing_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi, 你好"},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
]


def ids_of(tokenizer, segments):
    pieces = templates.encode_segments(tokenizer, [s.text for s in segments])
    return [token for piece in pieces for token in piece]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("make", [byte_tokenizer, prefixing_tokenizer])
def test_builtin_template_trains_on_replies_and_their_ends(name, make):
    tokenizer = make(name)
    end, end_id = templates.end_of_turn(tokenizer)
    assert end_id == tokenizer.convert_tokens_to_ids(end)
    segments = templates.render(tokenizer, TALK)
    assert [s.text for s in segments if s.in_loss] == ["Hi, 你好" + end, "Fine." + end]
    trained = templates.encode_segments(tokenizer, [s.text for s in segments if s.in_loss])
    assert [piece[-1] for piece in trained] == [end_id, end_id]
    assert [tokenizer.decode(piece) for piece in trained] == ["Hi, 你好" + end, "Fine." + end]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("make", [byte_tokenizer, prefixing_tokenizer])
def test_prompt_tokens_are_a_prefix_of_training_tokens(name, make):
    tokenizer = make(name)
    whole = ids_of(tokenizer, templates.render(tokenizer, TALK))
    for turns in (2, 4):
        prompt = templates.prompt_ids(tokenizer, TALK[:turns])
        assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>",
        ),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|im_end|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|im_end|>",
        ),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nHello\n\n### Response:\nHi<|im_end|>",
        ),
        (
            "vicuna",
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions.\n"
            "USER: Hello\nASSISTANT:\nHi<|im_end|>",
        ),
        ("plain", "Hello\nHi<|im_end|>"),
    ],
)
def test_builtin_template_text(name, expected):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    segments = templates.render(byte_tokenizer(name), messages)
    assert "".join(s.text for s in segments) == expected


def test_chatml_ends_turns_with_eos_where_its_own_token_is_missing():
    tokenizer = prefixing_tokenizer("chatml")
    assert templates.end_of_turn(tokenizer)[0] == "</s>"
    prompt = templates.prompt_ids(tokenizer, TALK[:2])
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_own_template_is_kept_and_chosen_by_auto():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "own"
    assert templates.resolve_template(tokenizer, "auto") == "own"
    assert templates.resolve_template(tokenizer, "chatml") != "own"


def test_unknown_template_lists_the_known_ones():
    with pytest.raises(ModelError, match="chatml, llama3, alpaca, vicuna, plain"):
        templates.resolve_template(byte_tokenizer(), "nope")


def test_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer("", eos_token="")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos token"):
        templates.resolve_template(tokenizer, "plain")


def test_template_that_inserts_a_system_prompt_works():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    segments = templates.render(tokenizer, TALK[1:3])
    assert segments[0].text == (
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert segments[1].text == "Hi, 你好<|im_end|>"


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_template_that_strips_earlier_thinking_works():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>y</think>d"},
    ]
    trained = [s.text for s in templates.render(tokenizer, talk) if s.in_loss]
    assert trained == ["b<|im_end|>", "<think>y</think>d<|im_end|>"]
    whole = ids_of(tokenizer, templates.render(tokenizer, talk))
    prompt = templates.prompt_ids(tokenizer, talk[:3])
    assert whole[: len(prompt)] == prompt


OPENS_THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def test_template_whose_generation_prompt_is_longer_works_for_one_turn():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = OPENS_THINKING
    segments = templates.render(tokenizer, TALK[1:3])
    assert [s.text for s in segments] == [
        "[user]Hello<|im_end|>[assistant]<think>\n", "Hi, 你好<|im_end|>",
    ]  # fmt: skip


def test_template_that_rewrites_prompts_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = OPENS_THINKING
    with pytest.raises(ModelError, match=r"in two ways.*<think>"):
        templates.render(tokenizer, TALK[1:])


def test_template_without_end_of_turn_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ModelError, match=r"no end-of-turn token.*chatml"):
        templates.end_of_turn(tokenizer)


def test_template_that_is_not_jinja_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(ModelError, match="not valid Jinja"):
        templates.end_of_turn(tokenizer)


def test_template_that_refuses_a_conversation_says_why():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(DataError, match="no system"):
        templates.render(tokenizer, TALK)


def test_special_tokens_in_a_message_are_found():
    tokenizer = byte_tokenizer()
    assert templates.find_special_token(tokenizer, "a <|im_end|> b") == "<|im_end|>"
    assert templates.find_special_token(tokenizer, "a < b") is None


def test_reply_text_ends_at_the_end_of_turn():
    tokenizer = byte_tokenizer()
    ids = tokenizer("Yes.<|im_end|>more")["input_ids"]
    assert templates.reply_text(tokenizer, ids) == "Yes."
    assert templates.reply_text(tokenizer, tokenizer("Yes")["input_ids"]) == "Yes"
