"""Preflight of the slurm launcher, on what Slurm 22.05 and 24.11 say about themselves."""

import pytest

from rlhf_core.jobs import PipelineConfig, Resources
from rlhf_core.jobs.launchers import SlurmLauncher
from tasks.launchers.slurm.preflight import judge, read_facts, seconds
from tests.tasks.launchers.slurm.test_state import VERSIONS, recorded

GRES = "main|n1|gpu:h100:4(S:0-1)\nmain|n2|gpu:8,nvme:2\nmain|n3|(null)"


@pytest.fixture(params=VERSIONS)
def text(request):
    """The answers of a cluster with three nodes, of which two have GPUs."""
    said = recorded(request.param)
    config, partitions = "\n".join(said["config"]), "\n".join(said["partition"][1:3])
    return (
        f"== missing\n{config}\n== partitions\n{partitions}\n== nodes\n{GRES}\n"
        "== folder\nyes\n== store\nyes\n"
    )


def problems(text, stages=("sft",), grpo=None, **settings):
    resources = {"device": "cpu", "stop_timeout": 5} | settings.pop("resources", {})
    config = PipelineConfig(
        stages=stages,
        grpo=grpo or {},
        launcher=SlurmLauncher(**settings),
        resources=Resources(**resources),
    )
    return judge(config, "file:///shared/store", read_facts(text))


def test_nothing_is_found_where_all_fits(text):
    assert problems(text) == []
    assert problems(text, partition="main", time_limit="1:00:00", resources={"nodes": 3}) == []
    assert problems(text, resources={"nodes": 2, "ranks": 4, "device": "cuda"}) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition": "nosuch"}, "nosuch does not exist; the cluster has main, urgent"),
        ({"time_limit": "1:00:01"}, "partition main allows 01:00:00"),
        ({"time_limit": "3"}, "leaves nothing beside launcher.notice"),
        ({"resources": {"nodes": 4}}, "gives at most 3"),
        ({"resources": {"stop_timeout": 15}}, "kills processes 5 s after SIGTERM (KillWait)"),
        ({"notice": 10}, "set at least 15"),
        ({"resources": {"ranks": 8, "nodes": 2, "device": "cuda"}}, "has 1 (largest: 8)"),
    ],
)
def test_each_problem_is_named(text, settings, said):
    found = problems(text, **settings)
    assert found and all(said in problem for problem in found), found


def test_gpus_of_samplers_are_counted(text):
    def found(samplers):
        rollout = {"placement": "separate", "ranks": samplers}
        settings = {"rollout": rollout, "rewards": [{"type": "must_end"}]}
        place = {"ranks": 6, "device": "cuda"}
        return problems(text, ["grpo"], settings, resources=place)

    assert found(2) == []
    [problem] = found(3)
    assert "1 node with 9 GPUs each (6 ranks and 3 for samplers), but" in problem
    assert "has 0 (largest: 8); lower resources.ranks, rollout.ranks or nodes" in problem


def test_cluster_that_cannot_be_asked_is_one_problem(text):
    assert "no sbatch, srun" in problems(text.replace("missing\n", "missing\nsbatch\nsrun\n"))[0]
    silent = text.replace("KillWait", "Nothing")
    assert ["does not answer" in problem for problem in problems(silent)] == [True]
    assert "cannot be written" in problems(text.replace("folder\nyes", "folder"))[0]
    assert "is a folder that" in problems(text.replace("store\nyes", "store"))[0]
    closed = text.replace("AllowAccounts=ALL", "AllowAccounts=nlp,vision")
    assert "allows nlp,vision" in problems(closed, account="bio")[0]
    assert problems(closed, account="nlp") == []
    assert "it must be UP" in problems(text.replace("State=UP", "State=DRAIN"))[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("2-0", 172_800), ("1-12:30", 131_400),
        ("1-00:00:05", 86_405), ("UNLIMITED", None), (None, None),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_writes_them(text, expected):
    assert seconds(text) == expected
