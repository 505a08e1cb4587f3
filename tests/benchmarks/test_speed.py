"""What the speed benchmark counts and prints."""

import dataclasses
import json
import statistics

import pytest

from benchmarks.speed import flops, report, workload
from benchmarks.speed.__main__ import neighbours
from benchmarks.speed.ours import replies_of

CONFIG = {
    "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 8, "vocab_size": 10,
}  # fmt: skip


def test_flops_of_a_small_llama_by_hand(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shape = flops.shape_of(tmp_path)
    # a layer: q and o 4x4, k and v 4x2, gate, up and down 4x8
    assert shape["body"] == 2 * (2 * 16 + 2 * 8 + 3 * 32)
    assert shape["head"] == 40
    # rows of 3 and 2 tokens, logits at 4 positions; attention 2 S^2 d a layer
    by_hand = 2 * 288 * 5 + 2 * 40 * 4 + 2 * 4 * 2 * (9 + 4)
    assert flops.forward(shape, [3, 2], 4) == by_hand


def test_the_share_of_the_peak_counts_a_training_step_three_times(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    row = {"input_ids": [1, 2, 3], "trainable": [False, True, True]}
    values = {
        "sizes": workload.Sizes("tiny", "fp32", 1, 1, 3, 1, 1, 1, 1, 1, 1, warm_up=1),
        "shape": flops.shape_of(tmp_path), "sft": [row, row],
    }  # fmt: skip
    work = 3 * flops.forward(values["shape"], [3], 2)
    runs = [{"seconds": s} for s in (1.0, 2.0, 40.0)]
    assert flops.share("sft", values, runs, peak=1e6) == pytest.approx(work / 2.0 / 1e6)
    assert flops.share("rollout", values, runs, peak=1e6) is None
    # a pair's prompt counts once: 2 + 1 + 3 tokens; causal rows of 3 and 5 tokens, less one of 2
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]}
    values["sizes"] = dataclasses.replace(values["sizes"], batch=2)
    values["pairs"] = [pair, pair]
    work = 3 * (2 * 288 * 6 + 2 * 4 * 2 * (9 + 25 - 4))
    assert flops.share("reward", values, runs, peak=1e6) == pytest.approx(work / 2.0 / 1e6)


def test_a_prompts_replies_differ_and_follow_its_number():
    values = {"prompts": [[1], [2, 2]], "replies": [[10], [20], [30]], "full_replies": [[7], [8]]}
    assert replies_of(values, [[2, 2], [1], [1]], "grpo") == [[20], [10], [20]]
    assert replies_of(values, [[1], [2, 2]], "ppo") == [[7], [8]]


def test_a_ratio_is_of_runs_beside_each_other():
    """A machine that slows down to a tenth in the middle: ours is twice as fast all the time."""
    ours, theirs = [20.0, 18.0, 2.0], [10.0, 9.0, 1.0]
    assert neighbours(ours, theirs) == pytest.approx([2, 2, 2, 1.8, 2 / 9])
    assert statistics.median(neighbours(ours, theirs)) == 2
    assert neighbours([3.0], [2.0]) == [1.5]


def test_the_table_has_both_sides_and_their_ratio(tmp_path):
    side = {"rate": 200.0, "low": 190.0, "high": 210.0, "rss": 2**30}
    found = {
        "precision": "fp32", "ours": side, "theirs": {**side, "rate": 100.0}, "ratio": 2.0,
        "quartiles": [1.9, 2.2], "share": {"ours": 0.61, "theirs": None},
        "losses": {"relative": 1e-7},
    }  # fmt: skip
    report.write({"sft tiny": found}, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert (
        "| sft tiny, fp32 | TRL SFTTrainer | 200 (190 to 210) | 100 (190 to 210) "
        "| **2.00 (1.90 to 2.20)** " in table
    )
    assert "| 1,024 MiB | 1,024 MiB | 61% |  | 1e-07 |" in table
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert "ratio 2.00" in report.line("sft tiny", found)
