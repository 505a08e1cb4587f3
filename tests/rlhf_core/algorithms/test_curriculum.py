"""A stage that climbs the levels of its prompts, on real ranks."""

import json

import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, GRPOJob, Resources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def levels(stages, models):
    """Prompts of three levels, in no order."""
    path = stages.folder / "levels.jsonl"
    rows = [{"prompt": f"Say {i}", "hard": (i * 7) % 3 * 10} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = DataJob(purpose="prompts", source=str(path), model=models["llama"],
                  heldout_fraction=0.1, curriculum="hard")  # fmt: skip
    return stages.run(job)[0].digest


@pytest.fixture
def make(models, levels):
    def made(**settings):
        values = {
            "model": models["llama"], "prompts": levels, "steps": 6, "max_new_tokens": 4,
            "rewards": [{"type": "length", "target": 4, "width": 8}], "batch_size": 4,
            "group_size": 2, "learning_rate": 1e-4, "precision": "fp32", "min_length": None,
            "missing_eos_penalty": 0.0, "resources": Resources(threads=1, device="cpu"),
            "curriculum": {"pass_rate": 0.5, "passing_score": -9.0, "window": 2},  # all pass
        }  # fmt: skip
        return GRPOJob(**(values | settings))

    return made


def test_levels_are_unlocked_one_by_one_and_their_prompts_taken(
    stages, make, levels, own_home, monkeypatch
):
    from rlhf_core.training.online import dynamic_sampling

    taken, sample = [], dynamic_sampling.sample

    def watched(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        taken.append({row["curriculum"] for row in rollout.rows})
        return rollout

    monkeypatch.setattr(dynamic_sampling, "sample", watched)
    _, lines = stages.run_here(make(), "climbs")
    numbers = [line["level"] for line in lines]
    assert numbers[0] == 1 and numbers == sorted(numbers) and numbers[-1] >= 2
    assert all(line.get("level_pass_rate", 1.0) == 1.0 for line in lines)
    known = sorted(set(Rows(stages.store.fetch(levels), "train", "prompts").levels))
    assert known == [0.0, 10.0, 20.0]
    for number, found in zip(numbers, taken, strict=True):
        assert found <= set(known[: int(number)])
    assert max(map(max, taken)) > 0.0, "also of an unlocked level"


def test_stage_that_passes_nothing_stays_at_the_first_level(stages, make, own_home):
    hard = {"pass_rate": 0.5, "passing_score": 9.0, "window": 1}
    _, lines = stages.run_here(make(curriculum=hard, steps=3), "stays")
    assert [(line["level"], line["level_pass_rate"]) for line in lines] == [(1.0, 0.0)] * 3


def test_resumed_stage_takes_the_same_prompts(stages, models, levels, make, tmp_path_factory):
    from tests.rlhf_core.algorithms.stages import run_plan_in

    home = tmp_path_factory.mktemp("curriculum")
    plan = {
        "whole": (make(), {}),
        "half": (make(), {"where": "cut", "stop_after": 3}),
        "rest": (make(), {"where": "cut"}),
    }
    runs = run_plan_in(stages, home, {models["llama"], levels}, 1, plan)
    assert "the checkpoint after step 3" in runs["half"].said
    assert runs["rest"].artifact.digest == runs["whole"].artifact.digest


def test_prompts_without_levels_are_refused(stages, make, data, own_home):
    with pytest.raises(DataError, match=r"grpo.curriculum is set, but the prompts have no levels"):
        stages.run_here(make(prompts=data["prompts"]), "no-levels")
