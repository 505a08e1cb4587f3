"""A model's own Python code runs where the job allows it, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.errors import ModelError
from rlhf_core.jobs import ImportModelJob, SFTJob
from rlhf_core.model_files import remote_code
from tests.rlhf_core.tiny_models import copy_of

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({proof!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model folder whose code leaves a proof that it ran, and the proof's path."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder, proof = copy_of("llama", tmp_path / "model"), tmp_path / "it ran"
    (folder / "own.py").write_text(CODE.format(proof=str(proof)))
    value = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps({**value, "model_type": "own", "auto_map": names})
    )
    return folder, proof


@pytest.fixture(autouse=True)
def forbidden() -> None:
    remote_code.allow(False)


def test_code_beside_a_model_does_not_run_by_itself(with_code: tuple[Path, Path]) -> None:
    from rlhf_core.models.loading import load_causal_lm

    folder, proof = with_code
    with pytest.raises(ModelError, match=r"config\.json requires Python code.*not allowed to run"):
        load_causal_lm(folder)
    assert not proof.exists()


def test_code_runs_where_the_job_allows_it(with_code: tuple[Path, Path]) -> None:
    from rlhf_core.models.loading import load_causal_lm

    folder, proof = with_code
    remote_code.allow(True)
    assert type(load_causal_lm(folder)).__name__ == "OwnModel"
    assert proof.exists()


def test_file_that_nothing_asks_for_changes_nothing(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "model")
    (folder / "notes.py").write_text("raise SystemExit")
    assert remote_code.is_trusted(folder) is False


def test_permission_is_no_part_of_a_stage_key_but_of_an_imports() -> None:
    job = SFTJob(model="0" * 64, data="1" * 64)
    assert job.trust_remote_code is False
    assert job.key() == job.model_copy(update={"trust_remote_code": True}).key()
    one, other = (ImportModelJob(source="a/b", trust_remote_code=yes) for yes in (False, True))
    assert one.key() != other.key()
