"""Which GPUs samplers get, and what they keep to themselves. What they sample: test_ahead.py."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_core.errors import ConfigError, Preempted
from rlhf_core.jobs import BuiltinRollout, GRPOJob, Resources, VllmRollout
from rlhf_core.training import strategy
from rlhf_core.training.online import sampling
from rlhf_core.training.online.samplers import SamplingStopped, own_devices

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}


@pytest.fixture
def devices(monkeypatch):
    """rollout, ranks, GPUs, CUDA_VISIBLE_DEVICES -> the samplers' devices."""

    def of(rollout, ranks, count, visible=None):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return own_devices(GRPOJob(**DIGESTS, rollout=rollout))

    return of


def test_samplers_get_the_gpus_after_those_of_the_ranks(devices):
    two = BuiltinRollout(placement="separate", ranks=2)
    assert devices(two, 6, 8) == ["6", "7"]
    assert devices(two, 2, 8) == ["2", "3"]
    assert devices(two, 2, 4, "3, 5,GPU-7f, 1") == ["GPU-7f", "1"]
    shared = VllmRollout(placement="separate", ranks=2, tensor_parallel=2)
    assert devices(shared, 4, 8) == ["4,5", "6,7"]


def test_too_few_gpus_are_refused(devices):
    shared = VllmRollout(placement="separate", ranks=2, tensor_parallel=2)
    found = "takes 4 GPUs for 2 samplers .* beside 6 training ranks, and this machine shows 8"
    with pytest.raises(ConfigError, match=found):
        devices(shared, 6, 8)


@pytest.mark.parametrize("speaks", [True, False])
def test_samplers_do_not_repeat_what_the_precision_means(monkeypatch, capsys, speaks):
    monkeypatch.setattr(strategy, "computes_in_bf16", lambda device: False)
    place = Resources(device="cpu", threads=1)
    assert strategy.Strategy(place, "bf16", 1.0, speaks=speaks).precision == "fp32"
    assert ("has no bf16 arithmetic" in capsys.readouterr().out) is speaks
    torch.distributed.destroy_process_group()


def test_rollout_that_is_left_when_the_job_stops_stores_a_checkpoint(monkeypatch):
    def left(stage, rows, stream):
        raise SamplingStopped("told to stop")

    def stop_if_asked(step):
        raise Preempted(f"the checkpoint after step {step}")

    monkeypatch.setattr(sampling, "sample_rows", left)
    stage = SimpleNamespace(checkpointer=SimpleNamespace(stop_if_asked=stop_if_asked))
    with pytest.raises(Preempted, match="the checkpoint after step 3"):
        sampling.sample_between_updates(stage, [], 77, 3)
