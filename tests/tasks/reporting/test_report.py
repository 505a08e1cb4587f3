"""The report's Markdown, page and curves."""

import json
import re
from pathlib import Path

import pytest

from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import registry
from tasks.events import table_cell
from tasks.reporting.curves import _panels, draw, read_metrics, smooth
from tasks.reporting.markdown import folded, page
from tasks.reporting.origins import known, made_from, nodes
from tasks.reporting.report import render
from tasks.run import Run, StageResult

STUB = Path(__file__).parents[1] / "stubs/rlhf_stub"


@pytest.fixture
def run(tmp_path, monkeypatch, store):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    run = Run(build_config("smoke"), "run-1", store)
    files = {name: STUB / name for name in ("evaluation.json", "samples.jsonl")}
    add(run, "data-sft", "dataset", {"x": b"1"}, {"read": 10, "kept": 7, "too_long": 3, "bad": 0})
    lines = b'{"step": 1, "total": 2, "loss": 2.5}\n{"step": 2, "total": 2, "loss": 1.5}\n'
    add(run, "sft", "model", {"metrics.jsonl": lines}, {"loss": 1.5}, reused=True)
    add(run, "evaluate", "evaluation", files)
    return run


def add(run, stage, kind, files, metrics=None, reused=False, parents=(), **metadata):
    artifact = run.store.publish_derived(
        kind=kind, files=files, metadata={**metadata, "metrics": metrics or {}}, parents=parents
    )
    run.stages[stage] = StageResult(
        stage=stage, digest=artifact.digest, kind=kind, key="", reused=reused, seconds=65,
        metrics=metrics or {},
    )  # fmt: skip
    return artifact.digest


def test_report_shows_stages_evaluation_and_replies(run):
    text = render(run, images={"curves.png": b""})
    assert "| data-sft | 65 s | 7 of 10 rows (3 too long) | `dataset/" in text
    assert "| sft | reused | loss 1.5 | `model/" in text
    assert "![training curves](curves.png)" in text
    assert (
        "Verdict: not shown. PPO over SFT: reward +1.290" in text
    )  # smoke's judge is its labeller
    assert "| longer reply wins | 55.0 |" in text
    assert "| PPO | I love them! 好的。 | 1.90 | 0.67 |".replace("!", "\\!") in text


def test_texts_cannot_break_the_report(run):
    text = render(run, images={})
    assert r"pipes and &lt;b&gt;tags&lt;/b&gt;?" in text
    assert r"like \| pipes" in text
    html = page("a <title>", text)
    assert "<b>tags</b>" not in html
    assert "<title>a &lt;title&gt;</title>" in html
    assert "<table>" in html
    assert table_cell("a\0b \x1b[1m") == r"a�b �\[1m"


def test_no_more_replies_than_asked_for(run):
    run.config = build_config("smoke", ["evaluate.samples=1"])
    assert "How are you" not in render(run, images={})


def test_page_keeps_embedded_images_and_drops_scripts():
    html = page("x", "![c](data:image/png;base64,AAAA) [bad](javascript:alert(1))")
    assert '<img src="data:image/png;base64,AAAA"' in html
    assert 'href="javascript' not in html


def test_curves_are_a_png_of_what_is_there(run):
    lines = read_metrics(run.store, run.stages["sft"].digest)
    assert [line["loss"] for line in lines] == [2.5, 1.5]
    assert draw({"sft": lines}).startswith(b"\x89PNG")
    assert draw({"sft": [], "data": [{"step": 1, "rows": 9}]}) is None


def test_gain_is_drawn_against_the_kl():
    lines = [
        {"step": 0, "heldout_reward": 0.5, "heldout_kl": 0.0},
        {"step": 1, "kl": 0.1, "score": 1.0},
        {"step": 2, "kl": 0.2, "score": 2.0, "heldout_reward": 0.75, "heldout_kl": 1.5},
    ]
    panels = _panels({"ppo": lines})
    assert panels["PPO: score"] == [(1, 1.0), (2, 2.0)]
    assert panels["PPO: held-out gain against KL (nats)"] == [(0.0, 0.0), (1.5, 0.25)]
    assert draw({"ppo": lines}).startswith(b"\x89PNG")


def test_rollouts_are_told_in_words(run):
    lines = [
        {"step": 1, "reward": 0.0, "reward_judge": 0.5, "reward_judge/tokens": 90.0, "turns": 2.0,
         "failure_judge_unclear": 1.0, "environment_dice": 3.0, "groups_replaced": 0.0},
        {"step": 2, "reward": 0.0, "reward_judge": 1.0, "reward_judge/tokens": 93.0, "turns": 3.0,
         "failure_judge_unclear": 0.0, "environment_dice": 3.0, "groups_replaced": 7.0},
        {"step": 2, "heldout_reward": 9.0},
    ]  # fmt: skip
    content = "\n".join(map(json.dumps, lines)).encode()
    add(run, "grpo", "model", {"metrics.jsonl": content})
    times = {"throughput": {"rollout_seconds": 12.34, "services_seconds": 0.5}}
    run.stages["grpo"] = run.stages["grpo"].model_copy(update={"work": times})
    text = render(run, images={})
    section = text[text.index("## Rollouts") : text.index("## Evaluation")]
    assert section.splitlines()[2:] == [
        "| GRPO: 2 rollouts | mean | first | last |",
        "| --- | ---: | ---: | ---: |",
        "| reward judge | 0.75 | 0.5 | 1 |",
        "| tokens that the reward judge costs, a reply | 91.5 | 90 | 93 |",
        "| replies that got 0, a rollout: judge unclear | 0.5 | 1 | 0 |",
        "| groups replaced by other prompts, because all outcomes were alike | 3.5 | 0 | 7 |",
        "| turns of an episode | 2.5 | 2 | 3 |",
        "| dice, counted by the environment, an episode | 3 | 3 | 3 |",
        "",
        "In the median a rollout took 12.3 s, and services were waited for 0.5 s after it.",
        "",
    ]


def test_evaluation_without_the_environment_of_the_training_says_so(run):
    said = "trained in episodes with the environment calculator. These numbers are of single repl"
    assert said not in render(run, images={})
    run.config = build_config("calculator")
    assert said in render(run, images={})


def test_counts_of_a_judge_are_told_in_words(run):
    counts = {"train_pairs": 42, "heldout_pairs": 8, "judge_pairs": 72, "judge_half": 2,
              "judge_requests": 144, "judge_unclear": 0}  # fmt: skip
    add(run, "label", "dataset", {"x": b"1"}, counts)
    told = "42 pairs, 8 held out (2 won in one order and tied in the other, 144 requests to the j"
    assert told in render(run, images={})


def test_run_without_online_rl_has_no_rollouts(run):
    assert "## Rollouts" not in render(run, images={})


def test_artifact_without_metrics_has_no_curve(run):
    assert read_metrics(run.store, run.stages["evaluate"].digest) == []


def test_smoothing_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 0.0], 0.9)[1] == pytest.approx(0.9 * 0.1 / (0.9 * 0.1 + 0.1))


def test_report_has_author_lineage_data_cards_and_changed_settings(run, monkeypatch):
    card = {"read": 10, "kept": 7, "examples": ["<b>x</b>"]}
    add(run, "data-prompts", "dataset", {"card.json": json.dumps(card).encode()}, card)
    text = render(run, images={"lineage.svg": b""})
    assert f"of {run.author}, started 20" in text
    assert "![what was made from what](lineage.svg)" in text
    shown = page("x", text)
    assert "<summary>data-prompts: 7 of 10 rows</summary>" in shown
    assert '"&lt;b&gt;x&lt;/b&gt;"' in shown and "<b>x</b>" not in shown
    assert "ppo.steps: 3" in text and "ppo.clip_range" not in text, "a default"


def test_folded_text_with_empty_lines_stays_inside_of_the_fold():
    shown = page("x", folded("a & b", "one\n\n```\n</pre>\n\n\nlast"))
    inside = re.search(
        r"<details><summary>a &amp; b</summary><pre>(.*?)</pre></details>", shown, re.S
    )
    assert inside[1].replace("&#10;", "\n") == "one\n\n```\n&lt;/pre&gt;\n\n\nlast"


def test_report_names_the_run_of_the_champion_that_it_is_compared_with(run):
    policy = add(run, "ppo", "model", {"w": b"new"})
    old = run.store.publish_derived(kind="model", files={"w": b"old"})
    published = run.store.publish_derived(
        kind="published", files={"w": b"old"}, metadata={"policy": old.digest}
    )
    registry.promote(run.store, "smoke", published.digest, run="run-0")
    compared = {"evaluation.json": (STUB / "evaluation.json").read_bytes(), "z": policy.encode()}
    add(run, "compare", "evaluation", compared, job={"sft": old.digest})
    text = render(run, images={})
    assert "The champion is version 1 of `smoke`, made by run `run-0`." in text
    assert "Side by side: `rlhf compare run-0 run-1`." in text


def test_mixtures_show_rows_and_metrics_of_each_source(run):
    source = {"read": 40, "train": 30, "heldout": 4, "dropped": {"duplicate": 5, "too_long": 1},
              "bad": {}, "tokens": 1234, "epoch": 60}  # fmt: skip
    sources = [{"name": "chat", **source}, {"name": "a|b", **source, "epoch": None}]
    mixture = {"sources": sources, "stopping_strategy": "all_exhausted", "max_repeats": 4}
    card = json.dumps({"mixture": mixture}).encode()
    parent = add(run, "data-sft", "dataset", {"card.json": card}, {"read": 80, "kept": 68})
    metrics = {"heldout_loss": 1.0, "heldout_loss/chat": 0.5, "heldout_loss/a|b": 2.25}
    measured = {"policy": {"loss": 1.0, "sources": {"chat": 0.125}}}
    stages = {
        "sft": metrics,
        "reward": {"heldout": {"sources": {"chat": {"accuracy": 0.75}}}},
        "evaluate": {"heldout": measured},
    }
    for stage, found in stages.items():
        artifact = run.store.publish_derived(
            kind="model", files={"x": stage.encode()}, parents=[parent]
        )
        run.stages[stage] = StageResult(
            stage=stage, digest=artifact.digest, kind="model", key="", reused=False, seconds=1,
            metrics=found,
        )  # fmt: skip
    text = render(run, images={})
    assert "| chat | 40 | 30 | 4 | 6 | 0 | 1,234 | 60 | 0.500 | 0.125 | 0.750 |" in text
    assert r"| a\|b | 40 | 30 | 4 | 6 | 0 | 1,234 |  | 2.250 |  |  |" in text
    assert "held-out loss | evaluate: held-out loss, policy | reward: held-out accuracy |" in text
    assert "Stopping strategy: all_exhausted, max_repeats 4." in text


def test_lineage_shows_what_the_model_was_made_from_with_its_sources(run):
    """Also what an earlier run has made; not how the champion was made."""
    earlier = run.store.publish_derived(
        kind="model", files={"w": b"earlier"},
        metadata={"algorithm": "import_model", "job": {"source": "Qwen/Qwen2.5-0.5B"}},
    )  # fmt: skip
    champion = run.store.publish_derived(
        kind="model", files={"w": b"champion"}, parents=[earlier.digest]
    )
    run.stages.clear()
    data = add(run, "data-sft", "dataset", {"d": b"d"}, {"read": 10, "kept": 7},
               job={"source": "./a|b.jsonl"}, parents=[earlier.digest])  # fmt: skip
    policy = add(run, "sft", "model", {"w": b"sft"}, parents=[earlier.digest, data])
    add(run, "compare", "evaluation", {"e": b"e"}, parents=[policy, champion.digest])
    run.artifacts_by_role["model"] = policy

    found = known(run)
    boxes = {node.title: node for node in nodes(run, found).values()}
    assert set(boxes) == {"import_model, earlier", "data-sft", "sft", "compare"}
    assert boxes["data-sft"].source == "./a|b.jsonl"
    assert boxes["import_model, earlier"].source == "Qwen/Qwen2.5-0.5B"
    lines = made_from(run, found).splitlines()
    assert lines[2:] == [
        f"| import_model | Qwen/Qwen2.5-0.5B |  | `{earlier.ref}` |",
        f"| data-sft | ./a\\|b.jsonl | 7 of 10 rows | `{run.stages['data-sft'].ref}` |",
    ]
