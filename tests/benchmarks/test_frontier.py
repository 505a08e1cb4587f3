"""The table of `make bench-frontier`, from two evaluations made by hand."""

from benchmarks.frontier.__main__ import row, table


def evaluation(gain, kl, right):
    """An evaluation's numbers."""

    def model(kl, distinct, opening, finished):
        return {
            "kl_mean": kl, "distinct_2": distinct, "top_opening": opening, "finished": finished,
        }  # fmt: skip

    return {
        "models": {"sft": model(0.0, 0.9, 0.02, 0.5), "policy": model(kl, 0.8, 0.04, 0.75)},
        "heldout": {"sft": {"loss": 3.0}, "policy": {"loss": 3.1}},
        "questions": {"models": {"sft": {"rate": 0.5}, "policy": {"rate": right / 40}}},
        "gold_gain": {"mean": gain, "se": 0.02},
    }


def test_a_row_has_means_over_the_seeds_and_each_seeds_gain():
    found = row("kl-0.3", [evaluation(0.1, 1.0, 20), evaluation(0.2, 2.0, 18)])
    assert found == (
        "| kl-0.3 | +0.150 | +0.100 ± 0.020, +0.200 ± 0.020 | 1.5 | 0.90 → 0.80 | 2.0% → 4.0% "
        "| 50% → 75% | 3.00 → 3.10 | 50% → 48% |"
    )
    assert {line.count("|") for line in table([found]).splitlines()} == {10}


def test_a_failed_seed_is_not_left_out_of_the_mean():
    found = row("kl-0", [evaluation(0.5, 1.0, 19), None])
    assert found.startswith("| kl-0 | failed with 1 of 2 seeds |")
    assert found.count("|") == 10
