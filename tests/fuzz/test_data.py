"""Data rows and files: no crash but the documented errors, and no row unaccounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.prepare import prepare
from rlhf_core.data.rows.detect import detect_format
from rlhf_core.data.rows.formats import Example, normalise
from rlhf_core.data.rows.purposes import PURPOSES_OF
from rlhf_core.data.rows.row import BadRow, RawRow
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings
from tests.fuzz.cases import try_cases
from tests.fuzz.rows import FORMATS, SOUND, files, spoilt, typed_tables
from tests.fuzz.values import damaged
from tests.rlhf_core.data.helpers import byte_tokenizer, job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@st.composite
def one_row(draw: st.DrawFn) -> tuple[Any, str, str]:
    format = draw(st.sampled_from(FORMATS))
    row = draw(SOUND[format])
    row = draw(spoilt(row)) if draw(st.booleans()) else row
    other = draw(st.sampled_from([format, format, *FORMATS]))
    return row, other, draw(st.sampled_from(PURPOSES_OF[other]))


def test_a_row_is_understood_or_refused_with_a_reason() -> None:
    def check(case: tuple[Any, str, str]) -> None:
        row, format, purpose = case
        try:
            columns = RawRow("a.jsonl", 1, row).columns({})
            detect_format(columns, purpose)  # type: ignore[arg-type]
            example = normalise(columns, format, purpose)  # type: ignore[arg-type]
        except BadRow as bad:
            assert bad.reason and bad.message
            assert len(bad.message) < 2000
            bad.message.encode()  # can be printed and written to the card
            return
        assert isinstance(example, Example)
        said = [m["content"] for m in example.messages]
        said += [example.text, example.chosen, example.completion]
        for text, message in zip(said, example.messages, strict=False):
            may_be_empty = message["role"] in ("tool", "system") or "tool_calls" in message
            assert text.encode() or may_be_empty
        json.dumps(example.messages, ensure_ascii=False).encode()
        for text in said[len(example.messages) :]:
            assert text is None or text.strip() or "tool_calls" in example.replies[0]

    try_cases("rows", one_row(), check)


def outcome(folder: Path, source: Path, tokenizer: Any, purpose: str, **settings: Any) -> Any:
    """The data card, or the error's text."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        prepare(job(str(source), purpose, **settings), tokenizer, folder, workers=1)
    except DataError as error:
        str(error).encode()
        assert len(str(error)) < 5000
        return str(error)
    return DataCard.load(folder)


def account(card: DataCard, folder: Path) -> None:
    """Every row is in the data set, or in the card with a reason.

    Only the pieces of a long document share a row number; those of a duplicate are dropped.
    """
    kept = [row["row"] for side in ("train", "heldout") for row in Rows(folder, side)]
    bad = [entry["row"] for entry in card.bad_rows]
    assert card.kept == len(kept)
    assert card.read + card.cut == len(kept) + sum(card.dropped.values()) + sum(card.bad.values())
    assert len(bad) == sum(card.bad.values())
    assert not {*kept} & {*bad} and len({*bad}) == len(bad)
    pieces = len(kept) - len({*kept})
    assert pieces == card.cut or (pieces < card.cut and card.dropped["duplicate"])
    assert not (folder / ".work").exists()


def test_every_row_of_a_file_is_kept_dropped_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    tokenizers = [tokenizer, byte_tokenizer("hermes")]  # refuses tools; writes them

    def check(case: tuple[tuple[str, bytes, int, str], str, float, int]) -> None:
        (name, content, count, format), purpose, heldout, which = case
        tokenizer = tokenizers[which]
        source = tmp_path / name
        source.write_bytes(content)
        settings = {"format": format, "heldout_fraction": heldout, "max_length": 60}
        skipped = outcome(tmp_path / "skip", source, tokenizer, purpose, on_bad_row="skip",
                          **settings)  # fmt: skip
        strict = outcome(tmp_path / "error", source, tokenizer, purpose, **settings)
        if isinstance(skipped, DataCard):
            assert skipped.read == count
            account(skipped, tmp_path / "skip")
        if isinstance(strict, DataCard):  # without a bad row both are the same data set
            assert isinstance(skipped, DataCard) and skipped.digest == strict.digest
            assert check_source(DataSettings(source=str(source), format=format), purpose) == []  # type: ignore[arg-type]
        elif isinstance(skipped, DataCard):
            first = skipped.bad_rows[0]
            assert f"{source}, row {first['row']}: {first['message']}" in strict

    def with_purpose(file: tuple[str, bytes, int, str]) -> Any:
        return st.tuples(
            st.just(file),
            st.sampled_from(PURPOSES_OF[file[3]]),
            st.sampled_from([0.0, 0.3]),
            st.integers(0, 1),
        )

    try_cases("files", files().flatmap(with_purpose), check)


def test_a_damaged_file_ends_in_a_data_error_or_an_account(tmp_path: Path, tokenizer: Any) -> None:
    @st.composite
    def spoilt_files(draw: st.DrawFn) -> tuple[str, bytes]:
        name, content, _, _ = draw(files())
        if draw(st.integers(0, 4)) == 0:
            name, content = draw(st.sampled_from(["a.txt", "a.md"])), draw(st.text()).encode()
        return name, draw(damaged(content))

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        source = tmp_path / name
        source.write_bytes(content)
        found = outcome(tmp_path / "out", source, tokenizer, "sft", on_bad_row="skip")
        if isinstance(found, DataCard):
            account(found, tmp_path / "out")
        else:
            assert str(source) in found or "can be used for" in found, found
        problems = check_source(DataSettings(source=str(source), on_bad_row="skip"), "sft")
        assert all(isinstance(problem, str) for problem in problems)

    try_cases("damaged files", spoilt_files(), check)


def test_parquet_columns_of_any_type_are_read_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    def check(case: tuple[bytes, int]) -> None:
        content, count = case
        source = tmp_path / "a.parquet"
        source.write_bytes(content)
        found = outcome(tmp_path / "out", source, tokenizer, "sft", on_bad_row="skip",
                        deduplicate=False)  # fmt: skip
        if isinstance(found, DataCard):
            account(found, tmp_path / "out")
            assert found.read == count
        else:
            assert str(source) in found or "can be used for" in found, found

    try_cases("parquet types", typed_tables(), check)
