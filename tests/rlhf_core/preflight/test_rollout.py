"""The choice of what replies are sampled with: settings, keys, refusals. vLLM need not be there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_core.errors import ConfigError, TrainingFailure
from rlhf_core.jobs import (
    BaseJob,
    BuiltinRollout,
    GRPOJob,
    PipelineConfig,
    PPOJob,
    ReinforcePPJob,
    Resources,
    RLOOJob,
    RolloutCorrection,
    VllmRollout,
    WorkPoolLauncher,
    parse_job,
)
from rlhf_core.jobs.launchers import KubernetesLauncher, SlurmLauncher
from rlhf_core.jobs.online import LATER
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import check, dry_run
from rlhf_core.preflight.memory import GIB, estimate
from rlhf_core.preflight.rollout import check_engine_memory
from rlhf_core.rollout.limits import path_remark, rollout_problems, version_problem
from rlhf_core.system.machine import Machine
from rlhf_core.training.online.experience import assert_same_policy
from tests import forked
from tests.rlhf_core.preflight.test_memory import LLAMA_7B

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}
CPU = Machine(cores=2, ram=24 * GIB)
GPUS = Machine(gpus=8, gpu_memory=80 * GIB, cores=96, ram=2048 * GIB)


@pytest.mark.parametrize("kind", [PPOJob, GRPOJob, RLOOJob, ReinforcePPJob])
def test_what_was_added_leaves_the_key_as_it_was(kind: type[BaseJob]) -> None:
    job = kind(**DIGESTS)
    before = job.model_dump(mode="json", exclude={"resources", "trust_remote_code"})
    evaluations = ("eval_every", "patience", "select")
    ensembles = ("ensemble", "combine", "std_coef", "member_weights")
    for added in ("rollout", "on_nonfinite", "quantization", *LATER, *evaluations, *ensembles):
        before.pop(added, None)  # the jobs before they had these settings
    if kind is GRPOJob:
        before["average"] = "reply"  # what it was called
    text = json.dumps(
        {"version": job.current_version(), "job": before},
        sort_keys=True, separators=(",", ":"), ensure_ascii=False,
    )  # fmt: skip
    assert job.key() == hashlib.sha256(text.encode()).hexdigest()
    assert kind(**DIGESTS, rollout=BuiltinRollout()).key() == job.key()
    assert kind(**DIGESTS, min_length=3.0).key() != job.key()
    assert kind(**DIGESTS, max_length=100.0).key() != job.key()
    assert kind(**DIGESTS, select="last").key() == job.key(), "there is nothing to select from"
    keys = {kind(**DIGESTS, eval_every=5, select=select).key() for select in ("best", "last")}
    assert len({*keys, job.key()}) == 3


def test_vllm_counts_in_the_key_and_its_memory_does_not() -> None:
    builtin, vllm = GRPOJob(**DIGESTS), GRPOJob(**DIGESTS, rollout=VllmRollout())
    assert builtin.key() != vllm.key()
    roomy = VllmRollout(gpu_memory_utilization=0.6, cpu_cache_mib=4096)
    assert GRPOJob(**DIGESTS, rollout=roomy).key() == vllm.key()
    strict = VllmRollout(max_logprob_gap=0.01)
    assert GRPOJob(**DIGESTS, rollout=strict).key() != vllm.key()
    assert parse_job(vllm.model_dump_json()) == vllm


def test_correction_counts_in_the_key() -> None:
    plain, weights = GRPOJob(**DIGESTS), RolloutCorrection()
    corrected = GRPOJob(**DIGESTS, rollout=BuiltinRollout(correction=weights))
    masked = RolloutCorrection(mode="mask", min_weight=0.5, max_weight=5.0)
    others = GRPOJob(**DIGESTS, rollout=BuiltinRollout(correction=masked))
    assert len({plain.key(), corrected.key(), others.key()}) == 3
    assert VllmRollout().correction == weights, "on where the sampler is vLLM"
    off = GRPOJob(**DIGESTS, rollout=VllmRollout(correction=None))
    assert off.key() != GRPOJob(**DIGESTS, rollout=VllmRollout()).key()
    assert parse_job(others.model_dump_json()) == others


def test_correction_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing would be masked; give a bound"):
        RolloutCorrection(mode="mask", max_weight=None)
    with pytest.raises(ValidationError, match="max_weight"):
        RolloutCorrection(max_weight=0.9)  # would scale down what needs no correction
    tokens = VllmRollout(correction=RolloutCorrection(level="token"))
    with pytest.raises(ValidationError, match="a whole reply is one action"):
        RLOOJob(**DIGESTS, rollout=tokens)
    assert GRPOJob(**DIGESTS, rollout=tokens)


def test_rollout_is_set_by_its_path() -> None:
    config = build_config("grpo", ["grpo.rollout.type=vllm", "grpo.rollout.max_logprob_gap=0.02"])
    assert config.grpo.rollout == VllmRollout(max_logprob_gap=0.02)
    assert build_config("grpo").grpo.rollout == BuiltinRollout()
    # A setting that only vLLM has says it too, as with launchers and rewards.
    config = build_config("grpo", ["grpo.rollout.cpu_cache_mib=64"])
    assert config.grpo.rollout == VllmRollout(cpu_cache_mib=64)
    with pytest.raises(ConfigError, match="rollout"):
        build_config("grpo", ["grpo.rollout.type=sglang"])
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        build_config("grpo", ["grpo.rollout.gpu_memory_utilization=1.5"])


def sampling(**settings: Any) -> PipelineConfig:
    rollout = settings.pop("rollout", {"type": "vllm"})
    return PipelineConfig.model_validate(
        {
            "model": {"source": "random:llama"}, "stages": ["sft", "grpo"],
            "grpo": {"rollout": rollout, "rewards": [{"type": "repetition"}], **settings},
        }
    )  # fmt: skip


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_missing_package_is_refused_before_anything_starts(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_STORE", f"file://{tmp_path}/store")
    [problem] = check(sampling(), machine=CPU)
    assert "the package vllm is not installed" in problem
    assert "(extra vllm)" in problem and "pip install 'vllm>=0.32,<0.33'" in problem
    assert check(sampling(rollout={"type": "builtin"}), machine=CPU) == []
    # A worker has packages of its own.
    launched = sampling().model_copy(update={"launcher": WorkPoolLauncher()})
    assert not [p for p in check(launched, machine=CPU) if "vllm" in p]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_missing_package_is_refused_by_the_stage_itself(tmp_path: Any) -> None:
    """On a worker, whose environment the preflight does not see."""
    from rlhf_core.rollout.vllm_engine import VllmEngine

    with pytest.raises(ConfigError, match=r"package vllm is not installed.*\(extra vllm\)"):
        VllmEngine(tmp_path, VllmRollout(), precision="fp32", device=torch.device("cpu"), longest=8)


def test_vllm_that_is_too_old_is_named() -> None:
    assert [version_problem(v) for v in ("0.32.0", "0.32.1.dev3+g1", "0.33.0", "1.0", "dev")] == (
        [None] * 5
    )
    for version in ("0.9.2", "0.31.1"):
        problem = version_problem(version)
        assert problem and f"this vLLM is {version}, and rollouts need 0.32 or newer" in problem


def test_training_does_not_import_vllm() -> None:
    code = "import sys, rlhf_core.algorithms.grpo; print([m for m in sys.modules if 'vllm.' in m])"
    done = forked.run("-c", code, cwd=forked.ROOT, env=os.environ, needs=forked.MODELS)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_settings_that_vllm_cannot_do_are_named() -> None:
    [problem] = dry_run(sampling(temperature=0.001), CPU)
    assert "grpo.temperature is 0.001" in problem and "no less than 0.01" in problem


def test_engine_over_several_gpus_needs_ranks_and_heads_that_divide() -> None:
    def problems(size: int, machine: Machine = GPUS, **resources: Any) -> list[str]:
        places = {"ranks": 8, "strategy": "zero2", **resources}
        rollout = {"type": "vllm", "tensor_parallel": size}
        found = dry_run(sampling(rollout=rollout, batch_size=16, resources=places), machine)
        return [problem for problem in found if "tensor_parallel" in problem]

    assert problems(1) == problems(2) == problems(4) == []  # the tiny llama has four heads
    ranks, heads = problems(3)
    assert "grpo.rollout.tensor_parallel is 3, which does not divide the 8 ranks of a node" in ranks
    assert "4 attention heads" in heads
    assert problems(4, ranks=4, nodes=2) == []
    [problem] = problems(8)
    assert "does not divide the model's 4 attention heads; set a divisor of both" in problem
    [problem] = problems(2, device="cpu")
    assert "is 2, which needs GPUs, and these ranks run on the CPU" in problem


def test_engines_of_their_own_take_gpus_beside_those_of_the_ranks() -> None:
    def problems(ranks: int, samplers: int, size: int) -> list[str]:
        rollout = {"type": "vllm", "placement": "separate", "ranks": samplers}
        rollout["tensor_parallel"] = size
        places = {"ranks": ranks, "strategy": "zero2"}
        config = sampling(rollout=rollout, batch_size=24, resources=places)
        return dry_run(config, GPUS)

    job = GRPOJob(**DIGESTS, rollout=VllmRollout(placement="separate", ranks=2, tensor_parallel=4))
    assert job.samplers == 8
    assert GRPOJob(**DIGESTS, rollout=VllmRollout(tensor_parallel=4)).samplers == 0
    assert problems(4, 1, 4) == problems(4, 2, 2) == problems(6, 2, 1) == problems(6, 1, 2) == []
    [problem] = problems(6, 2, 2)
    assert "grpo.resources.ranks is 6 (for grpo) beside 4 GPUs for samplers" in problem
    [problem] = problems(4, 1, 3)
    assert "4 attention heads" in problem


@pytest.mark.parametrize("launcher", ["slurm", "kubernetes"])
def test_launcher_that_asks_for_too_few_gpus_is_named(launcher: str) -> None:
    def problems(gpus: int | None, **resources: Any) -> list[str]:
        config = sampling(
            rollout={"placement": "separate", "ranks": 2}, batch_size=24,
            resources={"ranks": 6, **resources},
        ).model_copy(update={"launcher": {
            "slurm": SlurmLauncher(folder="/shared", gpus_per_node=gpus),
            "kubernetes": KubernetesLauncher(image="trainer", gpus_per_node=gpus),
        }[launcher]})  # fmt: skip
        return [p for p in dry_run(config) if "gpus_per_node" in p]

    assert problems(None) == problems(8) == problems(6, device="cpu") == []
    [problem] = problems(6)
    assert problem.startswith(
        "launcher.gpus_per_node is 6, but grpo.resources.ranks is 6 (for grpo)"
    )
    assert "and 2 GPUs for samplers (rollout.ranks), and each takes a GPU; raise it" in problem


@pytest.mark.parametrize(("folder", "word"), [("my env", "a space"), ("a:b", "a colon")])
def test_environment_whose_path_ends_early_in_ld_preload_is_named(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, folder: str, word: str
) -> None:
    assert path_remark() is None
    for package in ("torch", "vllm"):
        (tmp_path / folder / package).mkdir(parents=True)
        (tmp_path / folder / package / "__init__.py").touch()
    code = (
        "import sys; from rlhf_core.rollout.limits import path_remark\n"
        f"sys.path.insert(0, {str(tmp_path / folder)!r}); print(path_remark())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = done.stdout
    assert f"torch is installed in '{tmp_path / folder}/torch', whose path has {word}" in said
    assert "LD_PRELOAD" in said and "in a folder without one" in said


def test_engine_on_the_cpu_counts_as_memory() -> None:
    parts = []
    for rollout in (BuiltinRollout(), VllmRollout(cpu_cache_mib=1024)):
        job = GRPOJob(**DIGESTS, rollout=rollout, precision="bf16")
        parts.append(estimate(LLAMA_7B, job, Resources(), "grpo", device="cpu").parts)
    assert "vLLM" not in parts[0]
    assert parts[1]["vLLM"] == pytest.approx(2 * 6.74e9 + 2**30, rel=0.01)  # 6.74 G parameters


def problems_of(model: Any, rollout: dict[str, Any], **resources: Any) -> list[str]:
    config = PipelineConfig.model_validate(
        {
            "model": {"source": "meta-llama/Llama-2-7b-hf"}, "stages": ["grpo"],
            "resources": resources,
            "grpo": {"rewards": [{"type": "repetition"}], "rollout": rollout, "batch_size": 24},
        }
    )  # fmt: skip
    return [p for p in dry_run(config, GPUS, model) if "rollout" in p]


def test_engine_that_does_not_fit_beside_the_trainer_is_refused() -> None:
    def problems(share: float) -> list[str]:
        rollout = {"type": "vllm", "gpu_memory_utilization": share}
        return problems_of(LLAMA_7B, rollout, ranks=8, strategy="zero2")

    assert problems(0.2) == []
    [problem] = problems(0.9)
    assert "grpo.rollout.gpu_memory_utilization is 0.9, which is 72.0 GiB" in problem
    assert "set at most 0." in problem
    [problem] = problems(0.15)  # 13.5e9 bytes are 12.6 GiB
    assert (
        "0.15, which is 12.0 GiB of a GPU of 80.0 GiB, but the weights alone take about 12.6"
        in (problem)
    )
    assert "set it to 0.21 or more, or raise rollout.tensor_parallel" in problem


def test_sampler_of_its_own_holds_the_whole_policy() -> None:
    apart = {"placement": "separate", "ranks": 2}
    place = {"ranks": 6, "strategy": "fsdp2", "gradient_checkpointing": True}
    assert problems_of(LLAMA_7B, apart, **place) == []
    assert problems_of(LLAMA_7B, {"type": "vllm", **apart}, **place) == []
    large = LLAMA_7B | {"num_hidden_layers": 192}  # 39e9 parameters
    [problem] = problems_of(large, {"type": "vllm", **apart}, **place)
    assert "gpu_memory_utilization is 0.3, which is 24.0 GiB" in problem
    assert "weights alone take about 72.9 GiB of it: set it to 0.96 or more, or raise" in problem
    [problem] = problems_of(LLAMA_7B | {"num_hidden_layers": 224}, apart, **place)
    assert "each sampler has the whole policy on one GPU: about 230.3 GiB" in problem
    assert "set placement to colocated with the strategy fsdp2" in problem


def test_engine_over_the_gpus_of_a_node_fits_what_one_gpu_cannot_hold() -> None:
    """70e9 parameters on 8 nodes of 8 GPUs."""
    large = {
        **LLAMA_7B, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672,
    }  # fmt: skip
    place = Resources(ranks=8, nodes=8, strategy="fsdp2", gradient_checkpointing=True)

    def problems(**settings: Any) -> list[str]:
        rollout = VllmRollout(**settings)
        job = GRPOJob(**DIGESTS, rollout=rollout, batch_size=64, precision="bf16")
        assert rollout_problems("grpo", job, place, device="cuda", heads=64) == []
        found = estimate(large, job, place, "grpo", max_length=2048)
        return check_engine_memory("grpo", job, place, found, GPUS)

    assert (
        problems(tensor_parallel=8) == problems(tensor_parallel=8, gpu_memory_utilization=0.5) == []
    )
    [problem] = problems()
    assert "the weights alone take about 128" in problem
    assert problem.endswith("of it: raise rollout.tensor_parallel, or train a smaller model")


def experience(difference: float) -> Any:
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    engine = old + difference * torch.tensor([[1.0, -1.0], [1.0, 9.0]])  # the 9 is padding
    rollout = SimpleNamespace(staleness=None)
    return SimpleNamespace(
        rollout_logprobs=engine, old_logprobs=old, response_mask=mask, rollout=rollout
    )


def test_gap_of_the_logprobs_ends_the_stage_past_its_bound() -> None:
    job = GRPOJob(**DIGESTS, rollout=VllmRollout(max_logprob_gap=0.1))
    assert_same_policy(job, experience(0.099), "fp32")
    with pytest.raises(TrainingFailure, match=r"differ by 0.101 nats .*max_logprob_gap 0\.1"):
        assert_same_policy(job, experience(0.101), "fp32")
    with pytest.raises(TrainingFailure, match="differ by nan"):
        assert_same_policy(job, experience(float("nan")), "fp32")


def test_gap_of_the_built_in_loop_has_a_bound_for_each_precision() -> None:
    job = GRPOJob(**DIGESTS)
    assert_same_policy(job, experience(0.0009), "fp32")
    assert_same_policy(job, experience(0.19), "bf16")
    for gap, precision, bound in ((0.0011, "fp32", "0.001"), (0.21, "bf16", "0.2")):
        found = (
            rf"differ by {gap} nats .* built-in .*max_logprob_gap {bound} \(precision {precision}"
        )
        with pytest.raises(TrainingFailure, match=found):
            assert_same_policy(job, experience(gap), precision)
    wide = GRPOJob(**DIGESTS, rollout=BuiltinRollout(max_logprob_gap=0.5))
    assert_same_policy(wide, experience(0.4), "fp32")
    assert wide.key() == job.key()  # what does not fail is the same
