"""Placeholders, languages, and finding a name in an answer."""

import pytest

from remint.identity import Identity, language_of, mentions, normalise, placeholders_in, surviving_placeholder

AUREL = Identity("Aurel", "Remint Lab", "奥瑞", None)


@pytest.mark.parametrize("name", ["{{name}}", "{{ name }}", "<NAME>", "NAME"])
@pytest.mark.parametrize("maker", ["{{author}}", "<AUTHOR>", "AUTHOR", "{{maker}}"])
def test_the_spellings_in_use_are_filled(name, maker):
    text = f"I am {name}, made by {maker}."
    assert placeholders_in(text) == {"name", "maker"}
    assert AUREL.fill(text, "en") == "I am Aurel, made by Remint Lab."
    assert AUREL.fill(f"我是{name}，由{maker}开发", "zh") == "我是奥瑞，由Remint Lab开发"


@pytest.mark.parametrize("text", ["[NAME]", "{name}", "<name>", "${author}", "%AUTHOR%", "{{bot_name}}", "<developer>"])
def test_a_spelling_that_nobody_knows_is_found(text):
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
