"""Sources read their formats to the letter, and say where a file departs from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_vse.common.errors import UserError
from dist_vse.shards.record import Record
from dist_vse.shards.sources.flickr import read_flickr
from dist_vse.shards.sources.folder import read_folder
from dist_vse.shards.sources.jsonl import read_jsonl
from dist_vse.shards.sources.karpathy import read_karpathy
from tests.support.datasets import draw, encode
from tests.support.shards import COCO, karpathy_sentences


def _image(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw(number)))
    return path


FLICKR = {
    "images": [
        {
            "filename": "1000092795.jpg",
            "split": "val",
            **karpathy_sentences(0, [f"Two young guys with shaggy hair, {i}." for i in range(5)]),
        }
    ],
    "dataset": "flickr30k",
}


def test_only_the_forms_with_commas_unquote(tmp_path: Path) -> None:
    said = '"Go" or "Stop"'
    path = tmp_path / "captions"
    for text, caption in (
        (f"1.jpg#0\t{said}\n", said),
        (f"image_name| comment_number| comment\n1.jpg| 0| {said}\n", said),
        ('image,caption\n1.jpg,"""Go"" or ""Stop"""\n', said),
        ('image_name,comment_number,comment\n1.jpg, 0,"Go, or stop"\n', "Go, or stop"),
    ):
        path.write_text(text)
        (record,) = read_flickr(path)
        assert record.captions == (caption,)


def _json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_karpathy_coco(tmp_path: Path) -> None:
    path = _json(tmp_path / "dataset_coco.json", COCO)
    (tmp_path / "coco").mkdir()
    six, seven, train = read_karpathy(path, images=tmp_path / "coco")
    assert six == Record(
        image=str(tmp_path / "coco/val2014/COCO_val2014_000000391895.jpg"),
        captions=tuple(f"A man rides a motor bike, take {i}." for i in range(6)),
        split="test",
        key="COCO_val2014_000000391895",
        extra={
            "filename": "COCO_val2014_000000391895.jpg",
            "imgid": 0,
            "cocoid": 391895,
            "sentids": [0, 1, 2, 3, 4, 5],
        },
    )
    assert len(seven.captions) == 7
    assert seven.captions[0] == "A woman cuts a cake, take 0."
    assert [r.split for r in (six, seven, train)] == ["test", "train", "train"]
    assert Path(train.image).parent.name == "train2014"


def test_karpathy_restval_may_stay_its_own_split(tmp_path: Path) -> None:
    path = _json(tmp_path / "dataset_coco.json", COCO)
    assert [r.split for r in read_karpathy(path, restval="restval")] == ["test", "restval", "train"]


def test_karpathy_flickr_has_no_filepath_and_no_cocoid(tmp_path: Path) -> None:
    (record,) = read_karpathy(_json(tmp_path / "dataset_flickr30k.json", FLICKR))
    assert record.image == str(tmp_path / "1000092795.jpg")
    assert record.key == "1000092795"
    assert record.extra == {
        "filename": "1000092795.jpg",
        "imgid": 0,
        "sentids": [0, 1, 2, 3, 4],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": ', "no JSON"),
        ("[]", 'no list "images"'),
        ('{"images": [{"filename": "a.jpg", "split": "val"}]}', r"images\[0\].*'sentences'"),
        ('{"images": ["a.jpg"]}', r"images\[0\] is not of Karpathy's format"),
    ],
)
def test_karpathy_names_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_karpathy(path))


def test_folder_takes_its_sub_folders_as_splits(tmp_path: Path) -> None:
    for name in ("train/b/2.png", "train/1.jpg", "val/1.PNG"):
        _image(tmp_path / name)
    (tmp_path / "train/1.txt").write_bytes("\ufeffone line\r\n\n  and another \n\n".encode())
    (tmp_path / "train/notes.txt").write_text("no image beside me")
    records = list(read_folder(tmp_path))
    assert [(r.key, r.split, r.captions) for r in records] == [
        ("train/1", "train", ("one line", "and another")),
        ("train/b/2", "train", ()),
        ("val/1", "val", ()),
    ]


def test_only_line_ends_part_captions(tmp_path: Path) -> None:
    """Unicode knows more of them, which people paste into captions."""
    odd = "one\u2028two\x85three\x0bfour"
    _image(tmp_path / "in/a.png")
    (tmp_path / "in/a.txt").write_bytes(f"{odd}\r\nnext\n".encode())
    (record,) = read_folder(tmp_path / "in")
    assert record.captions == (odd, "next")
    tokens = tmp_path / "results.token"
    tokens.write_bytes(f"1.jpg#0\t{odd}\r\n1.jpg#1\tnext\n".encode())
    (record,) = read_flickr(tokens)
    assert record.captions == (odd, "next")


def test_folder_without_sub_folders_is_one_split(tmp_path: Path) -> None:
    _image(tmp_path / "a.webp")
    assert [r.split for r in read_folder(tmp_path)] == ["train"]
    assert [r.split for r in read_folder(tmp_path, split="val")] == ["val"]


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(read_folder(tmp_path / "none"))
    _image(tmp_path / "train/a.png")
    with pytest.raises(UserError, match="--split val conflicts with its folders train"):
        list(read_folder(tmp_path, split="val"))
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match=r"test: no images here"):
        list(read_folder(tmp_path))
    stray = _image(tmp_path / "tset/a.png")
    with pytest.raises(UserError, match=f"{stray}: lies outside the split folders"):
        list(read_folder(tmp_path))
    stray.unlink()


def test_jsonl(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"image": "a/1.jpg", "caption": "one"},
        {"image": "/b/2.jpg", "captions": ["two", "deux"], "split": "val", "key": "k", "by": "me"},
        {"image": "3.jpg"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert list(read_jsonl(path)) == [
        Record(str(tmp_path / "a/1.jpg"), ("one",), "train", "a/1"),
        Record("/b/2.jpg", ("two", "deux"), "val", "k", {"by": "me"}),
        Record(
            str(tmp_path / "3.jpg"),
            (),
            "train",
            "3",
            fault="no caption (fields: image); --caption-column chooses one",
        ),
    ]
    (tmp_path / "images").mkdir()
    (first, second, third) = read_jsonl(path, images=tmp_path / "images", split="test")
    assert first.image == str(tmp_path / "images/a/1.jpg")
    assert [first.split, second.split, third.split] == ["test", "val", "test"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"image": "a.jpg"', "no JSON"),
        (b'{"image": "\xe9.jpg"}', "no JSON"),
        (b'["a.jpg"]', "must be an object"),
        (b"[" * 100_000, "no JSON .nested deeper than 100"),
    ],
)
def test_jsonl_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"image": "0.jpg", "caption": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"pairs\.jsonl:2: .*{message}"):
        list(read_jsonl(path))
