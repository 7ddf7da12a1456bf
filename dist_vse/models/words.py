"""How a caption is split into words: by a rule of our own, or nearly as NLTK does it."""

import re
import unicodedata
from collections.abc import Callable

# A run of letters and digits with inner apostrophes; else any single character but a space, so
# that punctuation, combining marks and emoji are kept.
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")

# A sentence ends at a full stop before a space, but not behind these.
_ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "st", "vs", "jr", "sr", "no", "u.s", "p.m", "a.m")
_SENTENCE_END = re.compile(
    "".join(rf"(?<!\b{re.escape(word)}\.)" for word in _ABBREVIATIONS) + r"(?<=[.?!])\s+"
)
_CLITICS = r"n't|'(?:s|m|d|ll|re|ve)?"
_SPLITS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(^|[\s(\[{<])(?:\"|'')", r"\1 `` "),  # an opening quotation mark
        (r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
        (r"([\u00ab\u00bb\u2018\u2019\u201c\u201d\u201e]|`+)", r" \1 "),
        (r"([:,])(?!\d)", r" \1 "),
        (r"(\.{2,}|--|[;@#$%&?!*\[\](){}<>\u2012-\u2015])", r" \1 "),
        (r"(?<=[^.])\.(?=[\])}>\"'\s]*$)", " . "),  # the last full stop; others belong to words
        (r"(?<=[^'])'(?=\s)", " ' "),
        (r"(?:\"|'')", " '' "),
        (rf"(?<=[^'\s])({_CLITICS})(?=\s|$)", r" \1"),
        (r"\b(can)(not)\b", r"\1 \2"),
        (r"\b(gim|lem)(me)\b", r"\1 \2"),
        (r"\b(gon|wan)(na)\b", r"\1 \2"),
        (r"\b(got)(ta)\b", r"\1 \2"),
    )
)


def split_plain(caption: str) -> list[str]:
    """Split a caption into case-folded words and single symbols."""
    return _WORD.findall(unicodedata.normalize("NFKC", caption).casefold())


def split_treebank(caption: str) -> list[str]:
    """Split a caption nearly as NLTK's word_tokenize does, with which VSE++ and ConVSE count words.

    The conventions are the Penn Treebank's: "man's" is two words, "isn't" is "is" and "n't".
    Sentences end where a rule says so, while NLTK has a trained model for that.
    """
    words: list[str] = []
    for sentence in _SENTENCE_END.split(caption.lower().strip()):
        for pattern, replacement in _SPLITS:
            sentence = pattern.sub(replacement, sentence)
        words += sentence.split()
    return words


WORD_RULES: dict[str, Callable[[str], list[str]]] = {
    "plain": split_plain,
    "treebank": split_treebank,
}
