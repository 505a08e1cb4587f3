"""Lists of stages that begin in the middle, on real ranks: reward models alone, and PPO from models
that are there already, as artifacts, folders and hub ids, and with an ensemble."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.store import Store

from .test_smoke import Pipeline, sets

pytestmark = pytest.mark.slow

SHORT = (
    "resources.ranks=1",
    "ppo={steps: 2, batch_size: 4, ppo_epochs: 1, max_new_tokens: 8, precision: fp32}",
)


# Commands one after another, as in a shell; but Prefect and torch are imported once.
COMMANDS = """
import json, sys
from flows.cli import main as cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["rlhf", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code, left.code
"""


@pytest.fixture(scope="module")
def given(prefect_server, tmp_path_factory):
    """A run of two reward models alone, and copies of its models outside of the store."""
    pipeline = Pipeline(tmp_path_factory.mktemp("stage lists"), prefect_server)
    pipeline.record, _ = pipeline.run(
        "stages=[reward]", "reward={members: 2, margin_coef: 0.5}", "resources.ranks=1", fork=True
    )
    pipeline.environment |= {"HF_HOME": str(pipeline.folder / "hub"), "HF_HUB_OFFLINE": "1"}
    digests = {k: v["digest"] for k, v in pipeline.record["stages"].items()}
    pipeline.digests = {"policy": digests["model"], "judge": digests["reward-1"]}
    for name, digest in pipeline.digests.items():
        shutil.copytree(pipeline.store.fetch(digest), pipeline.folder / name)
        fill_cache(pipeline.folder / "hub", f"someone/{name}", pipeline.folder / name)
    return pipeline


def fill_cache(home: Path, name: str, folder: Path) -> None:
    """What `hf download` leaves on a machine, so that no hub needs to be reached."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


def weights(store: Store, digest: str) -> str:
    return store.get(digest).file("model.safetensors").sha256


def test_reward_models_alone_end_with_them(given):
    stages = given.record["stages"]
    assert set(stages) == {"model", "data-prompts", "label", "reward-1", "reward-2"}
    assert given.record["state"] == "completed"
    digests = [stages[name]["digest"] for name in ("reward-1", "reward-2")]
    assert [given.store.get(digest).kind for digest in digests] == ["reward_model"] * 2
    assert weights(given.store, digests[0]) != weights(given.store, digests[1]), "two seeds"
    pairs = Rows(given.store.fetch(stages["label"]["digest"]), "train", "preference")
    assert all(row["margin"] > 0 for row in pairs), "the labeller's"


def test_ppo_goes_on_from_models_that_are_there(given):
    """The same from all three kinds of places, to the byte."""
    sources = {
        "artifact": {name: f"artifact:{digest}" for name, digest in given.digests.items()},
        "folder": {name: str(given.folder / name) for name in given.digests},
        "hub": {name: f"someone/{name}" for name in given.digests},
    }
    commands = []
    for source in sources.values():
        start_from = f"model.source={source['policy']}", f"reward_model={source['judge']}"
        commands.append(
            ["stage", "ppo", "--preset", "smoke", *sets(["stages=[ppo]", *start_from, *SHORT])]
        )
    other = f"artifact:{given.record['stages']['reward-2']['digest']}"
    both = f"reward_model=[artifact:{given.digests['judge']},{other}]"
    start_from = f"model.source=artifact:{given.digests['policy']}", both, "reward.combine=min"
    commands.append(
        ["stage", "ppo", "--preset", "smoke", *sets(["stages=[ppo]", *start_from, *SHORT])]
    )
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], cwd=given.folder,
        env=given.environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    *records, ensemble = sorted(given.records(), key=lambda record: record["started"])
    assert len(records) == 1 + len(sources)
    found = {}
    for kind, record in zip(sources, records[1:], strict=True):
        stages = record["stages"]
        assert set(stages) == {"model", "reward-model", "data-prompts", "ppo"}
        start = stages["model"]["digest"]
        assert weights(given.store, start) == weights(given.store, given.digests["policy"])
        ppo = given.store.get(stages["ppo"]["digest"])
        assert set(ppo.parents) == {
            start, stages["reward-model"]["digest"], stages["data-prompts"]["digest"]
        }  # fmt: skip
        found[kind] = weights(given.store, ppo.digest)
    assert len({*found.values(), weights(given.store, given.digests["policy"])}) == 2, found
    members = {"reward-model-1", "reward-model-2"}
    assert set(ensemble["stages"]) == {"model", *members, "data-prompts", "ppo"}
    ppo = given.store.get(ensemble["stages"]["ppo"]["digest"])
    assert {ensemble["stages"][name]["digest"] for name in members} <= set(ppo.parents)
    assert ppo.metadata["metrics"]["reward_model_std"] > 0
    assert weights(given.store, ppo.digest) not in found.values()
