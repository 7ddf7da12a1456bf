"""Every image in a folder ends in a sample or in a line that says why not."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.record import Record
from dist_vse.shards.sources.folder import read_folder
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard

ONE = ("--workers", "1")


def _put(path: Path, caption: str | None = "x", data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw(1), "JPEG") if data is None else data)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def _skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def test_other_kinds_of_images_are_read_or_listed(tmp_path: Path) -> None:
    other = io.BytesIO()
    Image.new("RGB", (8, 8)).save(other, "PPM")
    for name in ("a.jpg", "b.jfif", "c.jpe", "d.JPEG"):
        _put(tmp_path / "in" / name)
    for name in ("e.ppm", "f.heic", "g.svg", "h.unknown"):
        _put(tmp_path / "in" / name, data=other.getvalue())
    run_shard("folder", tmp_path / "in", tmp_path / "out", "--max-bad", "4", *ONE)
    assert read_index(tmp_path / "out").split("train").num_samples == 4
    skipped = _skipped(tmp_path / "out")
    assert sorted(skipped) == ["e", "f", "g", "h"]
    assert all("no image of a known format (JPEG" in reason for reason in skipped.values())


def test_a_file_beside_an_image_is_no_image(tmp_path: Path) -> None:
    _put(tmp_path / "a.jpg")
    for name in ("a.npy", "a.json", "README.md", "LICENSE.txt"):
        (tmp_path / name).write_text("{}")
    assert [record.key for record in read_folder(tmp_path)] == ["a"]


def test_linked_folders_are_followed_and_a_dangling_link_is_bad(tmp_path: Path) -> None:
    _put(tmp_path / "in/a/1.jpg")
    _put(tmp_path / "far/2.jpg")
    (tmp_path / "in/b").symlink_to(tmp_path / "far")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")  # a circle
    (tmp_path / "in/a/3.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [record.key for record in read_folder(tmp_path / "in")] == ["a/1", "a/3", "b/2"]
    run_shard("folder", tmp_path / "in", tmp_path / "out", "--max-bad", "1", *ONE)
    assert list(_skipped(tmp_path / "out").values()) == ["no caption; put it into 3.txt"]
    (tmp_path / "in/a/3.txt").write_text("three")
    run_shard("folder", tmp_path / "in", tmp_path / "out", "--max-bad", "1", *ONE)
    assert list(_skipped(tmp_path / "out").values()) == ["no such image file (is --images right?)"]


def test_folders_called_as_elsewhere_are_the_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Training", "validation", "test"):
        _put(tmp_path / name / f"{name[0]}.jpg")
    records = list(read_folder(tmp_path))
    assert [(r.split, r.key) for r in records] == [
        ("train", "Training/T"),
        ("val", "validation/v"),
        ("test", "test/t"),
    ]
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"note: {tmp_path}/Training: taken as split train",
        f"note: {tmp_path}/validation: taken as split val",
    ]


def test_names_with_several_dots_and_a_broken_caption(tmp_path: Path) -> None:
    _put(tmp_path / "img.0001.jpg", "one")
    _put(tmp_path / "img.0002.jpg", None)
    (tmp_path / "img.0002.txt").write_bytes(b"caf\xe9")
    one, two = read_folder(tmp_path)
    assert (one.key, one.captions) == ("img.0001", ("one",))
    assert two.fault.startswith("its caption file img.0002.txt is broken (")


def test_the_json_of_img2dataset_goes_before_its_text(tmp_path: Path) -> None:
    _put(tmp_path / "0.jpg", "a red barn\nin the snow")
    (tmp_path / "0.json").write_text(json.dumps({"caption": "a red barn\nin the snow"}))
    _put(tmp_path / "1.jpg", "one\ntwo")
    (tmp_path / "1.json").write_text(json.dumps({"caption": None, "shapes": []}))
    assert [record.captions for record in read_folder(tmp_path)] == [
        ("a red barn\nin the snow",),
        ("one", "two"),
    ]


def _by_key(records: Any) -> dict[str, Record]:
    return {record.key: record for record in records}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_hugging_face_imagefolder(tmp_path: Path, suffix: str) -> None:
    """As its documentation lays it out, with a metadata file a split."""
    rows = [{"file_name": "0.jpg", "text": "zero"}, {"file_name": "sub/1.jpg", "text": "one, a"}]
    for split in ("train", "test"):
        for name in ("0.jpg", "sub/1.jpg", "2.jpg"):
            _put(tmp_path / split / name, None)
        text = "file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows)
        if suffix == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / split / f"metadata.{suffix}").write_text(text)
    found = _by_key(read_folder(tmp_path))
    assert found["train/0"].captions == ("zero",) and found["train/0"].split == "train"
    assert found["test/sub/1"].captions == ("one, a",) and found["test/sub/1"].split == "test"
    assert found["train/2"].captions == ()
    run_shard("folder", tmp_path, tmp_path / "out", "--max-bad", "2", *ONE)
    assert read_index(tmp_path / "out").split("test").num_samples == 2


def test_what_metadata_names_and_is_not_there_is_bad(tmp_path: Path) -> None:
    _put(tmp_path / "in/0.jpg", None)
    rows = [
        {"file_name": "0.jpg", "alt": "zero"},
        {"file_name": "gone.jpg", "alt": "gone"},
        {"file_name": None, "alt": "nothing"},
        {"file_name": "0.jpg", "alt": "another"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in/metadata.jsonl").write_text(text)
    faults = [record.fault for record in read_folder(tmp_path / "in")]
    assert all("(fields: file_name, alt); --caption-column chooses one" in f for f in faults[:2])
    options = ("--caption-column", "alt", "--max-bad", "2")
    run_shard("folder", tmp_path / "in", tmp_path / "out", *options, *ONE)
    assert read_index(tmp_path / "out").split("train").num_captions == 2
    assert sorted(_skipped(tmp_path / "out").values()) == [
        "no 'file_name' (fields: file_name, alt); name its file",
        "no such image file (is --images right?)",
    ]


def test_caption_files_as_other_tools_name_them(tmp_path: Path) -> None:
    for image, text in (("a.jpg", "a.TXT"), ("b.JPG", "b.caption"), ("c.jpg", "c.jpg.txt")):
        _put(tmp_path / "in" / image, None)
        (tmp_path / "in" / text).write_text(f"of {text}")
    _put(tmp_path / "in/d.jpg", " ")
    _put(tmp_path / "in/e.jpg", None)
    (tmp_path / "in/e.json").write_text('{"alt": "x"}')
    records = _by_key(read_folder(tmp_path / "in"))
    assert [records[key].captions for key in "abc"] == [
        ("of a.TXT",),
        ("of b.caption",),
        ("of c.jpg.txt",),
    ]
    assert records["d"].fault == "no caption in d.txt"
    assert records["e"].fault == "no caption in e.json; --caption-column chooses a field"


def test_metadata_may_lie_above_the_splits(tmp_path: Path) -> None:
    for name in ("train/a.jpg", "validation/b.jpg"):
        _put(tmp_path / name, None)
    rows = [{"file_name": "train/a.jpg", "text": "one"}, {"file_name": "validation/b.jpg"}]
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "nobody's"}]))
    records = list(read_folder(tmp_path))
    assert [(r.split, r.key, r.captions) for r in records] == [
        ("train", "train/a", ("one",)),
        ("train", "metadata.jsonl:3", ()),
        ("val", "validation/b", ()),
    ]
    path.write_text(json.dumps({"file_name": "other/c.jpg", "text": "lost"}))
    with pytest.raises(
        UserError, match=r"metadata\.jsonl names 'other/c\.jpg', which lies outside"
    ):
        list(read_folder(tmp_path))


def test_metadata_in_parquet_says_more_than_captions(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        _put(tmp_path / "in" / name, None)
    rows = [
        {"file_name": "a.jpg", "text": ["one", "", "two"], "caption_weights": [1.0, 2.0, 3.0]},
        {"file_name": "b.jpg", "text": ["x"], "negatives": ["no x", None]},
        {"file_name": "b.jpg", "text": ["y"], "negatives": ["no y"]},
    ]
    table = pyarrow.Table.from_pylist(rows, schema=_schema(rows))
    parquet.write_table(table, tmp_path / "in/metadata.parquet")
    records = _by_key(read_folder(tmp_path / "in"))
    assert records["a"].captions == ("one", "two")
    assert records["a"].extra == {"caption_weights": [1.0, 3.0]}
    assert records["b"].captions == ("x", "y")
    assert records["b"].extra == {"negatives": ["no x", "no y"]}


def _schema(rows: list[dict[str, Any]]) -> pyarrow.Schema:
    names = {name for row in rows for name in row}
    kinds = {"file_name": pyarrow.string(), "caption_weights": pyarrow.list_(pyarrow.float64())}
    texts = pyarrow.list_(pyarrow.string())
    return pyarrow.schema([(name, kinds.get(name, texts)) for name in sorted(names)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    _put(tmp_path / "in/a.jpg")
    (tmp_path / "in/b").mkdir(mode=0)
    with pytest.raises(UserError, match="b: cannot be read"):
        list(read_folder(tmp_path / "in"))
