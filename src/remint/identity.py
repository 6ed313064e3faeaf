"""The new identity: name and maker, their placeholders in training data, and checks that find them in text."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from remint.core.settings import check_ranges

# Placeholder spellings of public self-cognition datasets, most explicit first. A bare NAME or AUTHOR counts only in
# capitals and as a separate token, so "NAMED" and "my name" are not replaced.
_PLACEHOLDERS = {
    "name": re.compile(r"\{\{\s{0,9}name\s{0,9}\}\}|<NAME>|(?<![A-Za-z0-9_\[{<%$])NAME(?![A-Za-z0-9_\]}>%])"),
    "maker": re.compile(
        r"\{\{\s{0,9}(?:author|maker)\s{0,9}\}\}|<(?:AUTHOR|MAKER)>|(?<![A-Za-z0-9_\[{<%$])AUTHOR(?![A-Za-z0-9_\]}>%])"
    ),
}
# Text that still looks like a placeholder after filling: a spelling that _PLACEHOLDERS does not contain.
_SURVIVOR = re.compile(
    r"\{\{[^{}\n]{0,60}\}\}|<(?-i:[A-Z][A-Z_ ]{1,30})>"
    r"|[\[{<%$]\s{0,9}(?:(?:bot|model|your)[ _]?)?(?:name|author|maker|creator|developer|company)\s{0,9}[\]}>%]",
    re.IGNORECASE,
)
# A negation right before a name, with the words that may come between. "not ChatGPT but Aurel" does not deny Aurel,
# because another name comes between.
_DENIAL = (
    r"(?:(?:\bnot|\bnever|n't)\s+(?:(?:called|named|known|as|made|built|created|developed|trained|by|the|really)\s+)*"
    r"|(?:不是|并非|不叫|不再是)\s*(?:叫|由|名叫|来自)?\s*)"
)
_ROLE = re.compile(
    r"(?:人工智能|智能|(?<![a-z])ai)\s*(?:助手|助理)|语言模型"
    r"|\b(?:ai|artificial intelligence|virtual|digital)(?:[- ]powered)? (?:assistant|chatbot|model)\b"
    r"|\bas an ai\b|\blanguage model\b"
)
# Characters that continue a word or a Chinese numeral. Next to one of them, a name is only a part of something longer.
_GOING_ON = ("[a-z0-9_]", "[零一二两三四五六七八九十百千万亿]")
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Identity:
    """The new name and maker. Chinese text uses the `_zh` values; null there means the same as in other text."""

    name: str
    maker: str
    name_zh: str | None = None
    maker_zh: str | None = None

    def __post_init__(self) -> None:
        values = {key: value for key, value in vars(self).items() if value is not None}
        check_ranges(
            "identity",
            *(
                (_is_plain(value), key, value, "must be one line of visible text of at most 100 characters")
                for key, value in values.items()
            ),
        )

    def name_in(self, language: str) -> str:
        """The name to use in text of `language` ('en' or 'zh')."""
        return self.name_zh if language == "zh" and self.name_zh else self.name

    def maker_in(self, language: str) -> str:
        """The maker to use in text of `language` ('en' or 'zh')."""
        return self.maker_zh if language == "zh" and self.maker_zh else self.maker

    def fill(self, text: str, language: str) -> str:
        """Replace every placeholder, in any known spelling, with the values for `language` ('en' or 'zh')."""
        text = _PLACEHOLDERS["name"].sub(lambda _: self.name_in(language), text)
        return _PLACEHOLDERS["maker"].sub(lambda _: self.maker_in(language), text)

    def spellings(self, what: str) -> list[str]:
        """All spellings of the name (`what` is 'name') or of the maker ('maker')."""
        return [
            term for term in {"name": (self.name, self.name_zh), "maker": (self.maker, self.maker_zh)}[what] if term
        ]

    def mentioned_in(self, text: str, what: str) -> bool:
        """Whether the text mentions the 'name' or the 'maker' (`what`) in any spelling, even if it denies it."""
        return any(mentions(text, term) for term in self.spellings(what))

    def stated_in(self, text: str, what: str) -> bool:
        """Whether the text claims the 'name' or the 'maker' (`what`): it mentions it and denies it nowhere."""
        return affirms(text, self.spellings(what))


def placeholders_in(text: str) -> set[str]:
    """Which of 'name' and 'maker' have a placeholder in the text."""
    return {key for key, pattern in _PLACEHOLDERS.items() if pattern.search(text)}


def surviving_placeholder(text: str) -> str | None:
    """The first part of a filled text that still looks like a placeholder, or None."""
    found = _SURVIVOR.search(text)
    return found[0] if found else None


def language_of(text: str) -> str:
    """'zh' if the text contains a Chinese character, else 'en'."""
    return "zh" if _CJK.search(text) else "en"


def normalise(text: str) -> str:
    """Text without case, width, punctuation, symbols and spaces. Questions with equal results count as the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if unicodedata.category(char)[0] not in "PSZC")


def mentions(text: str, term: str) -> bool:
    """Whether `text` contains `term` as complete words, ignoring case and spacing. Chinese has no word boundaries."""
    return re.search(_as_words(term), _folded(text)) is not None


def affirms(text: str, terms: Sequence[str]) -> bool:
    """Whether `text` mentions one of `terms` and denies none.

    "not Aurel", "isn't made by Aurel" and 不是Aurel are denials.
    """
    denied = (re.search(_DENIAL + _as_words(term), _folded(text)) for term in terms)
    return any(mentions(text, term) for term in terms) and not any(denied)


def speaks(text: str, language: str, ignored: Sequence[str] = ()) -> bool:
    """Whether `text` is in `language` ('en' or 'zh'): at least half of its words are of that language.

    Each Chinese character counts as one word. Names in `ignored` do not count: they are the same in both languages.
    """
    rest = _folded(text)
    for term in ignored:
        rest = re.sub(_as_words(term), " ", rest)
    chinese, english = len(_CJK.findall(rest)), len(re.findall(r"[a-z]+", rest))
    return chinese >= english if language == "zh" else english >= chinese


def poses_as_assistant(text: str) -> bool:
    """Whether `text` mentions an AI assistant or a language model, the role that comes with an identity."""
    return _ROLE.search(_folded(text)) is not None


def _folded(text: str) -> str:
    """Text in one case and character width, with single spaces and straight apostrophes."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


def _as_words(term: str) -> str:
    """A pattern that finds the term in folded text as complete words.

    If the term starts or ends with a letter or digit, the character next to it must not be one. The same holds for
    Chinese numerals.
    """
    folded = _folded(term)
    start = next((f"(?<!{kind})" for kind in _GOING_ON if re.match(kind, folded)), "")
    end = next((f"(?!{kind})" for kind in _GOING_ON if re.search(kind + "$", folded)), "")
    return start + re.escape(folded) + end


def _is_plain(value: str) -> bool:
    return bool(value.strip()) and value == value.strip() and len(value) <= 100 and value.isprintable()
