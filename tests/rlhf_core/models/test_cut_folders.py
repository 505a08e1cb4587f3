"""A model folder whose weights are in several files, for all that check, measure and load it."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_core.chat.model import load_chat_model
from rlhf_core.jobs import ModelSettings, Resources, SFTSettings
from rlhf_core.model_files.cutting import cut
from rlhf_core.model_files.folder_check import check_weight_files
from rlhf_core.model_files.source_check import check_model, model_config
from rlhf_core.models.random_model import make_model, make_tokenizer
from rlhf_core.models.saving import save_in_files, stop_tokens
from rlhf_core.playground.pool import weight_bytes
from rlhf_core.preflight.memory import estimate
from rlhf_core.stages.import_model import prepare_tokenizer


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The same model whole, and cut into a file for each layer."""
    tokenizer = make_tokenizer()
    prepare_tokenizer(tokenizer, "chatml", "the test's")
    model = make_model("llama", tokenizer, seed=0)
    found = tmp_path / "whole", tmp_path / "cut"
    for folder in found:
        save_in_files(model, folder)
        tokenizer.save_pretrained(folder)
        monkeypatch.setattr("rlhf_core.models.saving.cut", lambda sizes: cut(sizes, smallest=1))
    return found


def test_cut_folder_is_read_as_the_whole_one(folders):
    whole, parts = folders
    assert len(list(whole.glob("*.safetensors"))) == 1 < len(list(parts.glob("*.safetensors")))
    assert check_weight_files(parts) == []
    assert check_model(ModelSettings(source=str(parts))) == []
    assert weight_bytes(parts) == weight_bytes(whole)
    assert stop_tokens(parts) == stop_tokens(whole)
    configs = [model_config(ModelSettings(source=str(folder))) for folder in folders]
    first, second = (estimate(c, SFTSettings(), Resources(), "sft") for c in configs)
    assert first == second
    ids = torch.tensor([[3, 4, 5, 6]])
    first, second = (load_chat_model(folder).model(ids).logits for folder in folders)
    assert torch.equal(first, second)


def test_lost_file_of_a_cut_folder_is_named(folders):
    (lost, *_) = sorted(folders[1].glob("*.safetensors"))
    lost.unlink()
    [problem, *_] = check_weight_files(folders[1])
    assert lost.name in problem and "missing" in problem
    index = json.loads((folders[1] / "model.safetensors.index.json").read_text())
    assert lost.name in index["weight_map"].values()
