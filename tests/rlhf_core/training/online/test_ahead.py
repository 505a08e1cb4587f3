"""Replies that are sampled ahead by a real sampler: whose they are, token by token."""

import copy
import signal

import pytest
import torch

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import BuiltinRollout, GRPOJob, Resources
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.rollout.schedule import Schedule
from rlhf_core.runtime.stopping import stop
from rlhf_core.training.online.ahead import Ahead
from rlhf_core.training.online.sampler_process import Setup
from rlhf_core.training.online.samplers import Samplers, SamplingStopped
from rlhf_core.training.strategy import Strategy
from tests.rlhf_core.tiny_models import copy_of

pytestmark = pytest.mark.slow

STEPS, TOKENS, REPLIES = 5, 7, 6
DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}


def prompts_of(step):
    return [[5 + step + i] * (1 + i % 3) for i in range(REPLIES)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_of("llama", tmp_path_factory.mktemp("ahead") / "model")


@pytest.fixture(scope="module")
def job():
    return GRPOJob(
        **DIGESTS, steps=STEPS, max_new_tokens=TOKENS, precision="fp32", temperature=1.3,
        resources=Resources(device="cpu", threads=1), seed=3,
        rollout=BuiltinRollout(placement="separate", max_staleness=2, segments=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def samplers(job, source, tmp_path_factory):
    strategy = Strategy(job.resources, "fp32", 1.0)
    setup = Setup(job.model_dump_json(), str(source), 0, "ddp", "fp32", 1, 64, REPLIES)
    samplers = Samplers(job, strategy, setup, tmp_path_factory.mktemp("weights"))
    yield samplers
    samplers.close()


@pytest.fixture(scope="module")
def versions(source):
    """The policy after 0, 1, ... steps, each a good way from the one before."""
    policy = Policy(load_causal_lm(source, torch.float32).eval())
    generator, found = torch.Generator().manual_seed(0), [policy]
    for _ in range(STEPS):
        policy = copy.deepcopy(policy)
        with torch.no_grad():
            for param in policy.parameters():
                param += 0.2 * param.std() * torch.randn(param.shape, generator=generator)
        found.append(policy)
    return found


def schedule():
    return Schedule(STEPS, 2, 2, TOKENS)


@pytest.fixture(scope="module")
def replies(samplers, versions, tmp_path_factory):
    """Step -> its replies; a checkpoint's part after two steps; step -> what was handed out."""
    saved = tmp_path_factory.mktemp("saved")
    ahead = Ahead(samplers, schedule(), 0, saved)
    found, handed_out = [], {}

    def prompts_and_asks(step):
        ahead.asks[step] = handed_out.setdefault(step, []).extend
        return prompts_of(step)

    for step in range(STEPS):
        found.append(ahead.take(step, versions[step], prompts_and_asks))
        if step == 1:
            ahead.snapshot(2)(saved)
    return found, saved, handed_out


def test_each_token_is_that_of_its_version_given_all_before_it(job, versions, replies):
    mixed = 0
    for step, of_step in enumerate(replies[0]):
        for prompt, reply in zip(prompts_of(step), of_step, strict=True):
            first, then = max(0, step - 2), max(0, step - 1)
            assert reply.versions == ([first] * 4 + [then] * 3)[: len(reply.ids)]
            mixed += len(set(reply.versions)) > 1
            for number in set(reply.versions):
                with torch.no_grad():
                    logits = versions[number].model(torch.tensor([[*prompt, *reply.ids]])).logits
                logprobs = (logits[0] / job.temperature).log_softmax(-1)  # (S,V)
                for i, token in enumerate(reply.ids):
                    if reply.versions[i] == number:
                        expected = float(logprobs[len(prompt) + i - 1, token])
                        assert reply.logprobs[i] == pytest.approx(expected, abs=1e-4)
    assert mixed > REPLIES, "some replies were carried over"


def test_whole_replies_are_handed_out_as_soon_as_they_are_sampled(replies):
    whole, _, handed_out = replies
    for step, of_step in enumerate(whole):
        assert sorted(reply.row for reply in handed_out[step]) == list(range(REPLIES))
        for given in handed_out[step]:
            reply = of_step[given.row]
            assert (given.ids, given.logprobs, given.finished) == (
                reply.ids, reply.logprobs, reply.finished,
            )  # fmt: skip


def test_checkpoint_has_what_gives_the_same_replies(samplers, versions, replies):
    whole, saved, _ = replies
    ahead = Ahead(samplers, schedule(), 2, saved)
    for step in range(2, STEPS):
        assert ahead.take(step, versions[step], prompts_of) == whole[step]


def test_replies_asked_for_at_once_follow_weights_and_seeds(samplers, versions):
    seeds = [100 + i for i in range(REPLIES)]
    one, again, other = (
        samplers.roll_out(versions[number], prompts_of(0), seeds) for number in (1, 1, 2)
    )
    assert one == again != other
    assert all(len(reply.ids) == TOKENS or reply.finished for reply in one)


@pytest.fixture
def hanging(samplers):
    """The sampler, which does nothing until the test is over."""
    [child] = samplers._children
    child.process.send_signal(signal.SIGSTOP)
    yield samplers
    child.process.send_signal(signal.SIGCONT)
    samplers.thread.submit(int).result()  # what it was asked is over


def test_sampling_is_left_when_the_job_is_told_to_stop(hanging, versions, monkeypatch):
    monkeypatch.setattr(stop, "requested", True)
    with pytest.raises(SamplingStopped, match="told to stop while replies were sampled"):
        hanging.roll_out(versions[0], prompts_of(0), list(range(REPLIES)))


def test_sampler_that_says_nothing_is_a_hang(hanging, versions, monkeypatch):
    monkeypatch.setattr(hanging, "longest_silence", 0.3)
    found = r"Of the samplers, 0 have returned no reply for 0\.3 s \(resources.collective_timeout"
    with pytest.raises(JobFailed, match=found) as caught:
        hanging.roll_out(versions[0], prompts_of(0), list(range(REPLIES)))
    assert caught.value.category == "hang"
    [child] = hanging._children
    child.process.send_signal(signal.SIGCONT)
    while child.receive() is not None:  # its answer, which nobody waits for any more
        pass


def test_dead_sampler_is_named(samplers, versions):
    [child] = samplers._children
    child.process.kill()
    with pytest.raises(JobFailed, match=r"Sampler 0 \(process \d+\) ended by signal 9") as caught:
        samplers.roll_out(versions[0], prompts_of(0), list(range(REPLIES)))
    assert caught.value.category == "lost"
