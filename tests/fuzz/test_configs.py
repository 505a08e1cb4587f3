"""Configurations, overrides and job files: a checked object, or one error with every problem."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import strategies as st

from rlhf_core.errors import ConfigError, PreflightError
from rlhf_core.jobs import Job, PipelineConfig, parse_job
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import dry_run
from rlhf_core.runtime.job_file import read_job
from rlhf_core.system.machine import Machine
from tests.fuzz.cases import try_cases
from tests.fuzz.configs import (
    SETTING_PATHS,
    YAML_VALUES,
    configurations,
    settings_of,
    slugs,
    spoilt,
    yaml_values,
)
from tests.fuzz.values import damaged, texts

pytestmark = pytest.mark.slow

MACHINES = [Machine(cores=2, ram=24 << 30), Machine(gpus=8, gpu_memory=80 << 30, cores=96)]
SECONDS = 5.0


def judged(error: ConfigError) -> None:
    problems = error.problems if isinstance(error, PreflightError) else [str(error)]
    assert problems
    for problem in problems:
        assert problem.strip()
        assert len(problem) < 1000
        problem.encode()


def test_a_configuration_is_accepted_whole_or_refused_with_problems() -> None:
    def check(value: dict[Any, Any]) -> None:
        before = repr(value)
        try:
            config = build_config(value)
        except ConfigError as error:
            judged(error)
            return
        finally:
            assert repr(value) == before  # the caller's mapping is left alone
        # What is accepted can be written down and read again: as a run's record is.
        assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
        json.dumps(config.model_dump(mode="json"), allow_nan=False).encode()
        for machine in MACHINES:
            began = time.process_time()
            assert all(isinstance(problem, str) for problem in dry_run(config, machine))
            assert time.process_time() - began < SECONDS

    try_cases("configurations", configurations(), check)


def test_overrides_set_one_setting_or_are_refused() -> None:
    keys = st.one_of(
        st.sampled_from(SETTING_PATHS),
        st.lists(st.one_of(slugs, texts), min_size=1, max_size=3).map(".".join),
    )
    override = st.one_of(
        st.builds("{}={}".format, keys, yaml_values), texts, st.just("preset=../../etc/passwd")
    )

    def check(overrides: list[str]) -> None:
        try:
            build_config("smoke", overrides)
        except ConfigError as error:
            judged(error)

    try_cases("overrides", st.lists(override, min_size=1, max_size=3), check)


def test_a_settings_file_of_any_bytes_is_read_or_refused(tmp_path: Path) -> None:
    preset = Path(__file__).parents[2] / "deployments/presets/smoke.yaml"
    text = st.one_of(
        st.sampled_from(YAML_VALUES).map(lambda v: v.encode("utf-8", "surrogatepass")),
        st.sampled_from(YAML_VALUES).map(lambda v: f"sft: {v}".encode("utf-8", "surrogatepass")),
        yaml_values.map(lambda v: f"a: &a {v}\nb: *a".encode("utf-8", "surrogatepass")),
        damaged(preset.read_bytes()),
        st.binary(max_size=30),
    )
    file = tmp_path / "run.yaml"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        try:
            build_config(file)
        except ConfigError as error:
            judged(error)

    try_cases("yaml", text, check)


def test_a_job_file_is_a_job_or_refused(tmp_path: Path) -> None:
    @st.composite
    def job_files(draw: st.DrawFn) -> bytes:
        kind = draw(st.sampled_from(get_args(Job)))
        value = draw(settings_of(kind)) | {"algorithm": kind.model_fields["algorithm"].default}
        value = draw(spoilt(value)) if draw(st.booleans()) else value
        text = json.dumps(value, skipkeys=True).encode()
        return draw(damaged(text)) if draw(st.integers(0, 3)) == 0 else text

    file = tmp_path / "job.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        try:
            job = read_job(file)
        except ConfigError as error:
            str(error).encode()
            assert str(file) in str(error)
            return
        again = parse_job(job.model_dump_json())
        assert again == job
        assert again.key() == job.key()
        given = {getattr(job, name, None) for name in job.inputs()}
        assert set(job.inputs().values()) <= given | set(getattr(job, "ensemble", ()))

    try_cases("jobs", job_files(), check)
