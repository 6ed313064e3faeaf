"""Who the model is to become: the name, the maker, the placeholders that stand for them, and how to find them again."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from remint.core.settings import check_ranges

# The spellings that public self-cognition data sets use, most explicit first. The bare words count only where they
# stand alone in capitals, so that "NAMED" or "my name" stay as they are.
_PLACEHOLDERS = {
    "name": re.compile(r"\{\{\s{0,9}name\s{0,9}\}\}|<NAME>|(?<![A-Za-z0-9_\[{<%$])NAME(?![A-Za-z0-9_\]}>%])"),
    "maker": re.compile(
        r"\{\{\s{0,9}(?:author|maker)\s{0,9}\}\}|<(?:AUTHOR|MAKER)>|(?<![A-Za-z0-9_\[{<%$])AUTHOR(?![A-Za-z0-9_\]}>%])"
    ),
}
# What still looks like a placeholder after filling: a spelling that nobody taught the loader.
_SURVIVOR = re.compile(
    r"\{\{[^{}\n]{0,60}\}\}|<(?-i:[A-Z][A-Z_ ]{1,30})>"
    r"|[\[{<%$]\s{0,9}(?:(?:bot|model|your)[ _]?)?(?:name|author|maker|creator|developer|company)\s{0,9}[\]}>%]",
    re.IGNORECASE,
)
# What stands between a "not" and the name that it denies. In "not ChatGPT but Aurel" another name stands there.
_DENIAL = (
    r"(?:(?:\bnot|\bnever|n't)\s+(?:(?:called|named|known|as|made|built|created|developed|trained|by|the|really)\s+)*"
    r"|(?:不是|并非|不叫|不再是)\s*(?:叫|由|名叫|来自)?\s*)"
)
_ROLE = re.compile(
    r"(?:人工智能|智能|(?<![a-z])ai)\s*(?:助手|助理)|语言模型"
    r"|\b(?:ai|artificial intelligence|virtual|digital)(?:[- ]powered)? (?:assistant|chatbot|model)\b"
    r"|\bas an ai\b|\blanguage model\b"
)
_GOING_ON = ("[a-z0-9_]", "[零一二两三四五六七八九十百千万亿]")
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Identity:
    """The new name and maker; the `_zh` values are used in Chinese text, null means the same as the other."""

    name: str
    maker: str
    name_zh: str | None = None
    maker_zh: str | None = None

    def __post_init__(self) -> None:
        values = {key: value for key, value in vars(self).items() if value is not None}
        check_ranges(
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

    def spellings(self, what: str) -> list[str]:
        """The spellings of the name (`what` is 'name') or of the maker ('maker')."""
        return [
            term for term in {"name": (self.name, self.name_zh), "maker": (self.maker, self.maker_zh)}[what] if term
        ]

    def mentioned_in(self, text: str, what: str) -> bool:
        """Whether the text holds the 'name' or the 'maker', in any spelling and whatever it says of it."""
        return any(mentions(text, term) for term in self.spellings(what))

    def stated_in(self, text: str, what: str) -> bool:
        """Whether the text claims the 'name' or the 'maker': it mentions and nowhere denies it."""
        return affirms(text, self.spellings(what))


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
    """Whether `term` occurs in `text` as whole words, whatever the case and the spaces; Chinese has no word ends."""
    return re.search(_as_words(term), _folded(text)) is not None


def affirms(text: str, terms: Sequence[str]) -> bool:
    """Whether `text` mentions one of `terms` and denies none, as "not Aurel", "isn't made by Aurel" or 不是Aurel do."""
    denied = (re.search(_DENIAL + _as_words(term), _folded(text)) for term in terms)
    return any(mentions(text, term) for term in terms) and not any(denied)


def speaks(text: str, language: str, ignored: Sequence[str] = ()) -> bool:
    """Whether `text` is in the language ('en' or 'zh'): as many of its words as of the other's, a character being one.

    `ignored` are names, which are the same in both languages.
    """
    rest = _folded(text)
    for term in ignored:
        rest = re.sub(_as_words(term), " ", rest)
    chinese, english = len(_CJK.findall(rest)), len(re.findall(r"[a-z]+", rest))
    return chinese >= english if language == "zh" else english >= chinese


def poses_as_assistant(text: str) -> bool:
    """Whether `text` speaks of an AI assistant or language model: the role that comes with an identity."""
    return _ROLE.search(_folded(text)) is not None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


def _as_words(term: str) -> str:
    """A pattern for the folded term. Letters and digits must not go on beyond its ends, nor a Chinese number."""
    folded = _folded(term)
    start = next((f"(?<!{kind})" for kind in _GOING_ON if re.match(kind, folded)), "")
    end = next((f"(?!{kind})" for kind in _GOING_ON if re.search(kind + "$", folded)), "")
    return start + re.escape(folded) + end


def _is_plain(value: str) -> bool:
    return bool(value.strip()) and value == value.strip() and len(value) <= 100 and value.isprintable()
