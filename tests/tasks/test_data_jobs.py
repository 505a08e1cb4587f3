"""The jobs that prepare a run's data sets."""

import json

from rlhf_core.pipeline.presets import build_config
from rlhf_core.pipeline.recipe import data_sources
from tasks import data_jobs
from tasks.run import Run, StageResult

MODEL = "0" * 64


def results(jobs):
    """A digest for each job, which follows from its key as that of a result does."""
    return {
        name: StageResult(
            stage=name, digest=job.key(), kind="dataset", key=job.key(), reused=False, seconds=0
        )
        for name, job in jobs.items()
    }


def test_a_changed_source_of_a_mixture_is_prepared_alone(tmp_path, store):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "c"}))
    parts = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": 2} for name in "ab"]

    def jobs(mix=parts, **more):
        config = build_config({"preset": "smoke", "data": {"sft": {"mix": mix, **more}}})
        run = Run(config, "run-1", store)
        sources = data_jobs.source_jobs(run, MODEL)
        mixtures = data_jobs.mixture_jobs(run, MODEL, results(sources))
        return {name: job.key() for name, job in (sources | mixtures).items()}

    def changed(other):
        return {name for name, key in before.items() if other[name] != key}

    before = jobs()
    assert list(before) == ["data-sft-a", "data-sft-b", "data-prompts", "data-sft"]
    assert jobs() == before
    assert changed(jobs(max_repeats=2)) == {"data-sft"}
    heavier = [parts[0], {**parts[1], "weight": 3}]
    assert changed(jobs(heavier)) == {"data-sft"}
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "new", "completion": "c"}))
    assert changed(jobs()) == {"data-sft-b", "data-sft"}


def test_every_source_of_a_mixture_is_named_for_the_checks_before_a_run():
    mix = [{"source": "a"}, {"source": "b"}]
    config = build_config({"preset": "smoke", "data": {"sft": {"mix": mix}}})
    names = [name for _, name, _ in data_sources(config)]
    assert names == ["data.sft.mix.0", "data.sft.mix.1", "data.prompts"]
