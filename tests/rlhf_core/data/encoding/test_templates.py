"""Chat templates: what is prompt, what is trained on, and that rollouts see the same tokens."""

import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.builtin_templates import SOURCES
from rlhf_core.data.prepare import prepare
from rlhf_core.errors import DataError, ModelError
from tests.rlhf_core.data.helpers import (
    byte_tokenizer,
    job,
    jsonl,
    prefixing_tokenizer,
    trained_text,
)

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
    [segments] = templates.render(tokenizer, TALK)
    assert [s.text for s in segments if s.in_loss] == ["Hi, 你好" + end, "Fine." + end]
    trained = templates.encode_segments(tokenizer, [s.text for s in segments if s.in_loss])
    assert [piece[-1] for piece in trained] == [end_id, end_id]
    assert [tokenizer.decode(piece) for piece in trained] == ["Hi, 你好" + end, "Fine." + end]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("make", [byte_tokenizer, prefixing_tokenizer])
def test_prompt_tokens_are_a_prefix_of_training_tokens(name, make):
    tokenizer = make(name)
    [segments] = templates.render(tokenizer, TALK)
    whole = ids_of(tokenizer, segments)
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
    [segments] = templates.render(byte_tokenizer(name), messages)
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
    [segments] = templates.render(tokenizer, TALK[1:3])
    assert segments[0].text == (
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert segments[1].text == "Hi, 你好<|im_end|>"


# What reasoning models do, in short: past replies lose their reasoning (Qwen3), the prompt opens it
# (Qwen3.5, the R1 distills, whose template drops it), another token ends past replies (gpt-oss).
QUESTION = "{% if m.role != 'assistant' %}[{{ m.role }}]{{ m.content }}<|im_end|>"
ANSWER = "{% set answer = m.content.split('</think>')[-1].strip() %}"
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}"
QWEN3 = (
    "{% for m in messages %}" + QUESTION + "{% else %}" + ANSWER + "[assistant]"
    "{% if not loop.last %}{{ answer }}{% elif '</think>' in m.content %}{{ m.content }}"
    "{% else %}<think>\n\n</think>\n\n{{ m.content }}{% endif %}<|im_end|>"
    + PROMPT + "[assistant]{% endif %}"
)  # fmt: skip
QWEN35 = QWEN3.replace(PROMPT + "[assistant]", PROMPT + "[assistant]<think>\n")
R1 = (
    "{% for m in messages %}" + QUESTION + "{% else %}" + ANSWER
    + "[assistant]{{ answer }}<|im_end|>" + PROMPT + "[assistant]<think>\n{% endif %}"
)  # fmt: skip
GPT_OSS = (
    "{% for m in messages %}" + QUESTION + "{% else %}[assistant]<final>{{ m.content }}"
    "{{ '<|im_end|>' if loop.last else '<end>' }}" + PROMPT + "[assistant]{% endif %}"
)
OPENED = (
    "{% for m in messages %}" + QUESTION + "{% else %}" + ANSWER
    + "[assistant]{% if loop.last %}{{ '<think>\n' + m.content }}{% else %}{{ answer }}{% endif %}"
    "{{ '\n<|im_end|>' }}" + PROMPT + "[assistant]<think>\n{% endif %}"
)  # fmt: skip
PLAIN_TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
REASONED = [m | {"content": f"<think>\nwhy {m['content']}\n</think>\n\n{m['content']}"}
            if m["role"] == "assistant" else m for m in PLAIN_TALK]  # fmt: skip
NOTHING = "\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        (QWEN3, PLAIN_TALK, [
            ("[user]a<|im_end|>[assistant]", "<think>\n\n</think>\n\nb<|im_end|>"),
            ("[user]a<|im_end|>[assistant]b<|im_end|>[user]c<|im_end|>[assistant]",
             "<think>\n\n</think>\n\nd<|im_end|>"),
        ]),
        (QWEN3, REASONED, [
            ("[user]a<|im_end|>[assistant]", "<think>\nwhy b\n</think>\n\nb<|im_end|>"),
            ("[user]a<|im_end|>[assistant]b<|im_end|>[user]c<|im_end|>[assistant]",
             "<think>\nwhy d\n</think>\n\nd<|im_end|>"),
        ]),
        (QWEN35, PLAIN_TALK[:2], [
            ("[user]a<|im_end|>[assistant]<think>\n", NOTHING + "b<|im_end|>"),
        ]),
        (QWEN35, REASONED, [
            ("[user]a<|im_end|>[assistant]<think>\n", "why b\n</think>\n\nb<|im_end|>"),
            ("[user]a<|im_end|>[assistant]b<|im_end|>[user]c<|im_end|>[assistant]<think>\n",
             "why d\n</think>\n\nd<|im_end|>"),
        ]),
        (R1, PLAIN_TALK, [
            ("[user]a<|im_end|>[assistant]<think>\n", NOTHING + "b<|im_end|>"),
            ("[user]a<|im_end|>[assistant]b<|im_end|>[user]c<|im_end|>[assistant]<think>\n",
             NOTHING + "d<|im_end|>"),
        ]),
        (R1, REASONED[:2], [
            ("[user]a<|im_end|>[assistant]<think>\n", "why b\n</think>\n\nb<|im_end|>"),
        ]),
        (GPT_OSS, PLAIN_TALK, [
            ("[user]a<|im_end|>[assistant]", "<final>b<|im_end|>"),
            ("[user]a<|im_end|>[assistant]<final>b<end>[user]c<|im_end|>[assistant]",
             "<final>d<|im_end|>"),
        ]),
        (OPENED, REASONED[:2], [
            ("[user]a<|im_end|>[assistant]<think>\n", "why b\n</think>\n\nb\n<|im_end|>"),
        ]),
        (OPENED, PLAIN_TALK[:2], [
            ("[user]a<|im_end|>[assistant]<think>\n", NOTHING + "b\n<|im_end|>"),
        ]),
    ],
)  # fmt: skip
def test_every_reply_is_trained_as_generation_writes_it(template, talk, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows = templates.render(tokenizer, talk)
    assert [tuple(s.text for s in row) for row in rows] == expected
    assert [[s.in_loss for s in row] for row in rows] == [[False, True]] * len(rows)
    for turn, (prompt, _) in zip((1, 3), expected, strict=False):
        written = tokenizer.apply_chat_template(
            talk[:turn], tokenize=False, add_generation_prompt=True
        )
        assert written == prompt  # an independent rendering: what generation starts from
        assert templates.prompt_ids(tokenizer, talk[:turn]) == tokenizer(prompt)["input_ids"]


def test_template_that_treats_all_replies_alike_keeps_a_conversation_whole():
    tokenizer = byte_tokenizer()
    assert len(templates.render(tokenizer, REASONED)) == 1
    # One that drops the reasoning of past replies alone: whole without reasoning, else split.
    tokenizer.chat_template = QWEN3.replace("<think>\n\n</think>\n\n", "")
    assert [len(templates.render(tokenizer, t)) for t in (PLAIN_TALK, REASONED)] == [1, 2]


def test_reasoning_that_the_template_leaves_out_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = R1.replace("[assistant]<think>\n", "[assistant]")
    with pytest.raises(DataError, match="leaves out a part of the reply"):
        templates.render(tokenizer, REASONED[:2])


def test_template_that_rewrites_prompts_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3.replace(PROMPT + "[assistant]", PROMPT + "[model]")
    with pytest.raises(DataError, match=r"in two ways.*model"):
        templates.render(tokenizer, PLAIN_TALK[:2])


def test_tokens_around_turns_are_found_in_messages_though_they_are_not_special():
    tokenizer = byte_tokenizer()
    tokens = ["[user]", "[system]", "<think>", "[other]"]
    tokenizer.add_tokens(tokens, special_tokens=False)
    tokenizer.chat_template = R1
    found = [templates.find_special_token(tokenizer, f"a {t}") for t in tokens]
    assert found == ["[user]", "[system]", None, None]


def test_named_templates_have_to_be_chosen():
    tokenizer = byte_tokenizer()
    named = {"chat": "A", "rag": "B"}
    tokenizer.chat_template = named
    assert templates.resolve_template(tokenizer, "tokenizer:rag") == "B"
    assert templates.resolve_template(tokenizer, "plain") not in named.values()
    for name in ("auto", "tokenizer:x"):
        with pytest.raises(ModelError, match="tokenizer:chat or tokenizer:rag"):
            templates.resolve_template(tokenizer, name)
    tokenizer.chat_template = named | {"default": "C"}
    assert templates.resolve_template(tokenizer, "auto") == "C"
    tokenizer.chat_template = "A"
    with pytest.raises(ModelError, match="no named chat templates"):
        templates.resolve_template(tokenizer, "tokenizer:rag")


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
    with pytest.raises(DataError, match=r"no system; .*put that text into the first question"):
        templates.render(tokenizer, TALK)
    tokenizer.chat_template = "{{ 1 // (messages[0].content | length - 1) }}" + QWEN3
    with pytest.raises(DataError, match=r"rejects turns of user: .*zero"):
        templates.render(tokenizer, PLAIN_TALK[:2])


def test_special_tokens_in_a_message_are_found():
    tokenizer = byte_tokenizer()
    assert templates.find_special_token(tokenizer, "a <|im_end|> b") == "<|im_end|>"
    assert templates.find_special_token(tokenizer, "a < b") is None


def test_reply_text_ends_at_the_end_of_turn():
    tokenizer = byte_tokenizer()
    ids = tokenizer("Yes.<|im_end|>more")["input_ids"]
    assert templates.reply_text(tokenizer, ids) == "Yes."
    assert templates.reply_text(tokenizer, tokenizer("Yes")["input_ids"]) == "Yes"


def test_conversation_becomes_a_row_for_each_reply(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3
    source = jsonl(tmp_path / "a.jsonl", [{"messages": REASONED}, {"messages": PLAIN_TALK[2:]}])
    card = prepare(job(source, system="s"), tokenizer, tmp_path / "out", workers=1)
    rows = sorted(Rows(tmp_path / "out", "train"), key=lambda r: (r["row"], len(r["input_ids"])))
    assert [trained_text(tokenizer, row) for row in rows] == [
        f"<think>\nwhy {x}\n</think>\n\n{x}<|im_end|>" for x in "bd"
    ] + ["<think>\n\n</think>\n\nd<|im_end|>"]
    assert (card.read, card.cut, card.kept) == (2, 1, 3)
    assert [(n, "a row for each reply" in note) for note, n in card.notes.items()] == [(1, True)]


def test_replies_that_the_template_makes_equal_are_no_pair(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3.replace("m.content }}{% endif %}", "answer }}{% endif %}")
    pairs = [{"prompt": "a", "chosen": "Red", "rejected": "Red\n"},
             {"prompt": "b", "chosen": "Red", "rejected": "Blue"}]  # fmt: skip
    source = jsonl(tmp_path / "a.jsonl", pairs)
    card = prepare(job(source, "preference"), tokenizer, tmp_path / "out", workers=1)
    assert card.dropped == {"identical_replies": 1} and card.kept == 1


def test_row_that_the_template_refuses_is_a_bad_row(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = R1.replace("[assistant]<think>\n", "[assistant]")
    source = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN_TALK}, {"messages": REASONED}])
    settings = job(source, on_bad_row="skip")
    card = prepare(settings, tokenizer, tmp_path / "out", workers=1)
    assert card.kept == 1 and card.bad == {"template": 1}
    assert "leaves out a part of the reply" in card.bad_rows[0]["message"]
    assert card.bad_rows[0]["row"] == 2


def test_card_says_that_the_template_writes_the_date(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + QWEN3
    source = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN_TALK[:2]}])
    card = prepare(job(source), tokenizer, tmp_path / "out", workers=1)
    assert card.notes == {"with today's date, which the chat template writes": 1}
