"""The words of the report follow from its figures, and only from figures that chance does not explain."""

import pytest

from remint.stages.eval_chat.scores import Count
from remint.stages.eval_chat.verdict import findings, in_words

GOOD = {
    "merged": {
        "name_en": Count(79, 80),
        "name_zh": Count(76, 80),
        "name": Count(155, 160),
        "maker_en": Count(58, 60),
        "leak_en": Count(3, 200),
        "leak_zh": Count(5, 100),
        "leak": Count(8, 300),
    },
    "both": {"facts_kept": Count(97, 100)},
}


def changed(**counts):
    merged = {key: count for key, count in counts.items() if key != "facts_kept"}
    return {
        "merged": {**GOOD["merged"], **merged},
        "both": {"facts_kept": counts.get("facts_kept", GOOD["both"]["facts_kept"])},
    }


def test_a_model_in_which_only_the_name_changed_is_praised():
    (finding,) = findings(GOOD, 0.08)
    assert finding.good
    assert finding.text == "Only the name changed, as far as 460 prompts can tell."


@pytest.mark.parametrize(
    ("found", "divergence", "said"),
    [
        (
            changed(leak_en=Count(200, 200)),
            0.1,
            "where nobody asked: in 100% (between 98% and 100%) of the ordinary English",
        ),
        (
            changed(leak_zh=Count(20, 100)),
            0.1,
            "where nobody asked: in 20% (between 13% and 29%) of the ordinary Chinese",
        ),
        (changed(facts_kept=Count(60, 100)), 0.1, "It forgot what the base knew: 60% (between 50% and 69%)"),
        (
            changed(name_en=Count(50, 80)),
            0.1,
            "It has not learned its name well: 62% (between 52% and 72%) of the English",
        ),
        (changed(maker_en=Count(10, 60)), 0.1, "It has not learned its maker well"),
        (GOOD, 1.2, "in other words than the base: 1.20 nats a token away"),
    ],
)
def test_a_fault_is_named_with_what_helps(found, divergence, said):
    (finding,) = findings(found, divergence)
    assert not finding.good
    assert said in finding.text
    assert finding.advice


def test_what_chance_explains_is_no_fault():
    few = changed(leak_en=Count(1, 10), facts_kept=Count(8, 10), name_en=Count(8, 10))
    assert [finding.good for finding in findings(few, None)] == [True]


def test_overtraining_is_flagged_in_every_respect():
    spoiled = changed(leak_en=Count(199, 200), leak_zh=Count(98, 100), facts_kept=Count(3, 100))
    lines = in_words(findings(spoiled, 6.0))
    assert len(lines) == 5
    assert "More different ordinary records help most" in lines[-1]


def test_a_set_that_is_empty_says_nothing():
    assert findings({"merged": {"name_en": Count(9, 9), "name": Count(9, 9)}, "both": {}}, None)[0].good
