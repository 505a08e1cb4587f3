"""The flow on a real Prefect server, with real torchrun jobs whose ranks are stand-ins."""

from pathlib import Path

import psutil
import pytest

from flows.cli.run import _print_summary
from rlhf_core.errors import GateFailed, JobFailed, PreflightError
from rlhf_core.jobs import BaseJob
from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import open_store, registry
from tasks import stages
from tasks.launchers import fork_client
from tests.rlhf_core.evaluation.harness.own_tasks import write_tasks

pytestmark = pytest.mark.slow
STAGES = ["model", "data-sft", "data-prompts", "sft", "label", "reward", "ppo", "evaluate",
          "publish"]  # fmt: skip


@pytest.fixture
def pipeline(prefect_server, stub, tmp_path, monkeypatch):
    """Runs the flow on a store of its own; returns its summary and the store."""
    from flows.rlhf import rlhf_pipeline

    monkeypatch.setattr(stages.TRAIN["sft"], "retry_delay_seconds", [0.0, 0.0])
    url = str(tmp_path / "store")

    def run(*overrides, until="publish"):
        config = build_config("smoke", [f"store={url}", *overrides])
        return rlhf_pipeline(config, until=until)

    run.store = open_store(url)
    run.plan = stub
    return run


def client():
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def newest_flow_run():
    from prefect.client.schemas.sorting import FlowRunSort

    return client().read_flow_runs(limit=1, sort=FlowRunSort.START_TIME_DESC)[0]


def logs_of(flow_run):
    from prefect.client.schemas.filters import LogFilter
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()  # lines are sent in the background, some time after they were said
    found = LogFilter.model_validate({"flow_run_id": {"any_": [str(flow_run.id)]}})
    return [log.message for log in client().read_logs(log_filter=found, limit=200)]


def reused(summary):
    return [name for name, result in summary["stages"].items() if result["reused"]]


@pytest.fixture
def without_torchrun(monkeypatch):
    """Plain processes for every stage: torchrun itself takes two seconds."""
    monkeypatch.setattr(BaseJob, "torchrun", False)


def test_pipeline_runs_every_stage_and_reuses_what_is_there(pipeline, tmp_path, without_torchrun):
    first = pipeline()
    assert list(first["stages"]) == STAGES
    assert reused(first) == []
    record = pipeline.store.read_record(f"runs/{first['run']}.json")
    assert (record["state"], list(record["stages"])) == ("completed", sorted(STAGES))
    assert (tmp_path / "home/published/smoke/README.md").is_file()
    assert "Verdict: not shown. PPO over SFT" in Path(first["report"]).read_text()

    fork_client.close()
    again = pipeline("name=again")
    assert reused(again) == STAGES
    # a run has it ready though no stage may ask for it
    assert any(p.name() == "rlhf forkserver" for p in psutil.Process().children())
    assert not list((tmp_path / f"home/runs/{again['run']}").glob("*/job.json"))

    changed = pipeline("ppo.kl_coef=0.3")
    assert reused(changed) == STAGES[:6]

    part = pipeline("sft.max_steps=1", until="sft")
    assert list(part["stages"]) == STAGES[:4]
    assert reused(part) == STAGES[:3]


def test_stage_trains_on_the_mixture_of_its_sources(pipeline, without_torchrun):
    parts = ", ".join(
        f"{{source: 'builtin:chatterbot', subset: {name}}}" for name in ("english", "chinese")
    )
    done = pipeline(f"data.sft={{mix: [{parts}]}}", until="sft")["stages"]
    sources = ["data-sft-chatterbot-english", "data-sft-chatterbot-chinese"]
    assert list(done) == ["model", *sources, "data-prompts", "data-sft", "sft"]
    digests = {name: stage["digest"] for name, stage in done.items()}
    mixed, trained = (pipeline.store.get(digests[name]) for name in ("data-sft", "sft"))
    assert mixed.parents == (digests["model"], *(digests[name] for name in sources))
    assert trained.parents == (digests["model"], digests["data-sft"])


def test_run_is_visible_in_prefect(pipeline, without_torchrun):
    pipeline()
    flow_run = newest_flow_run()
    assert (flow_run.name, flow_run.state.name) == ("smoke", "Completed")
    assert flow_run.parameters["config"]["ppo"]["kl_coef"] == 0.05
    messages = logs_of(flow_run)
    assert "stub runs ppo" in messages  # from the ranks, through the launcher's thread
    assert any(m.startswith("ppo: done in") for m in messages)
    mine = (a for a in client().read_artifacts() if a.flow_run_id == flow_run.id)
    artifacts = {a.key: a for a in mine}
    assert "data:image/png;base64," in artifacts["report"].data
    assert artifacts["progress-ppo"].data == 100


def test_first_numbers_of_a_stage_are_shown_as_they_are(prefect_server, monkeypatch):
    """An artifact that is made and never updated again: as with a stage of a few seconds."""
    from prefect import flow, get_run_logger

    from tasks import progress

    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.0)

    @flow
    def stage_of_one_step():
        progress.Progress("short", get_run_logger())({"step": 2, "total": 4, "loss": 0.5})

    stage_of_one_step()
    data = {a.key: a.data for a in client().read_artifacts()}
    assert data["progress-short"] == 50.0
    text = "**short**: step 2/4  loss 0.5\n\n![curves so far](data:"
    assert data["live-short"].startswith(text)


def test_lost_rank_and_out_of_memory_are_tried_again(pipeline):
    pipeline.plan(sft=["die", "oom", "ok"])
    summary = pipeline(until="sft")
    assert list(summary["stages"]) == STAGES[:4]
    messages = "\n".join(logs_of(newest_flow_run()))
    assert "rank 1 was killed by SIGKILL" in messages
    assert "attempt 2 of 3" in messages
    assert "attempt 3 of 3 in 0 s, with half the micro-batch" in messages


def test_attempts_are_bounded(pipeline):
    pipeline.plan(sft=["store"])
    with pytest.raises(JobFailed) as caught:
        pipeline(until="sft")
    assert caught.value.category == "store"
    assert "sft-3/log.txt" in str(caught.value)


def test_data_error_is_not_tried_again_and_has_no_traceback(pipeline):
    pipeline.plan(sft=["data"])
    with pytest.raises(JobFailed, match="stub ran into data"):
        pipeline()
    flow_run = newest_flow_run()
    assert flow_run.state.name == "DataError", "the stage's state reaches its pipeline"
    messages = "\n".join(logs_of(flow_run))
    assert "Traceback" not in messages
    assert "attempt 2" not in messages
    [path] = pipeline.store.list_records("runs/")
    record = pipeline.store.read_record(path)
    assert (record["state"], record["category"]) == ("failed", "data")
    assert list(record["stages"]) == sorted(STAGES[:3])


def test_preflight_problems_stop_the_run_before_anything(pipeline, tmp_path):
    with pytest.raises(PreflightError, match=r"none\.jsonl"):
        pipeline("data.sft={source: none.jsonl}")
    assert not (tmp_path / "home/runs").exists()


def test_rounds_go_on_from_the_newest_policy(pipeline, without_torchrun):
    rounds = ["stages=[sft, dpo]", "rounds=2", "data.rounds.labeller=vader"]
    done = pipeline(*rounds)["stages"]
    assert list(done) == ["model", "data-sft", "data-prompts", "sft", "label-1", "dpo-1",
                          "label-2", "dpo-2", "evaluate", "publish"]  # fmt: skip
    digest = {name: result["digest"] for name, result in done.items()}

    def parents(name):
        return list(pipeline.store.get(digest[name]).parents)

    assert parents("label-1") == [digest["sft"], digest["data-prompts"]]
    assert parents("dpo-1") == [digest["sft"], digest["label-1"]]
    assert parents("label-2") == [digest["dpo-1"], digest["data-prompts"]]
    assert parents("dpo-2") == [digest["dpo-1"], digest["label-2"]]
    assert {digest["model"], digest["sft"], digest["dpo-2"]} <= set(parents("evaluate"))
    assert digest["dpo-2"] in parents("publish")


def test_rounds_of_ppo_go_on_from_the_last_policy_and_keep_every_rounds_artifacts(
    pipeline, without_torchrun
):
    done = pipeline("rounds=2")["stages"]
    assert list(done) == ["model", "data-sft", "data-prompts", "sft", "label", "reward", "ppo-1",
                          "ppo-2", "evaluate", "publish"]  # fmt: skip
    digest = {name: result["digest"] for name, result in done.items()}
    first, second = (pipeline.store.get(digest[name]) for name in ("ppo-1", "ppo-2"))
    shared = {digest["reward"], digest["data-prompts"]}
    assert set(first.parents) == {digest["sft"], *shared}
    assert set(second.parents) == {first.digest, *shared}
    assert second.metadata["job"]["seed"] == first.metadata["job"]["seed"] + 1, "other prompts"


def test_rejection_sampling_samples_from_the_newest_policy_in_each_round(
    pipeline, without_torchrun
):
    done = pipeline("stages=[sft, reward, rejection_sampling]", "rounds=2")["stages"]
    sampled = ["best_of_n-1", "rejection_sampling-1", "best_of_n-2", "rejection_sampling-2"]
    assert list(done)[-6:] == [*sampled, "evaluate", "publish"]
    digest = {name: result["digest"] for name, result in done.items()}

    def parents(name):
        return set(pipeline.store.get(digest[name]).parents)

    shared = {digest["reward"], digest["data-prompts"]}
    assert parents("best_of_n-1") == {digest["sft"], *shared}
    assert parents("rejection_sampling-1") == {digest["sft"], digest["best_of_n-1"]}
    assert parents("best_of_n-2") == {digest["rejection_sampling-1"], *shared}
    assert parents("rejection_sampling-2") == {
        digest["rejection_sampling-1"], digest["best_of_n-2"]
    }  # fmt: skip


def test_benchmarks_come_before_publishing_and_count_in_what_is_published(
    pipeline, tmp_path, monkeypatch, without_torchrun
):
    plain = pipeline()["stages"]["publish"]["digest"]
    monkeypatch.setattr("rlhf_core.evaluation.harness.tasks.check_tasks", lambda settings: [])
    own = write_tasks(tmp_path / "own")
    asked = [f"lm_eval={{tasks: [own_choice], include_path: {own}}}"]
    summary = pipeline(*asked)
    done = summary["stages"]
    assert list(done) == [*STAGES[:-1], "lm_eval", "publish"]
    assert reused(summary) == STAGES[:-1]
    assert done["publish"]["digest"] != plain
    made = pipeline.store.get(done["lm_eval"]["digest"])
    compared = ("model", "ppo", "data-sft", "data-prompts", "label")  # and the training data
    assert set(made.parents) == {done[name]["digest"] for name in compared}
    assert "| own\\_choice | acc |" in Path(summary["report"]).read_text()
    assert "| own\\_choice | acc |" in (tmp_path / "home/published/smoke/README.md").read_text()

    again = pipeline(*asked, "lm_eval.resources.ranks=1")
    assert reused(again) == list(done)
    with (own / "data/choice.jsonl").open("a") as file:
        file.write("\n")
    changed = pipeline(*asked, until="lm_eval")
    assert list(changed["stages"]) == list(done)[:-1]
    assert "lm_eval" not in reused(changed)


def test_failed_gate_ends_the_run_and_another_bound_goes_on(pipeline, without_torchrun):
    with pytest.raises(GateFailed, match=r"win on 0.74 of 128 prompts.*evaluate.min_win_rate"):
        pipeline("evaluate.min_win_rate=0.9")
    [path] = pipeline.store.list_records("runs/")
    record = pipeline.store.read_record(path)
    assert (record["state"], record["category"]) == ("failed", "gate")
    assert "publish" not in record["stages"] and "candidate" in record["stages"]
    assert [v.state for v in registry.read_model(pipeline.store, "smoke").versions] == ["candidate"]
    again = pipeline("evaluate.min_win_rate=0.7")
    assert reused(again) == STAGES  # the candidate is what is published
    assert [v.state for v in registry.read_model(pipeline.store, "smoke").versions] == ["champion"]


def states_of(store):
    return [v.state for v in registry.read_model(store, "smoke").versions]


def test_run_that_hacks_its_reward_says_so_and_is_not_promoted(pipeline, without_torchrun, capsys):
    pipeline.plan(evaluate=["hacked"])
    summary = pipeline()
    assert list(summary["stages"]) == [*STAGES[:-1], "candidate"]
    state = newest_flow_run().state
    assert (state.type.value, state.name) == ("COMPLETED", "RewardHacked")
    assert state.message.startswith(
        'version 1 of smoke is a candidate, not promoted: the verdict is "reward hacked". '
    )
    assert '97% of the replies begin with "i love a"' in state.message
    assert "rlhf models promote smoke 1" in state.message
    report = Path(summary["report"]).read_text()
    assert "Verdict: **reward hacked**." in report
    assert "a candidate and not the champion: not promoted" in report
    [version] = registry.read_model(pipeline.store, "smoke").versions
    assert version.state == "candidate" and "reward hacked" in version.reason
    record = pipeline.store.read_record(f"runs/{summary['run']}.json")
    assert (record["state"], record["verdict"]) == ("completed", "reward hacked")
    capsys.readouterr()
    _print_summary(build_config("smoke"), summary, took=1.0)
    said = capsys.readouterr().out
    assert "\n  verdict   reward hacked: PPO over SFT: " in said
    assert "\n  version   1 of smoke, a candidate, not promoted: the verdict is" in said
    assert "\n  promote   rlhf models promote smoke 1" in said
    assert f"\n  chat      rlhf chat {version.digest[:12]}\n" in said

    with pytest.raises(GateFailed, match=r'min_win_rate.* The verdict is "reward hacked"\.'):
        pipeline("evaluate.min_win_rate=0.9")
    pipeline("publish.promote=always")
    assert states_of(pipeline.store) == ["champion"]
    assert newest_flow_run().state.name == "RewardHacked", "it is what it is"


def test_later_run_is_no_champion_by_being_last(pipeline, without_torchrun):
    first = pipeline()["version"]
    assert (first["state"], first["reason"]) == ("champion", "the first champion")
    assert pipeline("name=again")["version"] == first, "the champion keeps its place"
    summary = pipeline("ppo.kl_coef=0.3", "evaluate.against_champion=false")
    assert list(summary["stages"]) == [*STAGES[:-1], "candidate"]
    state = newest_flow_run().state
    assert (state.type.value, state.name) == ("COMPLETED", "NotPromoted")
    assert "not compared with the champion; evaluate.against_champion=true" in state.message
    assert states_of(pipeline.store) == ["champion", "candidate"]
    again = pipeline("ppo.kl_coef=0.3", "publish.promote=always")
    assert "compare" not in again["stages"], "nothing depends on it"
    assert states_of(pipeline.store) == ["archived", "champion"]


def test_challenger_is_compared_with_the_champion(pipeline, without_torchrun):
    first = pipeline()["stages"]
    assert list(first) == STAGES, "there is no champion yet"
    summary = pipeline("ppo.kl_coef=0.3")
    done = summary["stages"]
    assert list(done) == [*STAGES[:-1], "compare", "candidate"], "its judge labelled the pairs"
    assert "no gain over the champion is shown" in summary["version"]["reason"]
    compared = pipeline.store.get(done["compare"]["digest"])
    job = compared.metadata["job"]
    assert (job["sft"], job["policy"]) == (first["ppo"]["digest"], done["ppo"]["digest"])
    assert (
        job["prompts"] == pipeline.store.get(done["evaluate"]["digest"]).metadata["job"]["prompts"]
    )
    report = Path(summary["report"]).read_text()
    assert "## Champion and challenger" in report and "PPO's reply beats champion's on" in report
    with pytest.raises(GateFailed, match=r"win against the champion on 0.74 of 128 prompts"):
        pipeline("evaluate.against_champion=true", "evaluate.min_win_rate=0.9", "ppo.kl_coef=0.4")
    summary = pipeline("evaluate.min_win_rate=0.7", "ppo.kl_coef=0.3")
    assert summary["version"]["state"] == "champion", "the user's own bound"


def test_last_stage_that_the_run_does_not_have_is_refused(pipeline):
    with pytest.raises(PreflightError, match="until is ppo, but this run has no such stage"):
        pipeline("stages=[sft]", until="ppo")
