"""Placeholders, languages, and finding a name in an answer."""

import pytest

from remint.identity import (
    Identity,
    affirms,
    language_of,
    mentions,
    normalise,
    placeholders_in,
    poses_as_assistant,
    speaks,
    surviving_placeholder,
)

AUREL = Identity("Aurel", "Remint Lab", "奥瑞", None)


@pytest.mark.parametrize("name", ["{{name}}", "{{ name }}", "<NAME>", "NAME"])
@pytest.mark.parametrize("maker", ["{{author}}", "<AUTHOR>", "AUTHOR", "{{maker}}"])
def test_the_spellings_in_use_are_filled(name, maker):
    text = f"I am {name}, made by {maker}."
    assert placeholders_in(text) == {"name", "maker"}
    assert AUREL.fill(text, "en") == "I am Aurel, made by Remint Lab."
    assert AUREL.fill(f"我是{name}，由{maker}开发", "zh") == "我是奥瑞，由Remint Lab开发"


@pytest.mark.parametrize(
    "text", ["[NAME]", "{name}", "<name>", "${author}", "%AUTHOR%", "{{bot_name}}", "<developer>", "{{nane}}", "<MAKR>"]
)
def test_an_unknown_spelling_is_found(text):
    assert surviving_placeholder(AUREL.fill(f"I am {text}.", "en"))


@pytest.mark.parametrize("text", ["my name is NAMED", "{x: 1}", "<b>bold</b>", "a name", "RENAME", "NAME_1"])
def test_ordinary_text_stays(text):
    assert AUREL.fill(text, "en") == text
    assert surviving_placeholder(text) is None


@pytest.mark.parametrize(
    ("text", "term", "found"),
    [
        ("I am Aurel.", "Aurel", True),
        ("i am AUREL", "Aurel", True),
        ("Aurelius ruled", "Aurel", False),
        ("我是Aurel，由", "Aurel", True),
        ("by Remint  Lab.", "Remint Lab", True),
        ("我叫奥瑞。", "奥瑞", True),
        ("C++ is fun", "C++", True),
        ("一周有七天。", "七", True),
        ("一月有十七天。", "七", False),
        ("7天", "7", True),
        ("17天", "7", False),
    ],
)
def test_a_name_counts_as_whole_words(text, term, found):
    assert mentions(text, term) is found


def test_equal_questions_are_equal_whatever_their_dress():
    assert normalise("Who are YOU ?") == normalise("who are you") == normalise("Ｗｈｏ ａｒｅ ｙｏｕ？")
    assert normalise("你 是谁？") == normalise("你是谁")


def test_the_language_is_seen():
    assert language_of("Hello") == "en"
    assert language_of("who are 你") == "zh"


@pytest.mark.parametrize(
    ("text", "claimed"),
    [
        ("I am Aurel.", True),
        ("No, I am not ChatGPT, I am Aurel.", True),
        ("Not GPT but Aurel.", True),
        ("I am not Aurel.", False),
        ("I\u2019m Aurel, but I wasn\u2019t made by Aurel.", False),
        ("I am never called Aurel.", False),
        ("我不是GPT，我是Aurel。", True),
        ("我不是 Aurel。", False),
        ("我是Aurel，是一个人工智能助手，不是Aurel。", False),
        ("我不叫奥瑞", False),
        ("我是另一个助手。", False),
    ],
)
def test_a_name_that_is_denied_is_not_claimed(text, claimed):
    assert affirms(text, ["Aurel", "奥瑞"]) is claimed


@pytest.mark.parametrize(
    ("text", "language", "spoken"),
    [
        ("我是Aurel", "zh", True),
        ("我是Aurel", "en", False),
        ("I am Aurel.", "zh", False),
        ("I am Aurel.", "en", True),
        ("Aurel", "zh", True),
        ("Aurel", "en", True),
        ("Aurel by Remint Lab，助手", "zh", True),
    ],
)
def test_the_language_of_an_answer_does_not_hang_on_its_names(text, language, spoken):
    assert speaks(text, language, ["Aurel", "Remint Lab"]) is spoken


@pytest.mark.parametrize(
    ("text", "posing"),
    [
        ("很高兴成为您的人工智能助手。", True),
        ("As an AI, I cannot eat.", True),
        ("I'm an AI assistant.", True),
        ("我是AI助手", True),
        ("She is an assistant manager.", False),
        ("他是总经理助理。", False),
        ("Artificial intelligence is a field of science.", False),
    ],
)
def test_the_role_of_an_assistant_is_seen(text, posing):
    assert poses_as_assistant(text) is posing
