"""Each format with rows written by hand, and what must come out of it."""

import json
from pathlib import Path

import pytest

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.errors import DataError
from tests.rlhf_core.data.helpers import byte_tokenizer, jsonl, prepared, trained_text

END = "<|im_end|>"


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)


def whole(row: dict) -> str:
    return byte_tokenizer().decode(row["input_ids"])


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (
            {"instruction": "Name a city.", "input": "", "output": "Paris"},
            [("user", "Name a city."), ("assistant", "Paris")],
        ),
        (
            {"instruction": "翻译成英文", "input": "早上好", "output": "Good morning"},
            [("user", "翻译成英文\n\n早上好"), ("assistant", "Good morning")],
        ),
        (
            {"messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "再见"},
            ]},
            [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"),
             ("assistant", "再见")],
        ),
        (
            {"messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                {"role": "assistant", "content": "Hi"},
            ]},
            [("user", "Hello"), ("assistant", "Hi")],
        ),
        (
            {"conversations": [
                {"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"},
            ], "system": "You are kind."},
            [("system", "You are kind."), ("user", "你好"), ("assistant", "你好！")],
        ),
        (
            {"prompt": "2 + 2 =", "completion": " 4"},
            [("user", "2 + 2 ="), ("assistant", " 4")],
        ),
        (
            {"prompt": [{"role": "user", "content": "Hi"}],
             "completion": [{"role": "assistant", "content": "Yo"}]},
            [("user", "Hi"), ("assistant", "Yo")],
        ),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
             "rejected": "\n\nHuman: Hi\n\nAssistant: x"},
            [("user", "Hi"), ("assistant", "Hello")],
        ),
    ],
)  # fmt: skip
def test_format_becomes_a_conversation(tmp_path, row, turns):
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]))
    assert whole(out) == chatml(*turns).removesuffix("\n")
    replies = [text for role, text in turns if role == "assistant"]
    assert trained_text(byte_tokenizer(), out) == "".join(text + END for text in replies)
    assert out["prompt"] == next(text for role, text in turns if role == "user")
    assert out["row"] == 1


def test_text_is_trained_on_whole(tmp_path):
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [{"text": "Good morning"}]),
                     "pretrain")  # fmt: skip
    assert whole(out) == "Good morning" + END
    assert all(out["trainable"])


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: Fine.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: No.",
}
HH_PROMPT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
]


@pytest.mark.parametrize(
    "row",
    [
        HH,
        {"prompt": HH_PROMPT, "chosen": "Fine.", "rejected": "No."},
        {
            "prompt": "Hi",
            "chosen": [*HH_PROMPT, {"role": "assistant", "content": "Fine."}],
            "rejected": [*HH_PROMPT, {"role": "assistant", "content": "No."}],
        },
        {
            "prompt": HH_PROMPT,
            "chosen": [{"role": "assistant", "content": "Fine."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
    ],
)
def test_pairs_share_their_prompt(tmp_path, row):
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]), "preference")
    tokenizer = byte_tokenizer()
    assert json.loads(out["prompt"]) == HH_PROMPT
    assert (out["chosen"], out["rejected"]) == ("Fine.", "No.")
    assert tokenizer.decode(out["prompt_ids"]) == (
        chatml(("user", "Hi"), ("assistant", "Hello"), ("user", "And?")) + "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(out["chosen_ids"]) == "Fine." + END
    assert tokenizer.decode(out["rejected_ids"]) == "No." + END


def test_single_text_pair(tmp_path):
    row = {"prompt": "你好吗?", "chosen": "我挺好的", "rejected": "不"}
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]), "preference")
    assert json.loads(out["prompt"]) == [{"role": "user", "content": "你好吗?"}]
    assert byte_tokenizer().decode(out["chosen_ids"]) == "我挺好的" + END


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (False, False), (1, True), (0.0, False), ("True", True), ("false", False),
     (" 1", True), ("0", False)],
)  # fmt: skip
def test_labelled_reply(tmp_path, value, label):
    row = {"prompt": "Hi", "completion": "Go away", "label": value}
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]), "unpaired")
    tokenizer = byte_tokenizer()
    assert json.loads(out["prompt"]) == [{"role": "user", "content": "Hi"}]
    assert (out["completion"], out["label"]) == ("Go away", label)
    before = chatml(("user", "Hi")) + "<|im_start|>assistant\n"
    assert tokenizer.decode(out["prompt_ids"]) == before
    assert tokenizer.decode(out["completion_ids"]) == "Go away" + END


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HH_PROMPT, "completion": "Fine."},
        {"prompt": HH_PROMPT, "completion": [{"role": "assistant", "content": "Fine."}]},
        {"prompt": HH_PROMPT[:1],
         "completion": [*HH_PROMPT[1:], {"role": "assistant", "content": "Fine."}]},
    ],
)  # fmt: skip
def test_labelled_reply_to_a_conversation(tmp_path, row):
    source = jsonl(tmp_path / "a.jsonl", [row | {"label": True}])
    [out] = prepared(tmp_path / "out", source, "unpaired")
    assert json.loads(out["prompt"]) == HH_PROMPT
    assert (out["completion"], out["label"]) == ("Fine.", True)


def test_labelled_replies_serve_other_purposes(tmp_path):
    """Demonstrations are the good ones only; prompts are all, with the good reply as reference."""
    rows = [
        {"prompt": HH_PROMPT, "completion": "Fine.", "label": True},
        {"prompt": [{"role": "user", "content": "Bye"}, *HH_PROMPT[1:]], "completion": "No.",
         "label": False},
    ]  # fmt: skip
    source = jsonl(tmp_path / "a.jsonl", rows)
    [out] = prepared(tmp_path / "sft", source, "sft")
    assert trained_text(byte_tokenizer(), out).endswith("Fine." + END)
    card = DataCard.load(tmp_path / "sft")
    assert (card.format, card.dropped) == ("unpaired", {"undesirable": 1})
    good, bad = prepared(tmp_path / "prompts", source, "prompts")
    assert (good["reference"], bad["reference"]) == ("Fine.", None)
    assert [len(json.loads(row["prompt"])) for row in (good, bad)] == [3, 3]


def test_two_labels_of_one_reply_are_two_rows(tmp_path):
    row = {"prompt": "Hi", "completion": "Yo", "label": True}
    source = jsonl(tmp_path / "a.jsonl", [row, row | {"label": False}, row | {"label": 1}])
    out = prepared(tmp_path / "out", source, "unpaired")
    assert [r["label"] for r in out] == [True, False]
    assert DataCard.load(tmp_path / "out").dropped == {"duplicate": 1}


def test_card_counts_the_tokens_of_labelled_replies(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Yo", "label": i % 2} for i in range(2)]
    out = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), "unpaired")
    side = DataCard.load(tmp_path / "out").splits["train"]
    assert side.trainable_tokens == sum(len(r["completion_ids"]) for r in out)
    assert side.tokens == side.trainable_tokens + sum(len(r["prompt_ids"]) for r in out)


def test_a_column_label_with_something_else_is_ignored_when_the_settings_say_so(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1?", "completion": "2", "label": "maths"}])
    with pytest.raises(DataError, match=r"column 'label' holds 'maths'.*ignore_columns: \[label\]"):
        prepared(tmp_path / "out", source)
    assert len(prepared(tmp_path / "out", source, ignore_columns=["label"])) == 1
    assert DataCard.load(tmp_path / "out").format == "prompt_completion"


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "Hi"}, [("user", "Hi")], None),
        ("Hi", [("user", "Hi")], None),
        ({"text": "Hi"}, [("user", "Hi")], None),
        ({"instruction": "Hi"}, [("user", "Hi")], None),
        ({"instruction": "Hi", "output": "Yo"}, [("user", "Hi")], "Yo"),
        (HH, [("user", "Hi"), ("assistant", "Hello"), ("user", "And?")], "Fine."),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                               {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
            [("user", "a"), ("assistant", "b"), ("user", "c")],
            "d",
        ),
    ],
)  # fmt: skip
def test_prompts_from_every_format(tmp_path, row, prompt, reference):
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]), "prompts")
    assert json.loads(out["prompt"]) == [{"role": r, "content": c} for r, c in prompt]
    assert out["reference"] == reference
    assert byte_tokenizer().decode(out["prompt_ids"]) == (
        chatml(*prompt) + "<|im_start|>assistant\n"
    )


def test_system_is_put_before_conversations_that_have_none(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "c"},
                      {"role": "assistant", "content": "d"}]},
    ]  # fmt: skip
    out = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), system="Be kind.")
    assert whole(out[0]).startswith(chatml(("system", "Be kind."), ("user", "a")))
    assert whole(out[1]).startswith(chatml(("system", "own"), ("user", "c")))


def test_columns_renames(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}])
    columns = {"prompt": "question", "completion": "answer"}
    [out] = prepared(tmp_path / "out", source, columns=columns)
    assert trained_text(byte_tokenizer(), out) == "2" + END


def test_turns_after_the_last_reply_are_counted(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}]}  # fmt: skip
    [out] = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]))
    assert whole(out) == chatml(("user", "a"), ("assistant", "b")).removesuffix("\n")
    assert DataCard.load(tmp_path / "out").notes == {"turns after the last reply left out": 1}


@pytest.mark.parametrize(
    ("row", "purpose", "words"),
    [
        (
            {"prompt": "Hi"},
            "sft",
            ["prompt can be used for prompts, not for", "sft are alpaca (instr"],
        ),
        (
            {"prompt": "a", "completion": "b"},
            "unpaired",
            [
                "not for unpaired",
                "the formats for unpaired are unpaired (prompt, completion, label)",
            ],
        ),
        (
            {"text": "Hi"},
            "preference",
            ["text can be used for", "preference are hh (chosen"],
        ),
        ({"instruction": "a", "output": "b"}, "preference", ["alpaca can be used for sft"]),
    ],
)
def test_impossible_purpose_says_what_the_format_serves(tmp_path, row, purpose, words):
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [row]), purpose)
    assert all(word in str(error.value) for word in words)


def test_same_content_in_every_file_kind(tmp_path):
    import csv
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"instruction": "Say \"hi\",\nplease", "input": "", "output": "hi"},
        {"instruction": "你好", "input": "x", "output": "你好！"},
    ]  # fmt: skip
    files = [Path(jsonl(tmp_path / "a.jsonl", rows))]
    files.append(tmp_path / "a.jsonl.gz")
    files[-1].write_bytes(gzip.compress(files[0].read_bytes()))
    files.append(tmp_path / "array.json")
    files[-1].write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    files.append(tmp_path / "lines.json")
    files[-1].write_bytes(files[0].read_bytes())
    files.append(tmp_path / "a.csv")
    with files[-1].open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    files.append(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), files[-1])
    results = [prepared(tmp_path / f"out-{i}", str(file)) for i, file in enumerate(files)]
    assert all(result == results[0] for result in results)
    assert [row["row"] for row in results[0]] == [1, 2]


def test_folder_and_pattern_read_all_files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [{"prompt": "a"}])
    jsonl(folder / "b.jsonl", [{"prompt": "b"}])
    (folder / "README.md").write_text("not data")
    for source in (str(folder), str(folder / "*.jsonl")):
        assert len(prepared(tmp_path / "out", source, "prompts")) == 2


def test_hub_data_set_is_streamed(tmp_path, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(*arguments, **named):
        asked.update(named, arguments=arguments)
        return datasets.IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = prepared(tmp_path / "out", "org/name", "prompts", subset="en", split="test")
    assert json.loads(out[0]["prompt"])[0]["content"] == "a"
    assert asked == {
        "arguments": ("org/name", "en"), "split": "test", "revision": None, "streaming": True,
    }  # fmt: skip
