"""Episodes: turns of a policy and an environment, token in and token out."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from rlhf_core.data.encoding import templates
from rlhf_core.environments.interface import Step
from rlhf_core.environments.make import make_environments
from rlhf_core.errors import ModelError, TrainingFailure
from rlhf_core.jobs import GRPOJob
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.rollout.generate import generate
from rlhf_core.training.online.episodes import EpisodeSampler, start_environments
from tests.rlhf_core.data.helpers import byte_tokenizer
from tests.rlhf_core.environments.sums import call, make_tokenizer, question
from tests.rlhf_core.tiny_models import copy_of

HERE = "tests.rlhf_core.training.online.test_episodes"


class Echo:
    """Says what it has read, three times; worth a point for each reply."""

    first = None

    def reset(self, row):
        self.turns = 0
        return self.first

    def step(self, reply, ids):
        self.turns += 1
        return f"You said {reply}<|im_end|>", 1.0, self.turns == 3


class Impolite(Echo):
    first = ({"role": "system", "content": "Be rude."}, {"role": "user", "content": "Well?"})


class Asking(Echo):
    first = "Who are you?"


class Torn(Echo):
    """Half of an emoji, as a text cut by another program ends."""

    def step(self, reply, ids):
        return "cut \ud83d", 1.0, False


class Broken(Echo):
    """Gives whatever stands in `gives`, or raises it."""

    gives: object = None

    def step(self, reply, ids):
        if isinstance(self.gives, Exception):
            raise self.gives
        if isinstance(self.gives, float):
            time.sleep(self.gives)
        return self.gives


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def job_of(environment, **settings):
    own = {} if "type" in environment else {"type": "python", "environment": f"{HERE}:Echo"}
    rewards = [{"type": "environment"}]
    values = {"max_new_tokens": 8, "environment": own | environment, "rewards": rewards}
    return GRPOJob(model="a" * 64, prompts="b" * 64, **(values | settings))


def row_of(tokenizer, text="Well?", **columns):
    prompt = [{"role": "user", "content": text}]
    ids = templates.prompt_ids(tokenizer, prompt)
    return {"prompt_ids": ids, "prompt": json.dumps(prompt), "row": 1} | columns


def scripted(tokenizer, *turns):
    """What samples given texts, turn by turn; None: a reply that is cut."""
    end, seen, left = tokenizer.eos_token_id, [], list(turns)

    def sample_turn(prompts, seeds):
        seen.append((prompts, seeds))
        texts = left.pop(0)
        replies = []
        for text in [texts] * len(prompts) if isinstance(texts, str | None) else texts:
            ids = [5, 6, 7] if text is None else [*tokenizer(text)["input_ids"], end]
            replies.append(
                SimpleNamespace(ids=ids, logprobs=[-0.5] * len(ids), finished=text is not None)
            )
        return replies

    return sample_turn, seen


def run(job, tokenizer, rows, sample_turn, stream=3):
    sampler = EpisodeSampler(job, make_environments(job.environment), tokenizer, stream)
    return sampler.run(rows, sample_turn, bool)


def test_what_was_sampled_stays_and_what_the_environment_wrote_is_marked(tokenizer):
    job = job_of({"type": "calculator", "announce": False}, max_new_tokens=12)
    row = row_of(tokenizer, question("*", 3, 4), answer="12")
    sample_turn, seen = scripted(tokenizer, call("*", 3, 4), "12")
    (episode,) = run(job, tokenizer, [(5, row)], sample_turn)
    whole = tokenizer.decode(episode.prompt + episode.ids)
    assert whole == (
        "<|im_start|>user\nAnn has 3 boxes of 4 pears. How many?<|im_end|>\n"
        f"<|im_start|>assistant\n{call('*', 3, 4)}<|im_end|>\n"
        "<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n12<|im_end|>"
    )
    written = [i for i, own in zip(episode.ids, episode.trained, strict=True) if not own]
    assert tokenizer.decode(written) == "\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n"
    assert [p != 0 for p in episode.logprobs] == episode.trained
    # The second turn was asked to go on from exactly these tokens.
    assert seen[1][0] == [episode.prompt + episode.ids[: episode.last]]
    outcome = episode.outcome()
    assert episode.finished and not outcome.at_limit
    assert (outcome.reward, outcome.turns) == (1.0, 2)
    assert outcome.counts == {"tool_calls": 1, "tool_errors": 0}
    assert [m["role"] for m in outcome.messages] == ["user", "assistant", "tool"]


def test_special_tokens_in_an_observation_are_taken_out(tokenizer):
    sample_turn, _ = scripted(tokenizer, "a", "b", "c")
    (episode,) = run(job_of({}), tokenizer, [(0, row_of(tokenizer))], sample_turn)
    assert episode.finished and episode.reward == 3.0
    assert episode.counts == {"special_tokens_removed": 2}
    assert [m["content"] for m in episode.messages] == [
        "Well?",
        "a",
        "You said a",
        "b",
        "You said b",
    ]


@pytest.mark.parametrize(
    ("environment", "turns", "reached", "at_limit"),
    [
        ({"max_turns": 2}, ["a", "b", "c"], 2, False),
        ({}, ["a", None], 2, True),  # no end of turn
        ({"max_episode_tokens": 26}, ["a", "b", "c"], 1, True),  # no room for a second reply
    ],
)
def test_episodes_are_cut_at_their_limits(tokenizer, environment, turns, reached, at_limit):
    sample_turn, seen = scripted(tokenizer, *turns)
    (episode,) = run(job_of(environment), tokenizer, [(0, row_of(tokenizer))], sample_turn)
    assert len(seen) == episode.turns == reached
    assert not episode.finished and episode.at_limit == at_limit
    assert episode.trained[-1], "an episode ends with what the policy sampled"
    assert len(episode.ids) <= job_of(environment).response_tokens


def test_reset_may_begin_another_conversation(tokenizer):
    job = job_of({"environment": f"{HERE}:Impolite"})
    sample_turn, _ = scripted(tokenizer, None)
    (episode,) = run(job, tokenizer, [(0, row_of(tokenizer))], sample_turn)
    assert tokenizer.decode(episode.prompt) == (
        "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    small = job_of({"environment": f"{HERE}:Impolite", "max_episode_tokens": 12})
    with pytest.raises(TrainingFailure, match="leaves no room for a reply of 8 tokens"):
        run(small, tokenizer, [(0, row_of(tokenizer))], sample_turn)


def test_reset_may_ask_a_question_as_a_text(tokenizer):
    sample_turn, _ = scripted(tokenizer, None)
    job = job_of({"environment": f"{HERE}:Asking"})
    (episode,) = run(job, tokenizer, [(0, row_of(tokenizer))], sample_turn)
    assert episode.messages == [{"role": "user", "content": "Who are you?"}]


def test_half_a_character_is_replaced_and_counted(tokenizer):
    job = job_of({"environment": f"{HERE}:Torn", "max_turns": 2})
    sample_turn, _ = scripted(tokenizer, "a", "b")
    (episode,) = run(job, tokenizer, [(0, row_of(tokenizer))], sample_turn)
    assert episode.counts == {"characters_replaced": 1}
    assert episode.messages[-1]["content"] == "cut \ufffd"


XML = (
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
LISTED = (
    "<|tool_call_start|>[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}='{{ v }}'{% endfor %})]<|tool_call_end|>"
)
UNKNOWN = "[TOOL_CALLS]{{ c.function | tojson }}"


@pytest.mark.parametrize(
    ("form", "readable"), [(XML, True), (LISTED, True), (UNKNOWN, False)], ids=["xml", "lfm", "odd"]
)  # fmt: skip
def test_calls_must_be_readable_as_the_template_writes_them(form, readable):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{{ m.content }}{% for c in m.tool_calls or [] %}" + form + "{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    job = job_of({"type": "calculator"})
    if readable:
        assert start_environments(job, tokenizer) is not None
        return
    with pytest.raises(ModelError, match=r"form that environments do not read: '\[TOOL_CALLS\]"):
        start_environments(job, tokenizer)
    silent = job_of({"type": "calculator", "announce": False})  # trained to write another form
    assert start_environments(silent, tokenizer) is not None


def test_tools_are_announced_where_the_template_does_not_write_them(tokenizer):
    job = job_of({"type": "calculator"})
    sample_turn, _ = scripted(tokenizer, None)
    (episode,) = run(job, tokenizer, [(0, row_of(tokenizer, answer="1"))], sample_turn)
    system, user = episode.messages
    assert system["role"] == "system" and '"name": "calculator"' in system["content"]
    assert "<tool_call>" in tokenizer.decode(episode.prompt)
    assert user["content"] == "Well?"


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (
            ValueError("no"),
            r"step raised ValueError: no \(prompt row 1, reply 'a'\); at .*test_episodes.py, line ",
        ),
        (0.5, r"step took more than 0.2 s \(prompt row 1, reply 'a'\)"),
        (None, r"expected \(observation, reward, done\)"),
        (("text", float("nan"), False), "a reward of nan"),
        ([{"content": 3}], r"expected \(observation, reward, done\)"),
        (([{"role": "user", "content": 3}], 0.0, False), "gave the message"),
        (([], 0.0, False), "gave no message"),
        (Step([{"role": "narrator", "content": "x"}]), "gave the message"),
        ((None, 0.0, False), r"gave None; expected .* or done"),
        ((7, 0.0, False), "gave 7; expected"),
        (({"role": "user", "content": "x"}, 0.0, False), "expected .*a list of messages"),
    ],
)
def test_broken_environment_is_named(tokenizer, monkeypatch, gives, said):
    monkeypatch.setattr(Broken, "gives", gives)
    job = job_of({"environment": f"{HERE}:Broken", "time_limit": 0.2})
    sample_turn, _ = scripted(tokenizer, "a")
    with pytest.raises(TrainingFailure, match=said):
        run(job, tokenizer, [(0, row_of(tokenizer))], sample_turn)


def test_an_episode_does_not_depend_on_those_beside_it(tokenizer, tmp_path):
    """As on two ranks, of which one has fewer turns to sample."""
    model = load_causal_lm(copy_of("llama", tmp_path / "model"))
    job = job_of({"max_turns": 3}, max_new_tokens=4, seed=5)
    rows = [(i, row_of(tokenizer, "Well" * (i + 1))) for i in range(6)]
    seen = []

    def sample_turn(prompts, seeds):
        seen.extend(seeds)
        # 8 tokens in ten end a turn: episodes last from one turn to three
        out = generate(
            model, prompts, max_new_tokens=4, eos_ids=set(range(0, 960, 4)), pad_id=0,
            row_seeds=seeds,
        )  # fmt: skip
        real = [out.response_mask[i] for i in range(len(prompts))]
        return [
            SimpleNamespace(
                ids=out.response_ids[i][real[i]].remainder(tokenizer.vocab_size).tolist(),
                logprobs=out.logprobs[i][real[i]].tolist(), finished=bool(out.finished[i]),
            )
            for i in range(len(prompts))
        ]  # fmt: skip

    together = run(job, tokenizer, rows, sample_turn)
    assert len({e.turns for e in together}) > 1
    assert len(set(seen)) == len(seen), "each turn of each episode has its own numbers"
    apart = [
        *run(job, tokenizer, rows[::2], sample_turn),
        *run(job, tokenizer, rows[1::2], sample_turn),
    ]
    for one, other in zip([*together[::2], *together[1::2]], apart, strict=True):
        assert (one.ids, one.turns, one.finished) == (other.ids, other.turns, other.finished)
    other_step = run(job, tokenizer, rows, sample_turn, stream=4)
    assert [e.ids for e in other_step] != [e.ids for e in together]
