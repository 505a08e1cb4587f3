"""The report's part about prompts that the model was trained on."""

from tasks.reporting.benchmarks import Benchmarks
from tasks.reporting.contamination import contamination, known_prompts

NONE = {
    "prompts": 128, "prompts_left_out": 0, "rows": 900, "rows_left_out": 0, "shared_prompts": 0,
    "shared_rows": 0, "near_prompts": 0, "near_rows": 0, "examples": [],
}  # fmt: skip
EXAMPLE = {"row": 1017, "prompt": "What is *AI*?", "share": 1.0, "passage": ""}
SOME = NONE | {
    "rows": 200_000, "rows_left_out": 50_000, "shared_prompts": 32, "shared_rows": 40,
    "near_prompts": 16, "near_rows": 17,
    "examples": [EXAMPLE, EXAMPLE | {"row": 3, "share": 0.5, "passage": "a b c", "source": "b"}],
}  # fmt: skip


def test_table_names_what_was_found_in_each_data_set():
    text = contamination({"sft": NONE, "preference": SOME}, "held-out prompts")
    assert (
        "| training data | rows | held-out prompts in it | near-duplicates | rows concerned |"
        in (text)
    )
    assert "| sft | 900 | 0 of 128 | 0 of 128 | 0 |" in text
    assert (
        "| preference | 200,000 of 250,000 | 32 of 128 (25.0%) | 16 of 128 (12.5%) | 40 |" in text
    )
    assert "**12% of the held-out prompts are near-duplicates of training rows:**" in text
    assert r"- preference, row 1,017 has 100% of “What is \*AI\*?”" in text
    assert "row 3 of b has 50% of" in text and "such as “a b c”" in text


def test_clean_data_gets_no_warning_and_no_data_no_table():
    assert "near-duplicates of training rows" not in contamination({"sft": NONE}, "questions")
    assert contamination({}, "questions") == ""


def test_benchmarks_show_their_questions_in_the_training_data():
    value = {"acc,none": {"value": 0.5, "stderr": 0.1}}
    models = {"base": {"arc": value}, "policy": {"arc": value}}
    data = {"shown": ["arc"], "models": models, "contamination": {"arc": {"sft": SOME}}}
    text = Benchmarks(data).markdown()
    assert "| arc in sft | 200,000 of 250,000 | 32 of 128 (25.0%)" in text
    assert "**12% of the questions are near-duplicates" in text


def test_evaluation_shows_prompts_and_questions():
    text = known_prompts({"contamination": {"prompts": {"sft": NONE}, "questions": {"sft": SOME}}})
    assert "| sft | 900 | 0 of 128 |" in text and "| general questions in it |" in text
    assert "12% of the general questions" in text and "% of the held-out prompts" not in text
    assert known_prompts({}) == ""
