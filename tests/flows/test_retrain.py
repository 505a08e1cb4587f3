"""A retraining on a real Prefect server, with stand-ins for the ranks."""

import pytest

from rlhf_core.jobs import BaseJob, Gates
from rlhf_core.store import open_store, registry

from .test_flow import newest_flow_run

pytestmark = pytest.mark.slow


def test_retraining_that_hacks_its_reward_passes_its_gates_and_is_not_promoted(
    prefect_server, stub, tmp_path, monkeypatch
):
    from flows.retrain import rlhf_retrain

    monkeypatch.setattr(BaseJob, "torchrun", False)  # plain processes: two seconds less each
    url = str(tmp_path / "store")
    gates = Gates(min_reward_accuracy=0, max_kl=1000, min_win_rate=0)

    def retrain(settings=""):
        here = f"store: {url}\nlauncher: {{type: local}}\n{settings}"
        rlhf_retrain(preset="smoke", settings=here, gates=gates)
        return newest_flow_run().state, registry.read_model(open_store(url), "smoke")

    state, model = retrain()
    assert state.name == "Promoted"
    assert newest_flow_run().name == "retrain-smoke"
    assert model.versions[0].run.endswith("-retrain-smoke")
    champion = model.champion
    stub(evaluate=["hacked"])
    state, model = retrain("ppo: {kl_coef: 0.3}")
    assert state.name == "RewardHacked"
    assert state.message.startswith('not promoted: the verdict is "reward hacked".')
    assert model.champion == champion
    newest = model.versions[-1]
    assert newest.state == "candidate" and '"reward hacked"' in newest.reason
    record = open_store(url).read_record("retrain/smoke.json")
    assert record["promoted"] is False
