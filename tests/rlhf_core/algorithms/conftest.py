"""One store with tiny models and data, shared by all training tests."""

import json
import shutil
from functools import partial

import pytest

from rlhf_core.jobs import DataJob, ImportModelJob
from tests.rlhf_core.algorithms.lora import outputs
from tests.rlhf_core.algorithms.stages import Stages, run_plan_in

WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "music", "paper")
ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "bloom")


def talk(i: int) -> tuple[str, str]:
    """A question and an answer whose lengths vary."""
    words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 5)]
    return f"Say {' '.join(words)} number {i}", " ".join(reversed(words))


@pytest.fixture(scope="session")
def prepared(once):
    """A folder with a store, made once for all workers, and the digests of what is in it."""

    def make(folder):
        stages = Stages(folder)
        models = make_models(stages)
        return {"models": models, "data": make_data(stages, models),
                "rewards": make_rewards(stages, models["llama"])}  # fmt: skip

    return once("training", make)


def make_models(stages):
    """Architecture -> digest of a tiny random model."""
    jobs = [ImportModelJob(source=f"random:{name}") for name in ARCHITECTURES]
    artifacts = stages.run(*jobs)
    return {name: a.digest for name, a in zip(ARCHITECTURES, artifacts, strict=True)}


def make_data(stages, models):
    """Purpose -> digest of a small data set for the llama."""
    rows = [talk(i) for i in range(80)]
    files = {
        "sft": [{"prompt": p, "completion": c} for p, c in rows],
        # What the reward model has to find out: answers with "yes" win.
        "preference": [{"prompt": p, "chosen": f"yes {c}", "rejected": f"no {c}"} for p, c in rows],
        "unpaired": [
            {"prompt": p, "completion": f"{'no' if i % 3 else 'yes'} {c}", "label": i % 3 == 0}
            for i, (p, c) in enumerate(rows)
        ],
        "prompts": [{"prompt": p} for p, _ in rows],
        "pretrain": [{"text": f"{p}. {c}."} for p, c in rows],
    }
    jobs = []
    for purpose, lines in files.items():
        path = stages.folder / f"{purpose}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        jobs.append(
            DataJob(purpose=purpose, source=str(path), model=models["llama"], heldout_fraction=0.2)
        )
    artifacts = stages.run(*jobs)
    return {purpose: a.digest for purpose, a in zip(files, artifacts, strict=True)}


def make_rewards(stages, model):
    """Digests of two reward models with random heads: something to optimise, at no cost."""
    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model

    source, digests = stages.store.fetch(model), []
    for seed in range(2):
        folder = stages.folder / f"random-reward-{seed}"
        folder.mkdir()
        save_scalar_model(new_scalar_model(source, seed), folder, source)
        digests.append(stages.store.publish(folder, kind="reward_model").digest)
    return digests


@pytest.fixture(scope="session")
def stages(prepared, tmp_path_factory):
    """A store of this worker's own, with what was prepared."""
    folder = tmp_path_factory.mktemp("training")
    shutil.copytree(prepared[0] / "store", folder / "store")
    return Stages(folder)


@pytest.fixture(scope="session")
def models(prepared):
    """Architecture -> digest of a tiny random model."""
    return prepared[1]["models"]


@pytest.fixture(scope="session")
def data(prepared):
    """Purpose -> digest of a small data set for the llama."""
    return prepared[1]["data"]


@pytest.fixture(scope="session")
def random_rewards(prepared):
    """Digests of two reward models with random heads."""
    return prepared[1]["rewards"]


@pytest.fixture(scope="session")
def random_reward(random_rewards):
    return random_rewards[0]


@pytest.fixture(scope="module")
def run_plan(stages, models, data, random_rewards, tmp_path_factory):
    """ranks, name -> job and what `online_ranks` is to do with it, see `run_plan_in`."""
    home = tmp_path_factory.mktemp("online")
    inputs = {models["llama"], *random_rewards, *data.values()}
    return partial(run_plan_in, stages, home, inputs)


@pytest.fixture
def own_home(stages, monkeypatch):
    """Stages that run in this process keep their files apart."""
    monkeypatch.setenv("RLHF_HOME", stages.env["RLHF_HOME"])


@pytest.fixture
def trained(monkeypatch):
    """What the trained module says just before it is exported, of each stage that runs here."""
    from rlhf_core.training.sharding import backend

    seen, export = [], backend.export

    def watched(module, weights):
        whole = getattr(module, "policy", module)
        seen.append(outputs(getattr(whole, "model", whole)))
        return export(module, weights)

    monkeypatch.setattr(backend, "export", watched)
    return seen
