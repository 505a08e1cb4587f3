"""On-policy distillation on real ranks: the student comes nearer to the teacher, on any ranks."""

import numpy as np
import pytest

from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import ModelError
from rlhf_core.jobs import LoRA, Resources
from rlhf_core.jobs.distillation import DistillJob, ImportTeacherJob
from rlhf_core.stages.vocabulary import check_same_vocabulary

pytestmark = pytest.mark.slow

LEARNS = {"steps": 12, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def teacher(stages, models):
    """Another random model, as the run imports it: compared with the base model's vocabulary."""
    job = ImportTeacherJob(source="random:llama", seed=9, model=models["llama"])
    return stages.run(job)[0].digest


@pytest.fixture(scope="module")
def make(models, data, teacher):
    def made(strategy="ddp", checkpoint_every=1000, **settings):
        place = {"micro_batch_size": 4, "threads": 1, "strategy": strategy, "device": "cpu",
                 "checkpoint_every": checkpoint_every}  # fmt: skip
        values = {
            "model": models["llama"], "teacher": teacher, "prompts": data["prompts"], "steps": 3,
            "max_new_tokens": 6, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32",
            "schedule": "constant", "warmup_fraction": 0.0, "resources": Resources(**place),
            "eval_prompts": 7,
        }  # fmt: skip
        return DistillJob(**(values | settings))

    return made


@pytest.fixture(scope="module")
def run_with_teacher(stages, models, data, teacher, tmp_path_factory):
    from functools import partial

    from tests.rlhf_core.algorithms.stages import run_plan_in

    home = tmp_path_factory.mktemp("distill")
    return partial(run_plan_in, stages, home, {models["llama"], teacher, *data.values()})


@pytest.fixture(scope="module")
def one(run_with_teacher, make):
    plan = {
        "distill": (make(), {}),
        "learns-0.5": (make(beta=0.5, **LEARNS), {}),
        "half": (make(eval_every=2), {"where": "cut", "stop_after": 2}),
        "rest": (make(eval_every=2), {"where": "cut"}),
        "whole": (make(eval_every=2), {}),
    }
    return run_with_teacher(1, plan)


@pytest.fixture(scope="module")
def others(run_with_teacher, make):
    """Other divergences, and adapters."""
    plan = {f"learns-{beta:g}": (make(beta=beta, **LEARNS), {}) for beta in (0.0, 1.0)}
    return run_with_teacher(1, {**plan, "lora": (make(lora=LoRA(rank=2, alpha=8), **LEARNS), {})})


@pytest.fixture(scope="module")
def two(run_with_teacher, make):
    return run_with_teacher(2, {kind: (make(kind), {}) for kind in ("ddp", "zero2", "fsdp2")})


def test_student_comes_nearer_to_its_teacher(one):
    assert_nearer(one["learns-0.5"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["learns-0", "learns-1", "lora"])
def test_student_comes_nearer_by_other_divergences_and_with_adapters(others, name):
    assert_nearer(others[name])


def assert_nearer(run):
    losses = [line["loss"] for line in run.metrics]
    assert losses[-1] < 0.8 * losses[0], losses
    heldout = run.artifact.metadata["metrics"]["heldout_loss"]
    assert heldout < 0.85 * losses[0], "on prompts that it was not trained on"


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2"])
def test_two_ranks_compute_what_one_does(one, two, kind):
    for line, other in zip(two[kind].metrics, one["distill"].metrics, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(line[name], value, 1e-4, 1e-4, err_msg=name)
    others = one["distill"].weights()
    for name, value in two[kind].weights().items():
        np.testing.assert_allclose(value, others[name], atol=2e-5, err_msg=name)


def test_resumed_run_ends_in_the_same_artifact(one):
    assert "the checkpoint after step 2" in one["half"].said
    assert one["rest"].artifact.digest == one["whole"].artifact.digest


def test_teacher_itself_has_nothing_to_learn(stages, make, teacher, own_home):
    """A model that is its own teacher: no divergence, and no gradient but rounding."""
    _, lines = stages.run_here(make(model=teacher, steps=1), "own-teacher")
    assert lines[0]["loss"] < 1e-6 and lines[0]["grad_norm"] < 1e-4


def test_teacher_with_another_vocabulary_is_refused(stages, models):
    vocabulary = load_tokenizer(stages.store.fetch(models["llama"])).get_vocab()
    check_same_vocabulary(vocabulary, {**vocabulary, "more": 10**6}, "the teacher t", "advice")
    first = next(iter(vocabulary))
    other = {**vocabulary, first: -1}
    with pytest.raises(ModelError, match=r"teacher t reads another vocabulary .*: 1 of .*; adv"):
        check_same_vocabulary(vocabulary, other, "the teacher t", "advice")
