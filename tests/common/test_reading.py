"""Files that somebody else made, or that a crash has damaged."""

import os
from pathlib import Path

import pytest

from dist_vse.common import reading
from dist_vse.common.reading import (
    BadFileError,
    is_count,
    is_file_name,
    is_number,
    json_lines,
    lines_from_end,
)

BAD = {
    "empty": b"",
    "cut": b'{"step": 1',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "long integer": b'{"a": ' + b"9" * 10_000 + b"}",
    "list": b"[]",
    "number": b"5",
    "null": b"null",
}


@pytest.mark.parametrize("kind", BAD)
def test_whatever_a_file_holds_is_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(BAD[kind])
    with pytest.raises(BadFileError) as caught:
        reading.read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing", tmp_path / ("x" * 300)):
        with pytest.raises(BadFileError):
            reading.read_json(path)
        with pytest.raises(BadFileError):
            reading.read_text(path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 36)  # a sparse one
    with pytest.raises(BadFileError, match="has more than 1,000 bytes"):
        reading.read_json(tmp_path / "x.json", max_bytes=1000)


def test_bad_lines_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 17)
    too_long = b'{"x": "' + b"a" * 300_000 + b'"}'
    lines = [b'{"n": 1}', *BAD.values(), too_long, b'{"n": 2}', b'{"n": 3']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = list(json_lines(tmp_path / "x.jsonl"))
    assert found == [(1, {"n": 1}), (len(lines) - 1, {"n": 2})]
    assert list(json_lines(tmp_path / "none.jsonl")) == []


def test_names_stay_in_the_folder() -> None:
    assert is_file_name("train-00000.tar") and is_file_name("..a")
    for value in ("", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", None, 5):
        assert not is_file_name(value)


def test_numbers_are_checked() -> None:
    assert is_number(1.5) and is_number(0, least=0) and is_count(0) and is_count(3)
    for value in (True, "1", None, float("nan"), float("inf"), [1]):
        assert not is_number(value) and not is_count(value)
    assert not is_number(-1, least=0) and not is_count(-1) and not is_count(1.0)
    assert not is_count(1 << 63)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 16])
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a", b"a\n", b"a\nbc\n\ndefghi", b"\nlonger than a block\n\n"]
)
def test_lines_from_the_end(
    content: bytes, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block)
    (tmp_path / "x").write_bytes(content)
    assert list(lines_from_end(tmp_path / "x")) == content.split(b"\n")[::-1]
    assert list(lines_from_end(tmp_path / "missing")) == []


def test_a_line_that_is_too_long_is_empty_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 4)
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 10)
    (tmp_path / "x").write_bytes(b"a\n" + b"b" * 30 + b"\nc\n" + b"d" * 30)
    assert list(lines_from_end(tmp_path / "x")) == [b"", b"c", b"", b"a"]


def _array(descr: str, shape: tuple[int, ...]) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8',",
        b"\x93NUMPY\x01\x00\x04\x00('x\n",
        b"\x93NUMPY\x01\x00\x05\x00\xff{}[(",
        b"\x80\x04N.",
        b"PK\x05\x06" + bytes(18),
        _array("<f4", (1 << 40, 1 << 10)),
        *(_array(descr, (2,)) for descr in ("<U2", "<c8", "<M8[s]", "|O")),
    ],
)
def test_whatever_an_array_holds_is_one_kind_of_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(BadFileError) as caught:
        reading.read_array(tmp_path / "x.npy")
    assert "\n" not in str(caught.value)
