"""Who the model is to become: the name, the maker, the placeholders that stand for them, and how to find them again."""

import re
import unicodedata
from dataclasses import dataclass

from remint.core.config import check

# The spellings that public self-cognition data sets use, most explicit first. The bare words count only where they
# stand alone in capitals, so that "NAMED" or "my name" stay as they are.
_PLACEHOLDERS = {
    "name": re.compile(r"\{\{\s*name\s*\}\}|<NAME>|(?<![A-Za-z0-9_\[{<%$])NAME(?![A-Za-z0-9_\]}>%])"),
    "maker": re.compile(
        r"\{\{\s*(?:author|maker)\s*\}\}|<(?:AUTHOR|MAKER)>|(?<![A-Za-z0-9_\[{<%$])AUTHOR(?![A-Za-z0-9_\]}>%])"
    ),
}
# What still looks like a placeholder after filling: a spelling that nobody taught the loader.
_SURVIVOR = re.compile(
    r"[\[{<%$]+\s*(?:(?:bot|model|your)[ _]?)?(?:name|author|maker|creator|developer|company)\s*[\]}>%]+", re.IGNORECASE
)
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Identity:
    """The new name and maker; the `_zh` values are used in Chinese text, null means the same as the other."""

    name: str
    maker: str
    name_zh: str | None
    maker_zh: str | None

    def __post_init__(self) -> None:
        values = {key: value for key, value in vars(self).items() if value is not None}
        check(
            "identity",
            *((_is_plain(value), key, value, "must be one line of visible text") for key, value in values.items()),
        )

    def names(self, language: str) -> str:
        """The name used in text of that language ('en' or 'zh')."""
        return self.name_zh if language == "zh" and self.name_zh else self.name

    def makers(self, language: str) -> str:
        """The maker used in text of that language ('en' or 'zh')."""
        return self.maker_zh if language == "zh" and self.maker_zh else self.maker

    def fill(self, text: str, language: str) -> str:
        """Replace every placeholder, in any of the known spellings."""
        text = _PLACEHOLDERS["name"].sub(lambda _: self.names(language), text)
        return _PLACEHOLDERS["maker"].sub(lambda _: self.makers(language), text)

    def named_in(self, text: str) -> bool:
        """Whether the text states the name, in either language's spelling."""
        return any(mentions(text, name) for name in {self.name, self.name_zh} if name)

    def maker_in(self, text: str) -> bool:
        """Whether the text states the maker, in either language's spelling."""
        return any(mentions(text, maker) for maker in {self.maker, self.maker_zh} if maker)


def placeholders_in(text: str) -> set[str]:
    """Which of 'name' and 'maker' the text asks for."""
    return {key for key, pattern in _PLACEHOLDERS.items() if pattern.search(text)}


def surviving_placeholder(text: str) -> str | None:
    """The first thing that still looks like a placeholder in filled text, or None."""
    found = _SURVIVOR.search(text)
    return found[0] if found else None


def language_of(text: str) -> str:
    """'zh' if the text holds a Chinese character, else 'en'."""
    return "zh" if _CJK.search(text) else "en"


def normalise(text: str) -> str:
    """Text with case, width, punctuation, symbols and spaces removed: equal results are the same question."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if unicodedata.category(char)[0] not in "PSZC")


def mentions(text: str, term: str) -> bool:
    """Whether `term` occurs in `text` as whole words, whatever the case and the spaces; Chinese has no word ends.

    A name of only symbols cannot be found this way and is compared as it is.
    """
    folded_term = " ".join(unicodedata.normalize("NFKC", term).casefold().split())
    folded_text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start = r"(?<![a-z0-9_])" if re.match(r"[a-z0-9_]", folded_term) else ""
    end = r"(?![a-z0-9_])" if re.search(r"[a-z0-9_]$", folded_term) else ""
    return re.search(start + re.escape(folded_term) + end, folded_text) is not None


def _is_plain(value: str) -> bool:
    return bool(value.strip()) and value == value.strip() and len(value) <= 100 and value.isprintable()
