"""Models made from nothing: the tokenizer, and the folder that everybody can open."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.split import is_heldout
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.data.prepare import prepare
from rlhf_core.errors import DataError
from rlhf_core.jobs import (
    DataJob,
    DataSettings,
    MixSource,
    Mixture,
    NewModelJob,
    NewModelSettings,
)
from rlhf_core.model_files.folder_check import check_weight_files
from rlhf_core.model_files.shape import read_shape
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.new_model import run, texts, train_tokenizer
from rlhf_core.store import Artifact, open_store

SMALL = {"hidden_size": 16, "layers": 2, "heads": 2, "vocabulary": 320, "max_length": 64}
LINES = [f"The river number {i} runs down to the sea. 河流" for i in range(50)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))


def text_file(folder: Path, rows: list[dict[str, object]] | None = None) -> DataSettings:
    folder.mkdir(exist_ok=True)
    rows = [{"text": line} for line in LINES] if rows is None else rows
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(source=str(folder / "text.jsonl"))


def make(base: Path, job: NewModelJob) -> tuple[Artifact, Path]:
    store = open_store(f"file://{base}/store")
    work = Path(tempfile.mkdtemp(dir=base))
    artifact = run(job, StageContext(store=store, key=job.key(), folder=work))
    return artifact, store.fetch(artifact.digest, work / "fetched")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_new_model_opens_without_this_project(tmp_path: Path, architecture: str, tie: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = NewModelJob(
        **SMALL, architecture=architecture, tie_embeddings=tie, text=text_file(tmp_path)
    )
    artifact, folder = make(tmp_path, job)
    assert artifact.kind == "model" and check_weight_files(folder) == []
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == ends
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 2)
    assert config.max_position_embeddings == 64
    assert config.vocab_size == len(tokenizer) == 320
    assert config.tie_word_embeddings is tie
    known = read_shape(json.loads((folder / "config.json").read_text()))
    assert artifact.metadata["parameters"] == model.num_parameters() == known.parameters
    assert artifact.metadata["source"] == f"new:{architecture}"
    assert artifact.metadata["context_length"] == 64
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )["input_ids"]  # fmt: skip
    assert torch.isfinite(model(ids).logits).all()


def test_new_model_repeats_bit_for_bit_and_follows_seed_and_text(tmp_path: Path) -> None:
    job = NewModelJob(**SMALL, text=text_file(tmp_path))
    (tmp_path / "b").mkdir()
    first, again = make(tmp_path, job)[0], make(tmp_path / "b", job)[0]
    assert first.digest == again.digest
    other = make(tmp_path, job.model_copy(update={"seed": 1}))[0]
    assert other.file("tokenizer.json") == first.file("tokenizer.json")
    assert other.file("model.safetensors") != first.file("model.safetensors")
    rows: list[dict[str, object]] = [{"text": "quite another text " * 9}]
    elsewhere = job.model_copy(update={"text": text_file(tmp_path / "c", rows)})
    assert make(tmp_path, elsewhere)[0].file("tokenizer.json") != first.file("tokenizer.json")


def test_new_model_prepares_data_and_plain_text_ends_with_end_of_text(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    _, folder = make(tmp_path, NewModelJob(**SMALL, text=text))
    job = DataJob(purpose="pretrain", model="0" * 64, **text.model_dump())
    tokenizer = load_tokenizer(folder)
    prepare(job, tokenizer, tmp_path / "out", workers=1)
    row = Rows(tmp_path / "out", "train", "pretrain")[0]
    assert tokenizer.decode(row["input_ids"]).endswith(" 河流<|endoftext|>")
    assert all(row["trainable"])


@cache
def tokenizer():
    return train_tokenizer(iter(LINES), NewModelSettings(**SMALL))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=80))
def test_tokenizer_reads_back_any_text(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_tokenizer_joins_what_is_frequent() -> None:
    assert len(tokenizer()) == 320
    ids = tokenizer()(" river")["input_ids"]
    assert len(ids) == 1 and len(tokenizer()(" zqxjv")["input_ids"]) == 6


def test_short_text_gives_fewer_tokens_and_a_model_of_their_number(tmp_path: Path, capsys) -> None:
    rows: list[dict[str, object]] = [{"text": "aaa"}]
    job = NewModelJob(**(SMALL | {"vocabulary": 5000}), text=text_file(tmp_path, rows))
    artifact, _ = make(tmp_path, job)
    assert artifact.metadata["vocab_size"] == 262  # bytes, special tokens, "aa" and "aaa"
    assert "gave 262 tokens instead of 5,000" in capsys.readouterr().out


def test_heldout_text_is_not_in_the_tokenizer(tmp_path: Path) -> None:
    source = text_file(tmp_path)
    used = list(texts(source.model_copy(update={"heldout_fraction": 0.5})))
    assert used == [line for line in LINES if not is_heldout(line, 0.5)]
    assert 5 < len(used) < 45


def test_conversations_give_their_messages(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Hello", "completion": "Yes"}]
    source = text_file(tmp_path, rows).model_copy(update={"heldout_fraction": 0.0})
    assert list(texts(source)) == ["Hello", "Yes"]


def test_tokenizer_is_made_of_every_source_of_a_mixture(tmp_path: Path) -> None:
    words = {"a": " river" * 9, "b": " stone" * 9}
    files = {n: text_file(tmp_path / n, [{"text": word}]).source for n, word in words.items()}
    parts = tuple(
        MixSource(source=file, name=name, heldout_fraction=0.0) for name, file in files.items()
    )
    text = Mixture(mix=parts)
    job = NewModelJob(**SMALL, text=text, fingerprint=fingerprint(text))
    _, folder = make(tmp_path, job)
    ids = load_tokenizer(folder)(list(words.values()))["input_ids"]
    assert [len(row) for row in ids] == [9, 9]
    text_file(tmp_path / "b", [{"text": "new"}])
    assert fingerprint(text) != job.fingerprint
    with pytest.raises(DataError, match=r"b/text.jsonl changed after this run was started"):
        make(tmp_path, job)


def test_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    bad = text_file(tmp_path, [{"text": "fine"}, {"text": 3}])
    with pytest.raises(DataError, match=r"row 2: column 'text' holds a int.*on_bad_row"):
        make(tmp_path, NewModelJob(**SMALL, text=bad))
    with pytest.raises(DataError, match="no row is left to make a tokenizer from; 1 were read"):
        heldout = text_file(tmp_path, [{"text": "a"}]).model_copy(update={"heldout_fraction": 1.0})
        make(tmp_path, NewModelJob(**SMALL, text=heldout))
    with pytest.raises(DataError, match="changed after this run was started"):
        make(tmp_path, NewModelJob(**SMALL, text=text_file(tmp_path), fingerprint="local:1"))
    with pytest.raises(DataError, match="not for pretrain"):
        make(tmp_path, NewModelJob(**SMALL, text=text_file(tmp_path, [{"prompt": "a"}])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 15}, "hidden_size is 15, but must be an even multiple"),
        ({"hidden_size": 6}, "even multiple of heads, which is 2: use 8"),
        ({"vocabulary": 259}, "greater than or equal to 260"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NewModelSettings(**(SMALL | changes))
