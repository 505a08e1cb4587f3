"""How much replies differ, against hand values."""

from rlhf_core.rollout.variety import variety


def test_variety_by_hand():
    found = variety(["I love a dog", "I love a cat.", "So do I", "So do I "])
    # words: 4 + 4 + 3 + 3; different: i love a dog cat so do
    assert found["distinct_1"] == 7 / 14
    # pairs: 3 + 3 + 2 + 2; different: i-love love-a a-dog a-cat so-do do-i
    assert found["distinct_2"] == 6 / 10
    assert (found["top_opening"], found["opening"]) == (0.5, "i love a")
    assert found["openings"] == [["i love a", 0.5], ["so do i", 0.5]]
    assert found["repeated"] == 0.5


def test_no_words_are_no_variety():
    found = variety(["", "!"])
    assert (found["distinct_1"], found["distinct_2"], found["repeated"]) == (0.0, 0.0, 0.0)
    assert (found["top_opening"], found["opening"]) == (1.0, "")


def test_a_contraction_is_one_word():
    assert variety(["I'm so glad", "I’m so sad"])["opening"] == "i'm so glad"


def test_characters_of_a_script_without_spaces_are_words():
    found = variety(["我喜欢猫", "我喜欢狗"])
    assert (found["opening"], found["top_opening"]) == ("我 喜 欢", 1.0)
    assert found["distinct_1"] == 5 / 8
