"""The verdict on an evaluation, and which judge is independent."""

import pytest

from rlhf_core.pipeline.presets import build_config
from tasks.reporting.judges import Judge, families, judges_of
from tasks.reporting.prices import Names
from tasks.reporting.verdict import conclude

REWARD = Judge("the reward model", False, "was trained in this run")
VADER = Judge("the gold judge vader", True, "had no part in the training")
LABELLER = Judge("the gold judge vader", False, "also labelled the pairs that the run trains on")
JUDGE = Judge("the judge gpt-4", True, "had no part in the training")
VERIFIER = Judge("the verifier", True, "compares replies with the answers")
NAMES = Names("PPO", "SFT")
UP, NONE, DOWN = (0.5, 0.4, 0.6), (0.05, -0.05, 0.15), (-0.5, -0.6, -0.4)  # mean, low, high


def change(values):
    return dict(zip(("mean", "low", "high"), values, strict=True))


def verdict(reward=None, gold=None, rate=None, judges=None, start=(), policy=(), **data):
    """Of differences, a rate of the endpoint's judge, and numbers of both models."""
    changes = {"reward": reward, "gold": gold}
    found = {
        "models": {"sft": dict(start), "policy": dict(policy)},
        "differences": {name: change(v) for name, v in changes.items() if v},
        **data,
    }
    if rate:
        found["win_rate"] = {"judge": dict(zip(("rate", "low", "high"), rate, strict=True))}
    asked = judges or {"reward": REWARD, "gold": VADER, "judge": JUDGE}
    return conclude(found, "sft", NAMES, asked, data.get("benchmarks"))


@pytest.mark.parametrize(
    ("reward", "gold", "rate", "state", "text"),
    [
        (UP, UP, None, "better", "reward +0.500 (+0.400 to +0.600); gold score +0.500"),
        (UP, UP, None, "better", "The gold judge vader, which had no part in the training, agrees"),
        (NONE, UP, None, "better", ""),
        (DOWN, UP, None, "better", ""),
        (UP, DOWN, None, "reward hacked", "the gold judge vader prefers those of SFT"),
        (UP, None, (0.3, 0.2, 0.4), "reward hacked", "the judge gpt-4 prefers those of SFT"),
        (UP, UP, (0.3, 0.2, 0.4), "not shown", "The judges disagree: the gold judge vader prefers"),
        (UP, None, (0.7, 0.6, 0.8), "better", "win rate 70% (60% to 80%)"),
        (UP, NONE, None, "not shown", "The gold judge vader shows no gain"),
        (DOWN, None, None, "worse", "The reward model prefers the replies of SFT"),
        (DOWN, DOWN, None, "worse", "The reward model and the gold judge vader prefer "),
        (UP, None, None, "not shown", "nobody knows whether the replies became better"),
        (None, None, None, "not shown", "No judge without a part in the training was asked."),
    ],
)  # fmt: skip
def test_verdict_says_what_the_judges_say(reward, gold, rate, state, text):
    found = verdict(reward, gold, rate)
    assert found.state == state and text in found.text
    assert str(found).startswith(f"Verdict: **{state}**" if state in ("worse", "reward hacked")
                                 else f"Verdict: {state}.")  # fmt: skip


def test_a_judge_that_labelled_the_pairs_is_no_evidence_but_can_show_that_they_were_hacked():
    judges = {"reward": REWARD, "gold": LABELLER}
    found = verdict(UP, UP, judges=judges)
    assert found.state == "not shown"
    assert "vader also labelled the pairs that the run trains on" in found.text
    assert verdict(UP, DOWN, judges=judges).state == "reward hacked"
    assert verdict(DOWN, UP, judges=judges).state == "not shown"
    assert found.record()["judges"]["gold"] == {
        "name": LABELLER.name, "independent": False, "why": LABELLER.why,
    }  # fmt: skip


def test_the_win_rate_at_equal_length_decides():
    longer = {"rate": 0.7, "low": 0.6, "high": 0.8,
              "length_controlled": {"rate": 0.52, "low": 0.43, "high": 0.61}}  # fmt: skip
    found = verdict(UP, win_rate={"judge": longer})
    assert found.state == "not shown" and "The judge gpt-4 shows no gain" in found.text


def test_greedy_and_sampled_replies_must_agree():
    changes = {"gold": change(UP), "greedy_gold": change(DOWN)}
    found = verdict(differences=changes)
    assert found.state == "not shown" and "+0.500 of sampled replies and -0.500 of" in found.text
    assert verdict(differences={**changes, "greedy_gold": change(NONE)}).state == "better"


def test_greedy_replies_that_became_alike_are_a_collapse():
    models = {"sft": {"top_opening": 0.1, "distinct_2": 0.8},
              "policy": {"top_opening": 0.2, "distinct_2": 0.7, "opening": "i am"}}  # fmt: skip
    found = verdict(UP, UP, greedy={"models": models})
    assert found.state == "better at a price"
    assert found.prices == (
        '20% of the greedy replies begin with "i am" (SFT: 10% begin alike)',
        "distinct-2 of the greedy replies fell from 0.80 to 0.70",
    )
    models["policy"]["top_opening"] = 0.6
    assert verdict(UP, UP, greedy={"models": models}).state == "reward hacked"


def test_an_older_evaluation_is_judged_by_its_standard_errors():
    errors = {"reward_se": 0.1, "gold_se": 0.1}
    models = {
        "sft": {"reward_mean": 0, "gold_mean": 0, **errors},
        "policy": {"reward_mean": 1, "gold_mean": 0.2, **errors},
    }
    judges = {"reward": REWARD, "gold": VADER}
    unpaired = conclude({"models": models}, "sft", NAMES, judges)
    assert unpaired.state == "not shown" and "reward +1.000 (+0.717 to +1.283)" in unpaired.text
    data = {"models": models, "gold_gain": {"mean": 0.2, "se": 0.05}}
    assert conclude(data, "sft", NAMES, judges).state == "better", "the paired error is preferred"


@pytest.mark.parametrize(
    ("start", "policy", "text"),
    [
        ({"distinct_2": 0.8}, {"distinct_2": 0.71}, "distinct-2 fell from 0.80 to 0.71"),
        ({"top_opening": 0.1}, {"top_opening": 0.2, "opening": "i love a"},
         '20% of the replies begin with "i love a" (SFT: 10% begin alike)'),
        ({"self_bleu": 0.1}, {"self_bleu": 0.2}, "self-BLEU rose from 0.10 to 0.20"),
        ({"repeated": 0.0}, {"repeated": 0.06}, "6% of the replies answer several prompts (0% "),
        ({"finished": 0.9}, {"finished": 0.7}, "70% of the replies end by themselves (90% before)"),
        ({"entropy": 3.0}, {"entropy": 1.8}, "entropy fell from 3.00 to 1.80 nats per token"),
        ({"length_mean": 10}, {"length_mean": 16}, "the replies have 16 tokens instead of 10"),
        ({"length_mean": 16}, {"length_mean": 10}, "the replies have 10 tokens instead of 16"),
        ({"refusals": 0.0}, {"refusals": 0.1}, "10% of the replies decline to answer (0% before)"),
        ({"language_changes": 0.0}, {"language_changes": 0.1}, "another script than the prompt"),
    ],
)  # fmt: skip
def test_a_price_is_named(start, policy, text):
    found = verdict(UP, UP, start=start, policy=policy)
    assert found.state == "better at a price" and text in found.text
    assert [text in price for price in found.prices] == [True]
    assert verdict(UP, UP, start=start, policy=start).state == "better"


def test_lost_knowledge_is_a_price():
    found = verdict(UP, UP, heldout={"sft": {"loss": 3.0}, "policy": {"loss": 3.2}})
    assert found.prices == ("the held-out loss rose from 3.00 to 3.20",)
    assert verdict(UP, UP, heldout={"sft": {"loss": 3.0}, "policy": {"loss": 3.1}}).prices == ()
    asked = {"models": {"sft": {"rate": 0.5}, "policy": {"rate": 0.2}}}
    changes = {"gold": change(UP), "questions": change((-0.3, -0.5, -0.1))}
    assert verdict(questions=asked, differences=changes).prices == (
        "20% of the general questions are answered right (SFT: 50%)",
    )
    tasks = {"arc": {"higher_is_better": {"acc": True, "ppl": False}}}
    rows = {"acc,none": {"value": -0.1, "stderr": 0.03}, "ppl,none": {"value": 9, "stderr": None},
            "acc_norm,none": {"value": -0.9, "stderr": 0.01}}  # fmt: skip
    measured = {"shown": ["arc"], "tasks": tasks, "change": {"arc": rows}}
    assert verdict(UP, UP, benchmarks=measured).prices == ("arc acc fell by 0.1 ± 0.03 from base",)
    rows["acc,none"]["stderr"] = 0.06
    assert verdict(UP, UP, benchmarks=measured).state == "better"


@pytest.mark.parametrize(
    "few",
    [({"top_opening": 0.1}, {"top_opening": 0.6}), ({"distinct_2": 0.8}, {"distinct_2": 0.3})],
)
def test_replies_that_became_one_reply_are_never_shown_as_a_gain(few):
    start, policy = few
    assert verdict(UP, UP, start=start, policy=policy).state == "reward hacked"
    assert verdict(UP, start=start, policy=policy).state == "reward hacked"
    found = verdict(NONE, NONE, start=start, policy=policy)
    assert found.state == "worse" and "The replies became alike" in found.text
    assert verdict(start=start, policy=policy).state == "worse"


LABELLED = (
    "data.preference={{source: sampled, labeller: endpoint, judge: {{type: rubric, model: {}, "
    "url: 'http://localhost:1/v1'}}}}"
)
RATED = "ppo.rewards=[{{type: judge, url: 'http://localhost:1/v1', model: {}, weight: {}}}]"
COMPARED = "online_dpo={{rewards: [], judge: {{url: 'http://localhost:1/v1', model: {}}}}}"
ENDPOINT = "evaluate.judge_endpoint={{url: 'http://localhost:1/v1', model: {}}}"


@pytest.mark.parametrize(
    ("preset", "changes", "judge", "independent", "why"),
    [
        ("smoke", [], "gold", False, "labelled the pairs"),
        ("smoke", ["evaluate.judge=textblob"], "gold", True, "had no part in the training"),
        ("smoke", [], "reward", False, "trained in this run"),
        ("smoke", ["data.preference={source: pairs.jsonl}", "evaluate.judge=vader"], "gold", True,
         "unless it labelled pairs.jsonl"),
        ("grpo-rules", ["evaluate.judge=vader"], "gold", False, "the reward 'sentiment'"),
        ("grpo-rules", [], "reward", False, "is what the model was trained on"),
        ("smoke", [ENDPOINT.format("gpt-4.1")], "judge", True, "had no part"),
        ("demo", [ENDPOINT.format("SmolLM3-3B")], "judge", False, "policy's family (smollm)"),
        ("smoke", ["stages=[sft, ppo]", "reward_model=org/Skywork-Reward-Llama-3.1-8B",
                   "model.source=org/Qwen3-8B", ENDPOINT.format("meta/Llama-4")], "judge", False,
         "reward model's family (llama)"),
        ("smoke", ["stages=[sft]", "reward_model=org/Skywork-Reward-Llama-3.1-8B",
                   "model.source=org/Qwen3-8B"], "reward", True, "had no part"),
        ("smoke", [LABELLED.format("gpt-4.1"), ENDPOINT.format("gpt-4.1")], "judge", False,
         "labelled the pairs"),
        ("smoke", [LABELLED.format("gpt-4.1"), ENDPOINT.format("gpt-5")], "judge", False,
         "labeller's family (gpt)"),
        ("smoke", [LABELLED.format("gpt-4.1"), ENDPOINT.format("claude")], "judge", True,
         "no part"),
        ("smoke", ["stages=[sft, online_dpo]", COMPARED.format("gpt-5"), ENDPOINT.format("gpt-5")],
         "judge", False, "labelled the pairs"),
        ("smoke", [RATED.format("gpt-5", 1), ENDPOINT.format("gpt-5")], "judge", False,
         "the reward 'judge'"),
        ("smoke", [RATED.format("gpt-5", 1), ENDPOINT.format("gpt-4")], "judge", False,
         "reward 'judge''s family (gpt)"),
        ("smoke", [RATED.format("gpt-5", 0), ENDPOINT.format("gpt-5")], "judge", True, "no part"),
        ("smoke", ["ppo.rewards=[{type: http, url: 'http://a/score'}]", "evaluate.judge=textblob"],
         "gold", True, "unless it is behind http://a/score"),
    ],
)  # fmt: skip
def test_the_pipeline_knows_which_judge_is_independent(preset, changes, judge, independent, why):
    found = judges_of(build_config(preset, changes))[judge]
    assert found.independent == independent and why in found.why


def test_a_verifier_of_answers_is_evidence():
    rewards = "grpo.rewards=[{type: answer, match: numeric}]"
    judges = judges_of(build_config("grpo-rules", [rewards, "evaluate.judge=none"]))
    assert set(judges) == {"reward", "answers"}
    data = {"models": {"sft": {}, "policy": {}}, "differences": {"answers": change(UP)}}
    assert conclude(data, "sft", NAMES, judges).state == "better"


def test_families_of_models_are_told_by_their_names():
    assert families("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B") == {"deepseek", "qwen"}
    assert families("TinyLlama/TinyLlama-1.1B-Chat") == families("lmsys/vicuna-7b") == {"llama"}
    assert families("builtin:smollm2-135m-instruct") == {"smollm"}
    assert families("./optimal-model") == families("") == set()
