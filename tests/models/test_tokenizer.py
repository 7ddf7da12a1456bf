"""Tokenizers: ids, padding, cuts, files, workers, errors."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dist_vse.common.errors import UserError
from dist_vse.config import TextConfig, encoders
from dist_vse.models.tokenizer import (
    PretrainedTokenizer,
    WordTokenizer,
    build_tokenizer,
    build_vocabulary,
)
from dist_vse.models.words import WORD_RULES, split_plain
from tests.support.tiny_models import write_tiny_bert

CAPTIONS = ["A red square.", "a blue square on a red one", "a circle"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's Dog, running!", ["a", "man's", "dog", ",", "running", "!"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("ein Café 24/7", ["ein", "café", "24", "/", "7"]),
        ("🍎 ?", ["🍎", "?"]),
        (" \t\n", []),
    ],
)
def test_split_words(caption: str, words: list[str]) -> None:
    assert split_plain(caption) == words


def test_composed_and_decomposed_accents_are_one_word() -> None:
    assert split_plain("cafe\u0301") == split_plain("caf\u00e9")


@given(st.text())
def test_split_words_loses_nothing_but_space(caption: str) -> None:
    assert bool(split_plain(caption)) == bool(caption.strip())


def test_vocabulary_is_by_count_then_word() -> None:
    assert build_vocabulary(CAPTIONS, 1) == [
        "a", "red", "square", ".", "blue", "circle", "on", "one",
    ]  # fmt: skip
    assert build_vocabulary(reversed(CAPTIONS), 2) == ["a", "red", "square"]
    with pytest.raises(UserError, match=r"occurs 9 times.*min_count"):
        build_vocabulary(CAPTIONS, 9)


def test_word_ids() -> None:
    tokenizer = WordTokenizer(["a", "red", "square"], max_tokens=5)
    ids = tokenizer(["A red square", "blue", "a a a a a a"])
    assert ids.tolist() == [[1, 4, 5, 6, 2], [1, 3, 2, 0, 0], [1, 4, 4, 4, 2]]
    assert ids.dtype == torch.int64
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, 7)
    assert tokenizer([]).shape == (0, 0)


def test_word_tokenizer_survives_file_and_pickle(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(build_vocabulary(["🍎 straße", *CAPTIONS], 1), max_tokens=7)
    tokenizer.save(tmp_path / "words.json")
    for copy in (
        WordTokenizer.load(tmp_path / "words.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy.vocabulary == tokenizer.vocabulary
        assert torch.equal(copy(CAPTIONS), tokenizer(CAPTIONS))


def test_word_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 3"):
        WordTokenizer(["a"], max_tokens=2)
    with pytest.raises(UserError, match=r"caption 2 of 2 is empty \('  '\)"):
        WordTokenizer(["a"], max_tokens=4)(["a", "  "])
    with pytest.raises(UserError, match=r"none\.json: no such vocabulary"):
        WordTokenizer.load(tmp_path / "none.json")
    for content in ("{", "[]", '{"max_tokens": 4}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json: not a vocabulary"):
            WordTokenizer.load(tmp_path / "bad.json")


def test_pretrained_ids_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path)
    tokenizer = PretrainedTokenizer(folder, max_tokens=6)
    captions = ["a red square", "a blue square on a red circle", "purple"]
    expected = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        captions, padding=True, truncation=True, max_length=6, return_tensors="pt"
    )
    assert torch.equal(tokenizer(captions), expected["input_ids"])
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, 11)
    with pytest.raises(UserError, match="caption 1 of 1 is empty"):
        tokenizer([""])


def test_worker_needs_no_transformers(tmp_path: Path) -> None:
    tokenizer = PretrainedTokenizer(write_tiny_bert(tmp_path), max_tokens=6)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer))
    code = (
        "import pickle, sys\n"
        "tokenizer = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(tokenizer(['a red', 'blue']).tolist(), {'transformers', 'timm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.pkl")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "[[2, 4, 5, 3], [2, 6, 3, 0]] set()\n"


def test_pretrained_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        PretrainedTokenizer(tmp_path / "nowhere", max_tokens=6)
    with pytest.raises(UserError, match="its tokenizer does not load"):
        PretrainedTokenizer(tmp_path, max_tokens=6)
    folder = write_tiny_bert(tmp_path / "bert")
    with pytest.raises(UserError, match=r"max_tokens \(17\) is more than the 16"):
        PretrainedTokenizer(folder, max_tokens=17)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="padding token"):
        PretrainedTokenizer(folder, max_tokens=6)


def test_build_tokenizer_counts_captions_only_when_it_must(tmp_path: Path) -> None:
    def unread() -> list[str]:
        raise AssertionError("the captions were read")

    first = build_tokenizer(TextConfig(kind="gru"), lambda: CAPTIONS, None)
    again = build_tokenizer(TextConfig(kind="gru"), unread, first.vocabulary)
    assert torch.equal(first(CAPTIONS), again(CAPTIONS))
    bert = TextConfig(kind="pretrained", weights=str(write_tiny_bert(tmp_path)), max_tokens=8)
    assert build_tokenizer(bert, unread, None)(["a red"]).tolist() == [[2, 4, 5, 3]]


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # as NLTK 3.9 splits them
        ("A man's dog isn't here.", ["a", "man", "'s", "dog", "is", "n't", "here", "."]),
        ('It\'s "big" (5:30)!', ["it", "'s", "``", "big", "''", "(", "5:30", ")", "!"]),
        ("1,000 cats, 50% cats", ["1,000", "cats", ",", "50", "%", "cats"]),
        ("The dogs' bowl -- cannot", ["the", "dogs", "'", "bowl", "--", "can", "not"]),
        ("he said 'hello' there...", ["he", "said", "'", "hello", "'", "there", "..."]),
        ("a t-shirt costs $5.50", ["a", "t-shirt", "costs", "$", "5.50"]),
        ("A man. He runs; mr. smith", ["a", "man", ".", "he", "runs", ";", "mr.", "smith"]),
    ],
)  # fmt: skip
def test_treebank_words(caption: str, words: list[str]) -> None:
    assert WORD_RULES["treebank"](caption) == words


def test_every_rule_of_the_config_exists_and_goes_through_the_file(tmp_path: Path) -> None:
    assert tuple(WORD_RULES) == encoders.WORD_RULES
    config = TextConfig(kind="gru", words="treebank")
    tokenizer = build_tokenizer(config, lambda: ["a man's dog"], None)
    assert tokenizer.vocabulary == ["'s", "a", "dog", "man"]
    assert isinstance(tokenizer, WordTokenizer)
    tokenizer.save(tmp_path / "v.json")
    again = WordTokenizer.load(tmp_path / "v.json")
    assert torch.equal(again(["dog's"]), tokenizer(["dog's"]))
    named = TextConfig(kind="gru", words="treebank", vocabulary=str(tmp_path / "v.json"))
    taken = build_tokenizer(named, lambda: ["another"], None)
    assert taken.vocabulary == tokenizer.vocabulary
    assert torch.equal(taken(["dog's"]), tokenizer(["dog's"]))
