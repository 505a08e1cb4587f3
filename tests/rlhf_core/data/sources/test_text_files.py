"""Plain text files: what is a document, and where a long one is cut."""

import gzip
import io
import subprocess
import sys
import tracemalloc

import pytest

from rlhf_core.data.check import check_source
from rlhf_core.data.dataset.card import DataCard
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.prepare import prepare
from rlhf_core.data.rows.row import BadRow
from rlhf_core.data.sources.text_files import DOCUMENT_BYTES, read_text
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings
from rlhf_core.stages.new_model import texts
from tests.rlhf_core.data.helpers import byte_tokenizer, job, jsonl, prepared, trained_text


def documents(content: bytes) -> list:
    return [row.data for row in read_text(io.BytesIO(content), "a.txt")]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("One line", "One line"),
        ("A paragraph,\nwrapped.\n\nAnother.\n", "A paragraph,\nwrapped.\n\nAnother."),
        ("\ufeffWindows\r\n\r\nends\r\n", "Windows\n\nends"),
        ("\n\n  indented\n\n\n", "  indented"),
        ("早上好\n", "早上好"),
    ],
)
def test_a_file_is_one_document(content, text):
    assert documents(content.encode()) == [text]


def test_a_file_of_exactly_one_part_is_not_cut():
    assert [len(text) for text in documents(b"x" * DOCUMENT_BYTES)] == [DOCUMENT_BYTES]
    assert [len(text) for text in documents(b"x" * (DOCUMENT_BYTES + 1))] == [DOCUMENT_BYTES, 1]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_long_file_is_cut_at_the_last_empty_line_that_fits(end):
    paragraphs = [f"{i} " + "word " * 5000 + "end." for i in range(7)]  # 25 kB each
    found = documents((end * 2).join(paragraphs).encode())
    assert found == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4, 6)]


def test_without_empty_lines_it_is_cut_at_line_ends_and_never_within_a_character():
    lines = [f"{i:04} " + "y" * 94 for i in range(1000)]  # 100 bytes each with its line feed
    first, second = documents("\n".join(lines).encode())
    assert first.split("\n") == lines[:655] and second.split("\n") == lines[655:]
    for offset in range(4):
        text = "z" * offset + "\U0001f600" * (DOCUMENT_BYTES // 2)
        assert "".join(documents(text.encode())) == text


def test_a_bad_part_is_one_row_and_names_its_line():
    good = b"line\n" * 20_000  # 100 kB
    found = documents(good + b"caf\xe9\n" + good)
    [bad] = [part for part in found if isinstance(part, BadRow)]
    assert bad.message.startswith("line 20001 of the file holds a byte (0xe9)")
    assert len(found) == 4 and bad.reason == "invalid_utf8"


def read_endless() -> tuple[int, int]:
    """Rows of a file of 200 parts, and the most bytes that were allocated meanwhile."""

    class Endless(io.RawIOBase):
        left = 200 * DOCUMENT_BYTES

        def read(self, size=-1):
            size = min(size, self.left)
            self.left -= size
            return b"some words\n" * (size // 11) + b"\n" * (size % 11)

    tracemalloc.start()
    rows = sum(1 for _ in read_text(Endless(), "a.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return rows, peak


def test_a_file_of_any_size_takes_the_memory_of_one_part():
    # a process of its own: what threads of other tests allocate would count as well
    code = f"from {__name__} import read_endless; print(*read_endless())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, peak = map(int, found.stdout.split())
    assert rows >= 200 and peak < 8 * DOCUMENT_BYTES


def test_pretraining_reads_a_pattern_of_texts(tmp_path):
    (tmp_path / "b.txt").write_text("Second text.\n")
    (tmp_path / "a.txt").write_text("First,\n\nin two paragraphs.\n")
    (tmp_path / "c.md").write_text("# Third\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"Packed.\n"))
    tokenizer = byte_tokenizer()
    for source, expected in (
        ("*.txt", ["First,\n\nin two paragraphs.", "Second text."]),
        ("*", ["# Third", "First,\n\nin two paragraphs.", "Packed.", "Second text."]),
        ("a.txt", ["First,\n\nin two paragraphs."]),
        ("c.md", ["# Third"]),
    ):
        given = {"source": str(tmp_path / source), "format": "text"}
        assert check_source(DataSettings(**given), "pretrain") == []
        out = tmp_path / f"out-{source.replace('*', 'all')}"
        rows = prepared(out, given["source"], "pretrain", tokenizer, format="text")
        found = sorted(trained_text(tokenizer, row).removesuffix("<|im_end|>") for row in rows)
        assert found == expected
        assert sorted(texts(DataSettings(**given, heldout_fraction=0.0))) == expected
    alone = prepared(tmp_path / "auto", str(tmp_path / "a.txt"), "pretrain", tokenizer)
    assert len(alone) == 1 and DataCard.load(tmp_path / "auto").format == "text"


def test_a_book_in_one_file_has_a_held_out_part(tmp_path):
    book = "\n\n".join(f"Chapter {i}\n\n" + f"word{i} " * 4000 for i in range(60))
    (tmp_path / "book.txt").write_text(book)
    card = prepare(
        job(str(tmp_path / "book.txt"), "pretrain", heldout_fraction=0.3, format="text"),
        byte_tokenizer(), tmp_path / "out", workers=1,
    )  # fmt: skip
    assert card.read > 20 and card.dropped == {} and card.bad == {}
    sides = [{row["row"] for row in Rows(tmp_path / "out", side)} for side in ("train", "heldout")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(1, card.read + 1))


def test_an_empty_file_among_others_is_counted_when_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("Text.")
    (tmp_path / "b.txt").write_text("")
    source = str(tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"b\.txt, row 1: the file is empty.* on_bad_row: skip"):
        prepared(tmp_path / "out", source, "pretrain")
    assert len(prepared(tmp_path / "out", source, "pretrain", on_bad_row="skip")) == 1
    assert DataCard.load(tmp_path / "out").bad == {"no_text": 1}


def test_texts_beside_data_are_read_only_where_texts_are_asked_for(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "README.md").write_text("About the data.")
    with pytest.raises(DataError, match=r"no data file found.*only with format: text"):
        prepared(tmp_path / "out", str(folder), "pretrain")
    assert len(prepared(tmp_path / "out", str(folder), "pretrain", format="text")) == 1
    jsonl(folder / "a.jsonl", [{"text": "Data."}])
    auto = fingerprint(DataSettings(source=str(folder)))
    assert len(prepared(tmp_path / "out", str(folder), "pretrain")) == 1
    assert len(prepared(tmp_path / "out", str(folder), "pretrain", format="text")) == 2
    assert fingerprint(DataSettings(source=str(folder), format="text")) != auto
    with pytest.raises(
        DataError, match=r"README\.md: .* matches this plain text file.*narrow the pattern"
    ):
        prepared(tmp_path / "out", str(folder / "*"), "pretrain")
