"""Captions to token ids: words of the training captions, or a transformers tokenizer.

Shape letters: n captions, l tokens of the longest.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import read_json
from dist_vse.config import TextConfig
from dist_vse.models.entry import import_builder
from dist_vse.models.words import WORD_RULES

# Data workers are the parallelism; the library's own threads would fight them for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")  # ids 0 to 3; no word can look like these
PAD, START, END, UNK = range(len(SPECIALS))


class Vocabulary(Protocol):
    """What the model needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def pad_id(self) -> int:
        """The id that fills short rows."""


@dataclass(frozen=True)
class AnyWords:
    """A vocabulary for a model that is built without a tokenizer."""

    vocab_size: int
    pad_id: int = 0


class Tokenizer(Protocol):
    """What the stream and the model need of a tokenizer; it must be picklable."""

    pad_id: int
    vocab_size: int
    """Ids are below this."""
    vocabulary: list[str] | None
    """Words that `build_tokenizer` needs to build the same one again; None if it needs none."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (n, l), padded on the right with `pad_id` to the longest caption."""


def build_vocabulary(captions: Iterable[str], min_count: int, rule: str = "plain") -> list[str]:
    """Return the words seen at least `min_count` times, the most frequent first, ties by word.

    `rule` is one of `WORD_RULES`.
    Raises UserError if no word is left.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(WORD_RULES[rule](caption))
    words = sorted(
        (word for word, count in counts.items() if count >= min_count),
        key=lambda word: (-counts[word], word),
    )
    if not words:
        raise UserError(
            f"no word of the training captions occurs {min_count} times ({len(counts)} different "
            "words); lower model.text.min_count or check the captions"
        )
    return words


class WordTokenizer:
    """Words to ids, between <start> and <end>; words outside the vocabulary become <unk>."""

    pad_id = PAD

    def __init__(self, vocabulary: Sequence[str], max_tokens: int, rule: str = "plain") -> None:
        """Keep `vocabulary` in its order; `max_tokens` counts <start> and <end>.

        `rule` is one of `WORD_RULES`.
        Raises UserError if a caption could hold no word.
        """
        if max_tokens < 3:
            raise UserError(
                f"model.text.max_tokens ({max_tokens}) must be at least 3: <start>, a word, <end>"
            )
        self.vocabulary: list[str] | None = list(vocabulary)
        self.vocab_size = len(SPECIALS) + len(vocabulary)
        self.max_tokens = max_tokens
        self.rule = rule
        self._ids = {word: i for i, word in enumerate(vocabulary, start=len(SPECIALS))}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (n, l), padded with `pad_id` to the longest caption.

        Raises UserError for a caption without a word.
        """
        check_captions(captions)
        room, split = self.max_tokens - 2, WORD_RULES[self.rule]
        rows = [
            [START, *(self._ids.get(word, UNK) for word in split(caption)[:room]), END]
            for caption in captions
        ]
        longest = max(map(len, rows), default=0)
        padded = [row + [PAD] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)  # (n, l)

    def save(self, path: Path) -> None:
        """Write the words and the length limit as JSON."""
        content = {
            "max_tokens": self.max_tokens,
            "rule": self.rule,
            "vocabulary": self.vocabulary,
        }
        path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "WordTokenizer":
        """Read what `save` wrote.

        Raises UserError if the file is missing or holds something else.
        """
        if not path.exists():
            raise UserError(f"{path}: no such vocabulary; give a file of WordTokenizer.save")
        try:
            content = read_json(path)
            words, max_tokens = content["vocabulary"], content["max_tokens"]
            rule = content.get("rule", "plain")
            if rule not in WORD_RULES:
                raise KeyError(rule)
            return cls(words, max_tokens, rule)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path}: not a vocabulary of WordTokenizer.save ({error!r})"
            ) from error


class PretrainedTokenizer:
    """A transformers tokenizer from a folder.

    Only its compiled part is kept: it pickles, and a worker that unpickles it does not have to
    import transformers.
    """

    vocabulary: list[str] | None = None

    def __init__(self, folder: str | Path, max_tokens: int) -> None:
        """Load the tokenizer in `folder`; longer captions are cut to `max_tokens`.

        Raises UserError if the folder holds no fast tokenizer with a padding token, or one that
        cannot take `max_tokens`.
        """
        from transformers import AutoTokenizer  # slow to import, needed here only

        if not Path(folder).is_dir():
            raise UserError(
                f"{folder}: no such folder; model.text.weights is a saved transformers model"
            )
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"{folder}: its tokenizer does not load ({first_line(error)}); save one there with "
                "tokenizer.save_pretrained"
            ) from error
        if loaded.pad_token_id is None or getattr(loaded, "backend_tokenizer", None) is None:
            raise UserError(
                f"{folder}: needs a fast tokenizer (tokenizer.json) with a padding token; "
                "set pad_token and save it again with tokenizer.save_pretrained"
            )
        if max_tokens > loaded.model_max_length:
            raise UserError(
                f"model.text.max_tokens ({max_tokens}) is more than the {loaded.model_max_length} "
                f"that the tokenizer in {folder} allows; lower it"
            )
        self.pad_id: int = loaded.pad_token_id
        self.vocab_size: int = len(loaded)
        self._tokenizer = loaded.backend_tokenizer
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(
            direction="right", pad_id=self.pad_id, pad_token=loaded.pad_token
        )

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (n, l), padded with `pad_id` to the longest caption.

        Raises UserError for a caption without a word.
        """
        check_captions(captions)
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1 if rows else 0)  # (n, l)


def build_tokenizer(
    config: TextConfig, captions: Callable[[], Iterable[str]], vocabulary: list[str] | None
) -> Tokenizer:
    """Build the tokenizer of a text encoder.

    `vocabulary` are the words of an earlier run (`Tokenizer.vocabulary`); without them they are
    counted in `captions()`, which is called only then. Raises UserError as the tokenizers do.
    """
    if config.spec.tokenizer:
        build: Callable[[str, int], Tokenizer] = import_builder(config.spec.tokenizer)
        return build(str(config.weights), config.max_tokens)
    if vocabulary is None:
        if config.vocabulary is not None:
            words = WordTokenizer.load(Path(config.vocabulary)).vocabulary
            return WordTokenizer(words or [], config.max_tokens, config.words)
        vocabulary = build_vocabulary(captions(), config.min_count, config.words)
    return WordTokenizer(vocabulary, config.max_tokens, config.words)


def check_captions(captions: Sequence[str]) -> None:
    """Raise UserError for a caption without a word."""
    for i, caption in enumerate(captions):
        if not caption.strip():
            raise UserError(
                f"caption {i + 1} of {len(captions)} is empty ({caption!r}); "
                "give every image a caption with a word"
            )
