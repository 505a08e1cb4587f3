"""Job files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_core.errors import ConfigError, PreflightError
from rlhf_core.jobs import DPOJob, ImportModelJob, LoRA, Resources, SFTJob, parse_job
from rlhf_core.jobs.base import RenamedSetting
from rlhf_core.pipeline.presets import build_config
from rlhf_core.runtime.job_file import read_job


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0", "JSON int, but a job is an object"),
        (b"[]", "JSON list, but a job is an object"),
        (b"null", "JSON NoneType"),
        (b"[" * 99_999, "nested too deeply"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
        (b'{"algorithm": "nope"}', "algorithm: Input should be 'sft'"),
        (b'{"algorithm": ["sft"]}', "algorithm: Input should be 'sft'"),
        (b'{"algorithm": "sft", "algorithm": "data"}', "an object has a key twice"),
        (b'{"algorithm": "sft", "learning_rate": NaN}', "learning_rate: Input should be a finite"),
        (b'{"algorithm": "import_model", "seed": -1}', "greater than or equal to 0"),
        (b'{"algorithm": "import_model", "revision": "\\ud800"}', "half a character"),
    ],
)
def test_file_that_is_no_job_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_job(tmp_path / "job.json")
    assert "job.json is not a job file" in str(caught.value)
    assert "errors.pydantic.dev" not in str(caught.value)


def test_job_survives_the_way_through_its_file() -> None:
    job = ImportModelJob(source="random:llama", seed=3)
    assert parse_job(job.model_dump_json()) == job


def test_old_name_of_a_setting_is_accepted_with_a_warning() -> None:
    with pytest.warns(RenamedSetting, match="stop_seconds is now called stop_timeout"):
        assert Resources(stop_seconds=3) == Resources(stop_timeout=3)
    with pytest.warns(RenamedSetting, match="store_patience is now called store_timeout"):
        config = build_config("smoke", ["ppo.resources.store_patience=7"])
    assert config.ppo.resources is not None and config.ppo.resources.store_timeout == 7


def test_old_and_new_name_of_a_setting_are_not_taken_together() -> None:
    overrides = ["resources.stop_seconds=3", "resources.stop_timeout=4"]
    with pytest.raises(PreflightError, match="both are set: remove stop_seconds"):
        build_config("smoke", overrides)


def test_today_s_names_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    build_config("smoke", ["resources.stop_timeout=4"])
    assert not [w for w in recwarn if issubclass(w.category, RenamedSetting)]


def test_gemini_is_refused_with_what_to_use():
    with pytest.raises(ValidationError, match=r"gemini was removed.*use fsdp2"):
        Resources(strategy="gemini")


DIGESTS = {"model": "a" * 64, "data": "b" * 64}


def test_quantisation_is_part_of_a_stage_s_key_and_not_of_the_import_s() -> None:
    lora = LoRA(rank=4)
    plain = SFTJob(**DIGESTS, lora=lora)
    assert "quantization" not in plain.key_settings()  # results from before it are reused
    assert SFTJob(**DIGESTS, lora=lora, quantization="nf4").key() != plain.key()
    imports = [ImportModelJob(source="random:llama", quantization=q) for q in (None, "nf4")]
    assert imports[0].key() == imports[1].key()


def test_quantised_weights_are_neither_trained_nor_sharded() -> None:
    with pytest.raises(ValidationError, match=r"quantization is nf4, which needs lora in sft"):
        SFTJob(**DIGESTS, quantization="nf4")
    place = Resources(strategy="zero2")
    with pytest.raises(ValidationError, match=r"dpo\.resources\.strategy is zero2.*use ddp"):
        DPOJob(**DIGESTS, quantization="nf4", lora=LoRA(), resources=place)
