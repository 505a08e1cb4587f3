"""Mixtures of prepared data sets."""

import itertools
from pathlib import Path

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.split import is_heldout
from rlhf_core.data.mix import ELSEWHERE, mix
from rlhf_core.data.prepare import prepare
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, DataSettings, MixedData, MixJob
from rlhf_core.training.batching import batch_rows, steps_in
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl

DIGEST = "0" * 64


def mixed(
    tmp_path: Path, sources: dict[str, list], purpose="sft", parts=None, settings=None, **job_
):
    """Prepare the rows of each source with its settings, and mix them with their parts."""
    tokenizer, folders, given = byte_tokenizer(), [], []
    tmp_path.mkdir(exist_ok=True)
    for name, rows in sources.items():
        source = jsonl(tmp_path / f"{name}.jsonl", rows)
        folders.append(tmp_path / f"prepared-{name}")
        own = {"heldout_fraction": 0.25, **(settings or {}).get(name, {})}
        prepare(job(source, purpose, **own), tokenizer, folders[-1], workers=1)
        given.append(MixedData(name=name, data=DIGEST, **(parts or {}).get(name, {})))
    made = MixJob(purpose=purpose, model=DIGEST, mix=tuple(given), **job_)
    mix(made, folders, tokenizer, tmp_path / "mixed")
    return tmp_path / "mixed"


def talk(name, count, **columns):
    return [{"prompt": f"{name} {i}", "completion": f"Yes {i}", **columns} for i in range(count)]


def test_rows_have_their_source_and_the_card_accounts_for_each(tmp_path):
    bad = [{"prompt": "x", "completion": ""}, {"prompt": "y" * 99, "completion": "long"}]
    folder = mixed(
        tmp_path, {"a": [*talk("a", 20), *talk("a", 1), *bad], "b": talk("b", 40)},
        parts={"a": {"weight": 1}, "b": {"weight": 2}},
        settings={"a": {"on_bad_row": "skip", "max_length": 64}},
    )  # fmt: skip
    card, train = DataCard.load(folder), Rows(folder, "train", "sft")
    a, b = card.mixture.sources
    assert (a.read, a.dropped, a.bad) == (23, {"duplicate": 1, "too_long": 1}, {"no_text": 1})
    assert a.train + a.heldout == 20 and b.train + b.heldout == b.read == 40
    assert (card.read, card.kept, card.format) == (63, 60, "mixture")
    assert a.tokens + b.tokens == sum(side.tokens for side in card.splits.values())
    assert {name: len(rows) for name, rows in train.sources.items()} == {"a": a.train, "b": b.train}
    assert all(row["prompt"].startswith(row["source"]) for row in train)
    assert [is_heldout(row["prompt"], 0.25) for row in train] == [False] * len(train)
    first = [row["source"] for row in train.take(range(len(train) // 2))]
    assert abs(first.count("a") - a.train / 2) <= 1, "the first rows are a fair sample"
    assert card.overlap.prompts == card.splits["heldout"].prompts
    assert "weight 2" in (folder / "card.md").read_text()


def test_a_row_that_holds_a_heldout_prompt_names_its_source(tmp_path):
    asked = (" ".join(f"{letter}{n}" for letter in "abcdefghijklmn") for n in range(100))
    heldout = next(text for text in asked if is_heldout(text, 0.25))
    plain = next(f"b {n}" for n in range(100) if not is_heldout(f"b {n}", 0.25))
    first, second = (
        {"prompt": heldout, "completion": "No"},
        {"prompt": plain, "completion": heldout},
    )
    folder = mixed(tmp_path, {"a": [*talk("a", 20), first], "b": [*talk("c", 20), second]})
    [example] = DataCard.load(folder).overlap.examples
    assert (example["source"], example["row"]) == ("b", 21)
    assert "- row 21 of b has 100%" in (folder / "card.md").read_text()


def test_a_row_of_an_earlier_source_is_dropped_and_counted(tmp_path):
    sources = {"a": talk("a", 20), "b": [*talk("a", 5), *talk("b", 20)]}
    card = DataCard.load(mixed(tmp_path, sources))
    assert card.mixture.sources[1].dropped == card.dropped == {ELSEWHERE: 5}


def test_documents_that_begin_alike_are_other_documents(tmp_path):
    head, end = "Licence: " + "as is, " * 40, "Hello, how are you? " * 20 + "Yes."
    a = [{"text": f"{head} a {i}. {end}"} for i in range(30)]
    b = [{"text": f"b {i}. {end}"} for i in range(30)]
    card = DataCard.load(
        mixed(tmp_path, {"a": a, "b": [*b, a[0]]}, "pretrain", settings={
            name: {"max_length": 64} for name in "ab"
        })
    )  # fmt: skip
    cut = card.mixture.sources[0].train + card.mixture.sources[0].heldout
    assert card.dropped == {ELSEWHERE: cut // 30}, "the pieces of one document"
    assert card.splits["heldout"].rows > 0 < card.splits["train"].rows


ROWS = {
    "preference": lambda i, tag: {"prompt": f"{tag} {i}", "chosen": "Yes", "rejected": f"No {tag}"},
    "unpaired": lambda i, tag: {"prompt": f"{tag} {i}", "completion": "Yes", "label": i % 2 == 0},
    "prompts": lambda i, tag: {"prompt": f"{tag} {i}"},
    "pretrain": lambda i, tag: {"text": f"{tag} {i}. Hello, how are you?"},
}


@pytest.mark.parametrize("purpose", ROWS)
def test_every_purpose_can_be_mixed(tmp_path, purpose):
    row = ROWS[purpose]
    a = [row(i, "a") for i in range(12)]
    b = [*a[:3], *(row(i, "b") for i in range(24))]
    folder = mixed(tmp_path, {"a": a, "b": b}, purpose, parts={"a": {"rows": 4}, "b": {"rows": 8}})
    card, train = DataCard.load(folder), Rows(folder, "train", purpose)
    assert card.dropped == {ELSEWHERE: 3} and card.kept == 36
    assert train.sampling.counts == (4, 8)
    assert steps_in(train, 4, 2, None) == 6
    seen = [train[n]["source"] for n in batch_rows(train, 4, 1, 0)]
    assert sorted(seen) in (["a", "a", "b", "b"], ["a", "b", "b", "b"])


def test_answers_of_prompts_and_margins_of_pairs(tmp_path):
    answered = [{"prompt": f"a {i}", "answer": i} for i in range(9)]
    columns = {"a": {"columns": {"answer": "answer"}}}
    sources = {"a": answered, "b": [{"prompt": f"b {i}"} for i in range(9)]}
    folder = mixed(tmp_path / "p", sources, "prompts", settings=columns)
    assert all((row["answer"] != "") == (row["source"] == "a") for row in Rows(folder, "train"))
    pairs = {tag: [{**ROWS["preference"](i, tag), "m": 1} for i in range(9)] for tag in "ab"}
    with pytest.raises(DataError, match="a has the column margin and b has none"):
        settings = {"a": {"columns": {"margin": "m"}}, "b": {"ignore_columns": ("m",)}}
        mixed(tmp_path / "m", pairs, "preference", settings=settings)


def test_a_source_without_a_row_of_its_own_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b \(.*b.jsonl\): no row is left to train on; all of"):
        mixed(tmp_path, {"a": talk("a", 20), "b": talk("a", 20)})


def test_a_source_may_keep_its_duplicates(tmp_path):
    parts = {"b": {"deduplicate": False}}
    card = DataCard.load(mixed(tmp_path, {"a": talk("a", 9), "b": talk("a", 9)}, parts=parts))
    assert card.kept == 18 and not card.dropped


def test_curriculum_of_one_data_set_and_of_a_mixture(tmp_path):
    rows = [{**row, "hard": str(i % 7 / 2)} for i, row in enumerate(talk("a", 30))]
    other = [{**row, "level": i % 5} for i, row in enumerate(talk("b", 30))]
    settings = {"a": {"curriculum": "hard"}, "b": {"curriculum": "level"}}
    folder = mixed(tmp_path, {"a": rows, "b": other}, settings=settings)
    for place in (folder, tmp_path / "prepared-a"):
        train = Rows(place, "train", "sft")
        steps = range(steps_in(train, 4, 1, None))
        order = itertools.chain.from_iterable(batch_rows(train, 4, step, 0) for step in steps)
        numbers = [train[n]["curriculum"] for n in order]
        assert numbers == sorted(numbers) and len(set(numbers)) > 4
    with pytest.raises(DataError, match=r"no column 'hard' .*; correct the setting curriculum"):
        prepare(job(str(tmp_path / "b.jsonl"), curriculum="hard"), byte_tokenizer(), tmp_path / "x")
    early = jsonl(tmp_path / "d.jsonl", [{**rows[0], "hard": None}])
    [problem] = check_source(DataSettings(source=early, curriculum="hard"), "sft")
    assert "row 1: the column of the setting curriculum holds None; expected a number" in problem
    jsonl(tmp_path / "c.jsonl", [*rows, {**rows[0], "hard": "very"}])
    with pytest.raises(
        DataError, match="row 31: the column of the setting curriculum holds 'very'"
    ):
        prepare(job(str(tmp_path / "c.jsonl"), curriculum="hard"), byte_tokenizer(), tmp_path / "x")


def test_jobs_without_a_curriculum_keep_their_keys():
    plain = DataJob(purpose="sft", model="a" * 64)
    assert "curriculum" not in plain.key_settings()
    assert DataJob(purpose="sft", model="a" * 64, curriculum="d").key() != plain.key()
