"""What is kept of a stage's times, and what of them stays out of its artifact."""

import json

from rlhf_core.jobs import ImportModelJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.work import STEPS, work
from rlhf_core.store import open_store


def test_work_has_times_in_utc_and_the_median_throughput():
    lines = [
        {"step": n, "total": 4, "time": 100.0 + n, "loss": 1.0, "tokens_per_second": float(speed)}
        for n, speed in enumerate((10, 400, 300, 200), 1)
    ]
    assert work(0.0, 61.5, 60.123, 3, lines) == {
        "started": "1970-01-01T00:00:00.000+00:00", "ended": "1970-01-01T00:01:01.500+00:00",
        "seconds": 60.12, "ranks": 3, "gpus": 0, "device": "cpu",
        "throughput": {"tokens_per_second": 250.0},
        "steps": {"step": [1, 2, 3, 4], "time": [101.0, 102.0, 103.0, 104.0],
                  "tokens_per_second": [10.0, 400.0, 300.0, 200.0]},
    }  # fmt: skip


def test_long_stages_keep_every_nth_step_and_the_last():
    lines = [{"step": n, "time": float(n)} for n in range(1, 2 * STEPS + 2)]
    steps = work(0.0, 1.0, 1.0, 1, lines)["steps"]
    assert steps["step"][-3:] == [995, 998, 1001] and len(steps["step"]) <= STEPS


def test_artifact_is_a_function_of_what_the_job_computes(tmp_path):
    job, digests = ImportModelJob(), set()
    for attempt, speed in enumerate((10.0, 99.0)):
        store = open_store(str(tmp_path / f"store-{attempt}"))
        folder = tmp_path / str(attempt)
        context = StageContext(store=store, key=job.key(), folder=folder, worked_before=1000.0)
        result = context.scratch("result")
        (result / "config.json").write_text("{}")
        step = {"loss": 0.1 + 0.2, "rollout_seconds": speed, "pairs_per_second": speed}
        context.log_metrics(1, 1, step)
        artifact = context.publish(job, result, {"metrics": {"steps": 1, **step}})
        digests.add(artifact.digest)
        kept = json.loads(store.read_bytes(artifact.digest, "metrics.jsonl"))
        assert kept == {"step": 1, "total": 1, "loss": 0.1 + 0.2}
        assert artifact.metadata["metrics"] == {"steps": 1, "loss": 0.1 + 0.2}
        known = store.stage_work(job.key())
        assert 1000.0 < known["seconds"] < 1100.0, "with the work before a checkpoint"
        assert known["throughput"] == {"rollout_seconds": speed, "pairs_per_second": speed}
    assert len(digests) == 1
