"""Overlap of training rows and held-out prompts: hand values and a search of all passages."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.split import is_heldout
from rlhf_core.data.overlap import heldout, ngrams
from rlhf_core.data.overlap.heldout import Comparison, HeldoutPrompts
from rlhf_core.data.prepare import prepare
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def compare(prompts: list[str], rows: list[tuple[str, str]]):
    """The result for held-out prompts and (prompt, whole text) of training rows."""
    comparison = Comparison(HeldoutPrompts.of(prompts))
    own = [ngrams.whole(prompt) for prompt, _ in rows]
    grams = ngrams.grams([ngrams.words(text) for _, text in rows])
    comparison.add(range(1, len(rows) + 1), own, grams)
    return comparison.result()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, 42 times!", "don t panic 42 times"),
        ("Ｗｉｄｅ Straße_x", "wide strasse x"),
        ("早上好 abc你", "早 上 好 abc 你"),
        ("?!  ...", ""),
    ],
)
def test_words_have_no_case_width_or_punctuation(text, expected):
    assert [word.decode() for word in ngrams.words(text)] == expected.split()
    assert (ngrams.whole(text) == 0) is not bool(expected)


def test_ascii_texts_are_split_as_others():
    text = "".join(chr(i) for i in range(128)) + " A_b c-D 1.5"
    assert ngrams.words(text) == ngrams.words(text + " é")[:-1]


def test_ngrams_of_texts_together_are_those_of_each_alone():
    texts = [list(map(str.encode, words)) for words in ("abc", "", "abcd", "ab", "xabcd")]
    together = ngrams.grams(texts, n=3)
    assert [len(grams) for grams in together] == [1, 0, 2, 0, 3]
    for words, grams in zip(texts, together, strict=True):
        assert np.array_equal(grams, ngrams.grams([words], n=3)[0])
    assert together[4].tolist()[1:] == together[2].tolist()  # abc, bcd
    assert len(set(together[4].tolist())) == 3
    assert ngrams.grams([[b"a", b"b", b"c"]], 3)[0] != ngrams.grams([[b"b", b"a", b"c"]], 3)[0]


def test_passage_of_13_words_is_found_and_one_of_12_is_not():
    prompt = "zero " + " ".join(ALPHABET[:14])  # 15 words
    twelve = "Say: " + ", ".join(ALPHABET[:12]).upper()
    found = compare([prompt], [("x", twelve), ("y", f"{twelve} {ALPHABET[12]}!")])
    assert (found.rows, found.prompts) == (2, 1)
    assert (found.shared_rows, found.shared_prompts) == (1, 1)
    assert (found.near_rows, found.near_prompts) == (0, 0)
    [example] = found.examples
    assert example["row"] == 2 and example["share"] == pytest.approx(1 / 3, abs=1e-3)
    assert example["passage"] == " ".join(ALPHABET[:13])


def test_short_prompt_is_found_only_as_a_whole_prompt():
    found = compare(["What is AI?"], [("What is  ai", ""), ("So, what is AI?", "what is ai")])
    assert (found.shared_rows, found.near_rows, found.near_prompts) == (1, 1, 1)
    assert found.examples == [{"row": 1, "prompt": "What is AI?", "share": 1.0, "passage": ""}]
    assert compare(["?!"], [("...", "...")]).shared_rows == 0  # no words, so nothing in common


def test_near_duplicate_has_four_fifths_of_the_ngrams():
    prompt = " ".join(f"w{i}" for i in range(17))  # 5 n-grams
    four, three = (" ".join(f"w{i}" for i in range(12 + n)) for n in (4, 3))
    found = compare([prompt], [("x", three), ("y", four), ("z", f"{four} other w1")])
    assert (found.shared_rows, found.near_rows) == (3, 2)
    assert [e["row"] for e in found.examples] == [2, 1]  # the third is no better than the second


def test_template_of_many_prompts_does_not_count():
    template = " ".join(f"w{i}" for i in range(20))
    own = [[f"{letter}{i}" for i in range(9)] for letter in ALPHABET[: heldout.COMMON + 1]]
    prompts = [f"{template} {' '.join(words)}" for words in own]
    few, most = (f"{template} {' '.join(own[0][:n])}" for n in (6, 7))
    assert compare(prompts, [("x", few)]).shared_rows == 0  # at most 6 of 13 words are its own
    found = compare(prompts, [("x", most)])
    assert (found.shared_rows, found.near_rows) == (1, 0)
    assert found.examples[0]["share"] == pytest.approx(1 / 3, abs=1e-3)  # with 7, 8 and 9
    assert found.examples[0]["passage"] == " ".join([f"w{i}" for i in range(14, 20)] + own[0][:7])
    assert compare(prompts, [("x", prompts[0])]).near_prompts == 1
    assert compare(prompts[:-1], [("x", template)]).shared_prompts == heldout.COMMON


def test_signs_make_another_prompt_and_punctuation_does_not():
    prompts = ["What is 29 - 48?", 'a "b", c.', "X # @ X"]
    rows = ["What is 29 + 48?", "What is 29-48", "A b c!", "X @ # X", "What is 2.9 - 48?"]
    found = compare(prompts, [(row, row) for row in rows])
    assert (found.prompts, found.near_rows) == (3, 2)
    assert {e["row"] for e in found.examples} == {2, 3}


def test_prompts_beyond_the_bound_are_counted_and_not_compared(monkeypatch):
    monkeypatch.setattr(heldout, "MOST_PROMPTS", 2)
    found = compare(["a", "b", "A", "c"], [("c", ""), ("b", "")])
    assert (found.prompts, found.prompts_left_out, found.near_rows) == (2, 1, 1)
    assert "1 further held-out rows were not compared" in "\n".join(found.markdown())


def test_counts_are_those_of_a_search_of_all_passages():
    """Oracle: tuples of words, each passage of each prompt looked for in each row."""
    rng = random.Random(0)

    def text(most: int) -> list[str]:
        start = rng.randrange(150)  # a book of 200 words, from which all texts are taken
        copy = [f"b{start + i}" for i in range(rng.randrange(1, most))]
        return [word if rng.random() < 0.98 else rng.choice("xyz") for word in copy]

    template = [f"b{i}" for i in range(100, 116)]
    asked = (template * (rng.random() < 0.4) + text(40) for _ in range(60))
    prompts = list(dict.fromkeys(map(" ".join, asked)))
    rows = [(" ".join(text(8)), " ".join(text(80))) for _ in range(200)]

    def passages(words: str) -> set[tuple[str, ...]]:
        split = words.split()
        return {tuple(split[i : i + 13]) for i in range(len(split) - 12)}

    owners = Counter(gram for prompt in prompts for gram in passages(prompt))
    own = []
    for prompt in prompts:
        split = prompt.split()
        known = {
            i + k
            for i in range(len(split) - 12)
            for k in range(13)
            if owners[tuple(split[i : i + 13])] > 10
        }
        kept = [i for i in range(len(split) - 12) if len(known & set(range(i, i + 13))) <= 6]
        own.append({tuple(split[i : i + 13]) for i in kept})
    assert any(len(o) < len(passages(p)) for o, p in zip(own, prompts, strict=True))
    texts = [passages(row) for _, row in rows]
    shared, near = set(), set()
    for r, (head, _) in enumerate(rows):
        for p, prompt in enumerate(prompts):
            share = len(own[p] & texts[r]) / len(own[p]) if own[p] else 0.0
            share = 1.0 if head == prompt else share
            shared |= {(r, p)} if share else set()
            near |= {(r, p)} if share >= 0.8 else set()
    found = compare(prompts, rows)
    assert 20 < len(near) < len(shared)
    assert found.shared_rows == len({r for r, _ in shared})
    assert found.shared_prompts == len({p for _, p in shared})
    assert found.near_rows == len({r for r, _ in near})
    assert found.near_prompts == len({p for _, p in near})


def on_side(text: str, held: bool) -> str:
    """The text with a number behind it that puts it on a side of a split in halves."""
    return next(p for i in range(99) if is_heldout(p := f"{text} {i}", 0.5) is held)


def test_card_counts_held_out_prompts_in_the_training_rows(tmp_path):
    long = on_side(" ".join(ALPHABET[:20]), True)
    short = next(p for i in range(99) if is_heldout(p := f"q {i}", 0.5) > is_heldout(f"{p}?", 0.5))
    row = {
        "instruction": on_side("Quote", False),
        "input": "",
        "output": f"It says: {long.upper()}",
    }
    others = [{"instruction": p, "input": "", "output": "Yes."} for p in (long, short, f"{short}?")]
    card = prepare(
        job(jsonl(tmp_path / "a.jsonl", [row, *others]), heldout_fraction=0.5),
        byte_tokenizer(), tmp_path / "a", workers=1,
    )  # fmt: skip
    found = DataCard.load(tmp_path / "a").overlap
    assert found == card.overlap and found is not None
    assert (found.prompts, found.rows) == (2, 2)
    assert (found.shared_rows, found.shared_prompts) == (2, 2)
    assert (found.near_rows, found.near_prompts) == (2, 2)
    assert {(e["row"], e["prompt"], e["share"]) for e in found.examples} == {
        (1, long, 1.0), (4, short, 1.0)
    }  # fmt: skip
    text = (tmp_path / "a" / "card.md").read_text()
    assert "| a passage of 13 words, or the whole prompt | 2 (100.0%) | 2 (100.0%) |" in text
    assert f"- row 1 has 100% of the prompt “{long}”, such as “a b c" in text


def test_card_of_documents_counts_each_once_though_they_are_cut(tmp_path):
    book = [f"w{i}" for i in range(300)]
    held = on_side(" ".join(book), True)
    copy = on_side("New: " + " ".join(book[100:200]), False)
    source = jsonl(tmp_path / "a.jsonl", [{"text": held}, {"text": copy}])
    settings = {"heldout_fraction": 0.5, "max_length": 64, "format": "text"}
    card = prepare(job(source, "pretrain", **settings), byte_tokenizer(), tmp_path / "a", workers=1)
    assert card.splits["train"].rows > 2 and card.overlap is not None
    assert (card.overlap.rows, card.overlap.prompts) == (1, 1)
    assert (card.overlap.shared_rows, card.overlap.near_rows) == (1, 0)
    assert card.overlap.examples[0]["share"] == pytest.approx(88 / 289, abs=1e-3)  # n-grams
