"""The launcher where a cluster is full, wrong or away; only `make test-cluster` runs it."""

import copy
import time

import pytest

from rlhf_core.errors import ConfigError, JobFailed
from tasks.launchers.kubernetes import api, launcher
from tests.tasks.launchers.kubernetes.conftest import Agents, nothing_is_left, wait_for

pytestmark = pytest.mark.cluster


def test_restarts_after_failures_are_bounded(run, cluster, agents):
    agents.plan = {"all": "lost"}
    with pytest.raises(JobFailed, match="lost on purpose") as caught:
        run(max_restarts=1)
    assert caught.value.category == "lost"
    assert nothing_is_left(cluster)


def test_evicted_pods_start_again_as_often_as_they_are_evicted(in_background, cluster, agents):
    agents.plan = {
        (restart, node): Agents.until_stopped for restart in (0, 1, 2) for node in (0, 1)
    }
    pipeline = in_background(max_restarts=0)
    for restart in range(3):
        pods = wait_for(
            lambda n=restart: [
                p
                for p in list(cluster.pods.values())
                if p.log
                and p.object["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] == str(n)
            ]
        )
        cluster.evict(pods[0])
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]


def test_lost_node_starts_all_pods_again(in_background, cluster, agents):
    agents.plan = {(0, 0): Agents.until_stopped, (0, 1): Agents.until_stopped}
    pipeline = in_background()
    wait_for(lambda: any(line.startswith("agent") for line in pipeline["lines"]))
    cluster.kill(next(iter(cluster.pods.values())))
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]
    assert any("exit code 137" in line for line in pipeline["lines"])


@pytest.mark.parametrize("code", [1, 127])
def test_pod_without_the_package_is_a_wrong_image(run, cluster, agents, code):
    agents.plan = {"all": lambda pod: code}
    with pytest.raises(JobFailed, match=r"launcher\.image") as caught:
        run()
    assert caught.value.category == "config"
    assert len(cluster.made) == 1


def test_ended_jobset_of_a_killed_pipeline_is_replaced(run, cluster, agents, name):
    agents.plan = {"all": "config"}
    with pytest.raises(JobFailed):
        run()
    cluster.create(copy.deepcopy(cluster.made[0]))  # a killed pipeline has left one like this
    wait_for(lambda: cluster.jobsets[name]["status"]["conditions"])
    agents.plan = {}
    outcomes, _, _ = run()
    assert outcomes
    assert nothing_is_left(cluster)


def test_queue_of_kueue_is_told_and_waited_for(in_background, cluster, name):
    pipeline = in_background(queue="train")
    uid = wait_for(lambda: cluster.jobsets.get(name))["metadata"]["uid"]
    told = "couldn't assign flavors to pod set node: insufficient unused quota for nvidia.com/gpu"
    waits = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": told}
    cluster.workloads[uid] = {"status": {"conditions": [waits]}}
    first = wait_for(lambda: [p["waiting"] for p in pipeline["progress"] if "waiting" in p])[0]
    assert first.startswith("queue train of Kueue")
    cluster.admit(name)
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]
    assert {"waiting": None} in pipeline["progress"]


def test_full_cluster_is_told_and_given_up_in_time(run, cluster):
    def full(pod):
        pod.unschedulable("0/8 nodes are available: 8 Insufficient nvidia.com/gpu.")
        return True

    cluster.before = full
    progress = []
    with pytest.raises(JobFailed, match=r"within launcher\.queue_timeout, 1 s") as caught:
        run(progress=progress, queue_timeout=1)
    assert caught.value.category == "queue"
    assert "Insufficient" in progress[0]["waiting"]
    assert nothing_is_left(cluster)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "rlhf:1"'),
        ("CreateContainerConfigError", 'secret "store-keys" not found'),
        ("InvalidImageName", "couldn't parse image name"),
    ],
)
def test_pod_that_cannot_start_is_told_in_bounded_time(run, cluster, reason, message):
    def broken(pod):
        pod.waits(reason, message)
        return True

    cluster.before = broken
    hopeless = reason == "InvalidImageName"
    with pytest.raises(JobFailed, match=f"{reason}: {message}") as caught:
        run(start_timeout=300 if hopeless else 0.5)
    assert caught.value.category == "config"
    assert nothing_is_left(cluster)


def test_missing_service_account_is_told_though_there_are_no_pods(run, cluster):
    cluster.problem = 'error looking up service account rlhf/x: serviceaccount "x" not found'
    with pytest.raises(JobFailed, match=r'FailedCreate.*serviceaccount "x" not found') as caught:
        run(start_timeout=0.3)
    assert caught.value.category == "config"


def test_api_that_is_gone_for_a_while_changes_nothing(in_background, cluster, agents):
    agents.plan = {"all": lambda pod: 0 if pod.stop.wait(1.5) else agents.work(pod)}
    pipeline = in_background()
    wait_for(lambda: any(line.startswith("agent") for line in pipeline["lines"]))
    cluster.down()
    time.sleep(0.5)
    cluster.up()
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]
    lines = [line for line in pipeline["lines"] if line.startswith("agent")]
    assert len(lines) == len(set(lines)) == 2, "no line is lost, none is told twice"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_errors_of_the_server_are_repeated(run, cluster, status):
    cluster.faults = [status, status]
    outcomes, _, _ = run()
    assert outcomes


def test_new_token_of_the_kubeconfig_file_is_taken(in_background, cluster, agents, tmp_path):
    agents.plan = {"all": lambda pod: 0 if pod.stop.wait(1.0) else agents.work(pod)}
    pipeline = in_background()
    wait_for(lambda: any(line.startswith("agent") for line in pipeline["lines"]))
    cluster.token = "second-token"
    cluster.cut()
    cluster.kubeconfig(tmp_path / "kubeconfig")
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]


def test_login_that_is_refused_is_told(run, cluster, monkeypatch):
    monkeypatch.setattr(api, "LOGIN_TIMEOUT", 0.2)
    cluster.token = "another"
    with pytest.raises(ConfigError, match="log in again"):
        run()


def test_what_is_forbidden_is_told_with_the_way_out(run, cluster):
    cluster.denied = {("create", "jobsets")}
    with pytest.raises(ConfigError, match=r"refused to make a JobSet.*docs/cluster\.md"):
        run()


def test_forbidden_look_at_pods_ends_the_stage(run, cluster, agents):
    agents.plan = {"all": Agents.until_stopped}
    cluster.denied = {("get", "pods")}
    with pytest.raises(ConfigError, match="refused to list the pods"):
        run()
    assert nothing_is_left(cluster)


def test_jobset_of_an_older_version_is_refused(run, cluster):
    cluster.unknown = "spec.failurePolicy.rules[0].onJobFailureMessagePatterns"
    with pytest.raises(ConfigError, match=r"JobSet 0\.10 or newer"):
        run()


def test_watches_that_end_or_are_too_old_are_opened_again(in_background, cluster, agents):
    agents.plan = {"all": lambda pod: 0 if pod.stop.wait(1.0) else agents.work(pod)}
    cluster.ends_watches = True
    pipeline = in_background()
    wait_for(lambda: any(line.startswith("agent") for line in pipeline["lines"]))
    cluster.oldest = cluster.version + 2  # 410 for a while
    pipeline["thread"].join(20)
    assert pipeline["outcomes"]
    watches = [query for method, _, query in cluster.requests if query.get("watch")]
    assert len(watches) > 2


def test_broken_streams_of_logs_go_on_without_gaps_and_doubles(in_background, cluster, agents):
    def talks(pod):
        for number in range(60):
            pod.print(f"line {number}")
            pod.print(f"line {number} again")  # often in the same moment
            time.sleep(0.02)
        return agents.work(pod)

    agents.plan = {(0, 0): talks}
    pipeline = in_background()
    for _ in range(4):
        time.sleep(0.3)
        cluster.cut()
    pipeline["thread"].join(20)
    told = [line for line in pipeline["lines"] if line.startswith("line")]
    assert told == [f"line {n}{text}" for n in range(60) for text in ("", " again")]


def test_jobset_that_cannot_be_deleted_is_named(run, cluster, monkeypatch):
    monkeypatch.setattr(launcher, "DELETE_TIMEOUT", 0.3)
    cluster.denied = {("delete", "jobsets")}
    outcomes, lines, _ = run()
    assert outcomes
    assert any("WARNING" in line and "kubectl delete jobset" in line for line in lines)
