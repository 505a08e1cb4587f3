"""The data set as a whole: split, order, bytes, reading, writing."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_core.data.dataset.card import DataCard, describe_lengths
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.shuffle import Shuffle
from rlhf_core.data.dataset.split import is_heldout, normalise_prompt
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.prepare import prepare
from rlhf_core.data.sources import builtin
from rlhf_core.errors import DataError, ModelError
from rlhf_core.jobs import DataSettings
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl, prefixing_tokenizer


def make(tmp_path, name, rows, purpose="sft", **settings):
    folder = tmp_path / name
    source = jsonl(tmp_path / f"{name}.jsonl", rows)
    card = prepare(job(source, purpose, **settings), byte_tokenizer(), folder, workers=1)
    return folder, card


def questions(count):
    return [f"Question {i} 问" for i in range(count)]


def alpaca(count):
    return [
        {"instruction": q, "input": "", "output": f"a{i}"} for i, q in enumerate(questions(count))
    ]


def test_split_never_shares_a_prompt_across_formats_orders_and_seeds(tmp_path):
    hh = [
        {"chosen": f"\n\nHuman:  {q.upper()}\n\nAssistant: y\n\nHuman: z\n\nAssistant: good",
         "rejected": f"\n\nHuman:  {q.upper()}\n\nAssistant: y\n\nHuman: z\n\nAssistant: bad"}
        for q in reversed(questions(200))
    ]  # fmt: skip
    a, _ = make(tmp_path, "a", alpaca(200), heldout_fraction=0.2, seed=1)
    b, _ = make(tmp_path, "b", hh, "preference", heldout_fraction=0.2, seed=2, system="Be kind.")

    def prompts(folder, split):
        texts = []
        for row in Rows(folder, split):
            text = row["prompt"]
            if text.startswith("["):
                text = next(m["content"] for m in json.loads(text) if m["role"] == "user")
            texts.append(normalise_prompt(text))
        return set(texts)

    for split, other in (("train", "heldout"), ("heldout", "train")):
        assert prompts(a, split) == prompts(b, split)
        assert not prompts(a, split) & prompts(b, other)
    assert 20 <= len(prompts(a, "heldout")) <= 60


def test_side_is_a_fixed_function_of_the_text():
    assert is_heldout("Hello  World", 0.5) == is_heldout("hello world", 0.5)
    assert not any(is_heldout(q, 0.0) for q in questions(50))
    assert all(is_heldout(q, 1.0) for q in questions(50))
    share = np.mean([is_heldout(q, 0.3) for q in questions(3000)])
    assert abs(share - 0.3) < 0.03
    # Pinned: a change would move prompts between the sides of existing data sets.
    assert [is_heldout(q, 0.5) for q in questions(6)] == [True, False, False, True, True, True]


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_same_input_gives_same_bytes(tmp_path):
    rows = alpaca(3000)
    a, card = make(tmp_path, "a", rows, heldout_fraction=0.1)
    (tmp_path / "other").mkdir()
    source = jsonl(tmp_path / "other" / "a.jsonl", rows)
    other = prepare(job(source, heldout_fraction=0.1), byte_tokenizer(), tmp_path / "b", workers=1)
    assert digest(a)["train-00000.arrow"] == digest(tmp_path / "b")["train-00000.arrow"]
    assert card.digest == other.digest
    assert set(digest(a)) == {"train-00000.arrow", "heldout-00000.arrow", "card.json", "card.md"}
    _, seeded = make(tmp_path, "a", rows, heldout_fraction=0.1, seed=1)
    assert seeded.digest != card.digest  # another order


@pytest.mark.slow
def test_worker_processes_change_no_byte(tmp_path):
    rows = alpaca(6000)
    _, alone = make(tmp_path, "a", rows)
    source = str(tmp_path / "a.jsonl")
    card = prepare(job(source), byte_tokenizer(), tmp_path / "b", workers=2)
    assert card.digest == alone.digest
    assert card.read == 6000


@pytest.mark.slow
def test_bad_row_in_a_worker_process_is_reported(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [*alpaca(4000), b"{"])
    with pytest.raises(DataError, match="row 4001: malformed JSON"):
        prepare(job(source), byte_tokenizer(), tmp_path / "b", workers=2)
    assert not (tmp_path / "b" / ".work").exists()


def test_max_samples_is_the_start_of_the_shuffled_set(tmp_path):
    everything, _ = make(tmp_path, "a", alpaca(500))
    some, card = make(tmp_path, "a2", alpaca(500), max_samples=20)
    assert card.dropped == {"max_samples": 480}
    order = [row["row"] for row in Rows(some, "train")]
    assert len(order) == 20 and order != sorted(order)
    assert max(order) > 100  # not just the first rows
    assert len(Rows(everything, "train")) == 500


def test_duplicates_are_kept_on_request(tmp_path):
    rows = alpaca(2) * 2
    assert make(tmp_path, "a", rows)[1].dropped == {"duplicate": 2}
    assert make(tmp_path, "b", rows, deduplicate=False)[1].kept == 4


def test_prompts_are_deduplicated_by_prompt(tmp_path):
    rows = [{"prompt": "a", "completion": str(i)} for i in range(3)]
    assert make(tmp_path, "a", rows, "prompts")[1].kept == 1
    assert make(tmp_path, "b", rows, "sft")[1].kept == 3


def test_rows_read_by_position(tmp_path):
    folder, card = make(tmp_path, "a", alpaca(2500))
    rows = Rows(folder, "train", "sft")
    assert len(rows) == card.splits["train"].rows == 2500
    listed = list(rows)
    assert rows[0] == listed[0] and rows[-1] == listed[-1] and rows[1001] == listed[1001]
    assert rows.take([5, 2]) == [listed[5], listed[2]]
    lengths = rows.lengths("input_ids")
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [len(row["input_ids"]) for row in listed]
    assert lengths.sum() == card.splits["train"].tokens
    assert sum(sum(row["trainable"]) for row in listed) == card.splits["train"].trainable_tokens
    with pytest.raises(IndexError):
        rows[2500]
    with pytest.raises(DataError, match="there are input_ids, trainable"):
        rows.lengths("prompt")
    empty = Rows(folder, "heldout")
    assert len(empty) == 0 and list(empty) == [] and empty.lengths("input_ids").shape == (0,)


def test_rows_refuses_what_is_no_data_set(tmp_path):
    folder, _ = make(tmp_path, "a", alpaca(3))
    with pytest.raises(DataError, match="is for sft; expected one for preference"):
        Rows(folder, "train", "preference")
    assert len(Rows(folder, "train", ["pretrain", "sft"])) == 3
    with pytest.raises(DataError, match="there are train, heldout"):
        Rows(folder, "test")
    with pytest.raises(DataError, match=r"no card\.json"):
        Rows(tmp_path, "train")
    (folder / "train-00000.arrow").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="not a complete Arrow file"):
        Rows(folder, "train")


def test_data_set_loads_with_the_library_datasets(tmp_path):
    from datasets import load_dataset

    folder, _ = make(tmp_path, "a", alpaca(30))
    loaded = load_dataset(
        "arrow", data_files=str(folder / "train-*.arrow"), split="train",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert list(loaded) == list(Rows(folder, "train"))


PAIR = {
    "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5],
    "prompt": '[{"role": "user", "content": "a"}]', "chosen": "x", "rejected": "y", "row": 1,
}  # fmt: skip


def test_write_dataset_writes_sampled_pairs(tmp_path):
    card = write_dataset(
        tmp_path, "preference", {"train": [PAIR, {**PAIR, "row": 2}], "heldout": iter([])},
        DataCard("preference", source="sampled", dropped={"too_close": 3}),
    )  # fmt: skip
    assert (card.read, card.kept, card.splits["train"].prompts) == (5, 2, 1)
    assert card.splits["train"].lengths["max"] == 4
    assert list(Rows(tmp_path, "train", "preference")) == [PAIR, {**PAIR, "row": 2}]
    assert DataCard.load(tmp_path) == card
    given = {"purpose": "preference", "source": "sampled", "counts": {"train_too_close": 3}}
    assert write_dataset(tmp_path, "preference", {"train": [PAIR]}, given).notes == {
        "train_too_close": 3
    }


def test_write_dataset_refuses_rows_of_another_shape(tmp_path):
    card = DataCard("preference")
    with pytest.raises(DataError, match="train row 1 has the columns"):
        write_dataset(tmp_path, "preference", {"train": [{"prompt": "a"}]}, card)
    with pytest.raises(DataError, match="expected prompt_ids"):
        write_dataset(tmp_path, "preference", {"train": [{**PAIR, "row": "x"}]}, card)
    with pytest.raises(DataError, match="no split"):
        write_dataset(tmp_path, "preference", {"test": []}, card)


def test_lengths_are_described_by_hand_values():
    from collections import Counter

    summary, histogram = describe_lengths(Counter({1: 1, 3: 2, 8: 1}))
    assert summary == {"mean": 3.8, "p50": 3, "p90": 8, "p99": 8, "max": 8}
    assert histogram == [
        {"from": 0, "to": 1, "rows": 1}, {"from": 2, "to": 2, "rows": 0},
        {"from": 3, "to": 4, "rows": 2}, {"from": 5, "to": 8, "rows": 1},
    ]  # fmt: skip
    assert describe_lengths(Counter()) == ({}, [])


def test_shuffle_through_files_equals_shuffle_in_memory(tmp_path):
    import pyarrow as pa

    keys = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    results = []
    for memory in (2**30, 10_000):
        folder = tmp_path / str(memory)
        folder.mkdir()
        shuffle = Shuffle(folder, "k", memory)
        for start in range(0, 5000, 100):
            part = keys[start : start + 100]
            shuffle.add(pa.record_batch({"k": part, "text": [str(k) for k in part]}))
        batches = list(shuffle)
        results.append([t for b in batches for t in b.column("text").to_pylist()])
    assert results[0] == results[1] == [str(k) for k in sorted(keys.tolist())]


def test_fingerprint_follows_contents_not_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [jsonl(tmp_path / name / "x.jsonl", [{"prompt": "a"}]) for name in ("a", "b")]
    one, two = (fingerprint(DataSettings(source=path)) for path in paths)
    assert one == two
    folders = [fingerprint(DataSettings(source=str(tmp_path / name))) for name in ("a", "b")]
    assert folders[0] == folders[1]
    jsonl(Path(paths[1]), [{"prompt": "b"}])
    assert fingerprint(DataSettings(source=paths[1])) != one
    with pytest.raises(DataError, match="no such file"):
        fingerprint(DataSettings(source=str(tmp_path / "c.jsonl")))
    assert fingerprint(DataSettings()).startswith("builtin:chatterbot@")
    commit = "a" * 40
    assert fingerprint(DataSettings(source="org/x", revision=commit)) == f"hub:org/x@{commit}"


def test_orchestrator_part_imports_nothing_heavy():
    code = (
        "import sys; from rlhf_core.data.fingerprint import fingerprint; "
        "from rlhf_core.data.check import check_source; "
        "from rlhf_core.jobs import DataSettings; assert fingerprint(DataSettings()); "
        "assert check_source(DataSettings(), 'sft') == []; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_builtin_conversations():
    rows = list(builtin.rows("chatterbot", "english:conversations,emotion"))
    dialogue = rows[1].data["messages"]
    assert [m["content"] for m in dialogue[:3]] == ["Hello", "Hi", "How are you doing?"]
    assert [m["role"] for m in dialogue[:3]] == ["user", "assistant", "user"]
    emotion = [r for r in rows if r.file.endswith("emotion.yml")]
    assert all(len(r.data["messages"]) == 2 for r in emotion)
    assert [r.data["messages"][0]["content"] for r in emotion[:4]] == ["You are arrogant"] * 4
    first = next(builtin.rows("chatterbot", "chinese:conversations"))
    assert first.data["messages"][0] == {
        "role": "user", "content": "早上好，你好吗?",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("subset", "text"),
    [("klingon", "is one of bengali, chinese"), ("english:x", "no category x in english")],
)
def test_builtin_unknown_subset_lists_the_known(subset, text):
    with pytest.raises(DataError, match=text):
        list(builtin.rows("chatterbot", subset))


def test_builtin_every_language_is_usable(tmp_path):
    root = builtin.files("chatterbot", "english")[0][1].parent.parent
    for language in sorted(entry.name for entry in root.iterdir() if entry.is_dir()):
        rows = list(builtin.rows("chatterbot", language))
        assert any(not row.dropped for row in rows), language


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, prefixing_tokenizer])
def test_tokenizer_survives_saving(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert len(loaded) == len(tokenizer)
    for text in ("Hello, 你好<|im_end|>", "</s> a  b\n"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizer_loads_without_torch(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from rlhf_core.data.encoding.tokenizer import load_tokenizer\n"
        "t = load_tokenizer(Path(sys.argv[1])); print(t.eos_token, 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["<|im_end|>", "False"]


def test_missing_tokenizer_says_what_is_needed(tmp_path):
    with pytest.raises(ModelError, match=r"no folder .*tokenizer\.json"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot be loaded .*holds tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    def peak(rows):
        source = jsonl(tmp_path / f"{rows}.jsonl", (
            {"prompt": f"q{i} " + "word " * 100, "completion": "Hello " * 100} for i in range(rows)
        ))  # fmt: skip
        code = (
            "import re, sys; from pathlib import Path\n"
            "from rlhf_core.data.prepare import prepare\n"
            "from tests.rlhf_core.data.helpers import *\n"
            "prepare(job(sys.argv[1]), byte_tokenizer(), Path(sys.argv[2]), workers=1)\n"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
        )
        run = [sys.executable, "-c", code, source, str(tmp_path / f"o{rows}")]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        return int(done.stdout) / 2**10

    # 7 and 20 MB of JSON, 27 and 80 MB of tokens: both more than the shuffle holds in memory.
    small, large = peak(6_400), peak(19_000)
    assert large - small < 70, (small, large)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "qwen2", "llama", "opt", "bloom"])
def test_tokenizer_equals_what_auto_tokenizer_loads(tmp_path, model):
    import importlib

    from transformers import AutoConfig, AutoTokenizer

    tokenizer = prefixing_tokenizer() if model == "llama" else byte_tokenizer()
    name = {"gpt2": "GPT2", "qwen2": "Qwen2", "llama": "Llama", "opt": "GPT2"}.get(model)
    if name:  # the model's own class, with the vocabulary of the tiny tokenizer
        module = importlib.import_module(
            f"transformers.models.{name.lower()}.tokenization_{name.lower()}"
        )
        data = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in data["merges"]]
        own = getattr(module, f"{name}Tokenizer")(
            vocab=data["vocab"], merges=merges, **tokenizer.special_tokens_map
        )
        own.chat_template = tokenizer.chat_template
        tokenizer = own
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model(model).save_pretrained(tmp_path)
    ours, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(auto)
    for text in ("Hello, 你好<|im_end|> Good  morning\n</s>", " x", "1234 don't"):
        assert ours(text)["input_ids"] == auto(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert ours.chat_template == auto.chat_template
    assert ours.special_tokens_map == auto.special_tokens_map
