"""The authors' vocabulary: a pickled object with a dictionary of words.

A pickle can run code, so it is read by an unpickler that knows one class, which does nothing.
"""

import pickle
from pathlib import Path

from dist_vse.common.errors import UserError, first_line
from dist_vse.models.tokenizer import SPECIALS, WordTokenizer

MAX_TOKENS = 100  # theirs are not cut
MAX_BYTES = 1 << 28


class _Words:
    """Stands for their class: an empty object whose attributes are then set."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if name == "Vocabulary":
            return _Words
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_vocabulary(path: Path) -> list[str]:
    """Return the words behind the four special ones, by their ids; from a pickle or our own JSON.

    Raises UserError if the file can't be read, or holds something else.
    """
    if path.suffix == ".json":
        return WordTokenizer.load(path).vocabulary or []
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES:,} bytes")
        with path.open("rb") as file:
            words = getattr(_Unpickler(file).load(), "word2idx", None)
        if not isinstance(words, dict) or sorted(words.values()) != list(range(len(words))):
            raise ValueError("its ids are not 0, 1, 2 …")
        by_id: list[str] = sorted(words, key=words.__getitem__)
        if tuple(by_id[: len(SPECIALS)]) != SPECIALS:
            raise ValueError(f"its first ids are not {', '.join(SPECIALS)}")
        if not all(isinstance(word, str) for word in by_id):
            raise ValueError("its words are not text")
    except (OSError, ValueError, pickle.UnpicklingError, EOFError, LookupError, TypeError,
            AttributeError, ImportError, RecursionError, MemoryError) as error:  # fmt: skip
        raise UserError(
            f"{path}: not a vocabulary of VSE++ or ConVSE ({first_line(error)}); give their "
            "*_vocab.pkl"
        ) from error
    return by_id[len(SPECIALS) :]


def tokenizer_of(words: list[str], max_tokens: int) -> WordTokenizer:
    """Return the tokenizer that splits captions nearly as theirs."""
    return WordTokenizer(words, max_tokens, "treebank")
