"""All sources read captions alike, whatever form they have."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.data.sample_fields import caption_weights
from dist_vse.shards.captions import first_captions, named_languages, read_captions
from dist_vse.shards.index.wds_reader import read_samples
from dist_vse.shards.json_text import dump_json, load_json
from dist_vse.shards.sources.jsonl import read_jsonl
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_tar

IMAGE = encode(draw(1))
ONE = ("--workers", "1")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (" one \n", ["one"]),
        (["one", "", None, float("nan"), " two"], ["one", "two"]),
        ({"en": ["one"], "de": "eins", "fr": None}, ["one", "eins"]),
        ("\ufeffone", ["one"]),
        (5, ["5"]),
        (None, []),
        (float("nan"), []),
        (" \n\ufeff", []),
        ([], []),
    ],
)
def test_what_a_value_says(value: Any, texts: list[str]) -> None:
    found = read_captions(value)
    assert list(found.texts) == texts and not found.fault


@pytest.mark.parametrize("value", [True, [["one"]], [{"raw": "one"}], {"en": {"a": "b"}}, b"one"])
def test_what_is_no_caption_is_a_fault(value: Any) -> None:
    found = read_captions(value)
    assert not found.texts and found.fault.startswith("its caption is ")


def test_a_fallback_is_one_and_languages_are_a_name_a_caption() -> None:
    assert first_captions([[], " ", {"a": {}}, "last"]).texts == ("last",)
    assert first_captions([None, {"a": {}}]).fault
    assert read_captions({"en": ["a", "b"], "de": "c"}).languages == ("en", "en", "de")
    assert named_languages(["en", "de"], ["a", "b"]) == ("en", "de")
    for wrong in ("en", 5, ["en"], ["en", 5], None):
        assert named_languages(wrong, ["a", "b"]) == ()


def test_a_blank_among_captions_is_dropped_by_every_source(tmp_path: Path) -> None:
    said = ["one", "", "three"]
    (tmp_path / "a.png").write_bytes(IMAGE)
    contents: dict[str, Any] = {
        "coco": {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [
                {"id": i, "image_id": 1, "caption": text} for i, text in enumerate([*said, None])
            ],
        },
        "karpathy": {
            "images": [
                {"filename": "a.png", "split": "train", "sentences": [{"raw": c} for c in said]}
            ]
        },
        "jsonl": {"image": "a.png", "captions": said},
    }
    texts = {name: json.dumps(content) for name, content in contents.items()}
    texts["flickr"] = "".join(f"a.png#{i}\t{text}\n" for i, text in enumerate(said))
    texts["csv"] = "image,caption\n" + "".join(f"a.png,{text}\n" for text in said)
    for source, text in texts.items():
        (tmp_path / source).write_text(text)
        run_shard(source, tmp_path / source, tmp_path / f"out-{source}", *ONE)
        assert _stored(tmp_path / f"out-{source}") == [["one", "three"]], source


@pytest.mark.parametrize(
    ("content", "text", "captions"),
    [
        ({"captions": ["a", None]}, "t", ("a",)),
        ({"caption": ["a", "b"]}, "t", ("a", "b")),
        ({"captions": "a"}, "t", ("a",)),
        ({"captions": [], "caption": ""}, "t", ("t",)),
        ({"captions": {"en": ["a"], "de": ["b"]}}, "", ("a", "b")),
        ({"caption": 7}, "", ("7",)),
    ],
)
def test_forms_in_a_tar(tmp_path: Path, content: Any, text: str, captions: Any) -> None:
    members = {"k.png": IMAGE, "k.json": b"\xef\xbb\xbf" + json.dumps(content).encode()}
    tar = write_tar(tmp_path / "x.tar", {**members, "k.txt": "\ufeff" + text})
    (sample,) = read_samples(tar)
    assert (sample.captions, sample.fault) == (captions, "")


def test_no_caption_names_what_is_there_and_a_key_chooses(tmp_path: Path) -> None:
    members = {"a.input.png": IMAGE, "a.outputs.txt": "one", "a.json": {"text": ["two"]}}
    tar = write_tar(tmp_path / "x.tar", members)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no caption \(members: a\.input.*a\.outputs.*JSON: text"):
        run_shard("index", tar, *ONE)
    for key, caption in (("text", "two"), ("outputs.txt", "one")):
        run_shard("index", tar, "--caption-key", key, *ONE)
        (line,) = (tmp_path / "train.x.jsonl").read_text().splitlines()
        assert json.loads(line)["captions"] == [caption]
        run_shard("reshard", tar, tmp_path / f"out-{key}", "--caption-key", key, *ONE)
        assert _stored(tmp_path / f"out-{key}") == [[caption]]


def test_columns_of_jsonl_may_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "x", "captions": "another field"}\n')
    with pytest.raises(UserError, match=r"no 'image' \(fields: file_name, text, .*--image-column"):
        run_shard("jsonl", path, tmp_path / "out", *ONE)
    columns = ("--image-column", "file_name", "--caption-column", "text")
    run_shard("jsonl", path, tmp_path / "out", *columns, *ONE)
    assert _stored(tmp_path / "out") == [["x"]]


@pytest.mark.parametrize("languages", ["en", 5, ["en", "de", "fr"]])
def test_a_field_languages_of_another_kind_is_a_field_like_others(
    tmp_path: Path, languages: Any
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    line = {"image": "a.png", "caption": "x", "languages": languages}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    run_shard("jsonl", tmp_path / "p.jsonl", tmp_path / "out", *ONE)
    assert run_shard("stats", tmp_path / "out", *ONE) == 0
    (meta,) = _metas(tmp_path / "out")
    assert meta["languages"] == languages


def test_nan_in_a_field_is_null_in_the_shard(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    line = '{"image": "a.png", "caption": "x", "score": NaN, "more": [{"a": Infinity}]}'
    (tmp_path / "p.jsonl").write_text(line)
    run_shard("jsonl", tmp_path / "p.jsonl", tmp_path / "out", *ONE)
    (meta,) = _metas(tmp_path / "out")
    assert meta["score"] is None and meta["more"] == [{"a": None}]


def test_json_is_read_to_a_depth_and_written_as_others_read_it() -> None:
    assert load_json("[" * 100 + "]" * 100)
    for deep in ("[" * 101 + "]" * 101, "[" * 100_000, b'{"a":' * 5000):
        with pytest.raises(ValueError):
            load_json(deep)
    assert load_json('"' + "[" * 1000 + '"') == "[" * 1000
    assert dump_json({"a": (1.5, float("inf"))}) == b'{"a": [1.5, null]}'


def _metas(folder: Path) -> list[dict[str, Any]]:
    index = read_index(folder)
    metas = []
    for shard in index.split("train").shards:
        content = (folder / shard.path).read_bytes()
        for _, _, at, size, _ in index.offsets(shard).tolist():
            metas.append(json.loads(content[at : at + size]))
    return metas


def _stored(folder: Path) -> list[list[str]]:
    return [meta["captions"] for meta in _metas(folder)]


def test_what_belongs_to_a_blank_caption_goes_with_it(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "captions": ["one", "", "three"],
        "languages": ["en", "xx", "de"],
        "caption_weights": [1, 2, 3],
        "negatives": "not one",
    }
    tar = write_tar(tmp_path / "x.tar", {"k.png": IMAGE, "k.json": fields})
    (sample,) = read_samples(tar)
    (tmp_path / "a.png").write_bytes(IMAGE)
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": "a.png", **fields}))
    (record,) = read_jsonl(tmp_path / "p.jsonl")
    for found, more in ((sample, sample.fields), (record, record.extra)):
        assert (found.captions, found.languages) == (("one", "three"), ("en", "de"))
        assert more == {"caption_weights": [1, 3], "negatives": ["not one"]}


def test_weights_that_draw_no_caption_are_bad() -> None:
    with pytest.raises(ValueError, match="are all 0: no caption could be drawn"):
        caption_weights({"caption_weights": [0, 0.0]}, 2)
    assert caption_weights({"caption_weights": [0, 1]}, 2) == (0.0, 1.0)


def test_several_fields_of_a_line_are_joined_each_with_its_label(tmp_path: Path) -> None:
    rows = [{"image": "a", "alt": "one", "re": ["two", ""]}, {"image": "b", "re": "three"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = read_jsonl(path, caption_column="alt=alt,re=synthetic")
    assert (one.captions, one.languages) == (("one", "two"), ("alt", "synthetic"))
    assert (two.captions, two.languages) == (("three",), ("synthetic",))
    one, two = read_jsonl(path, caption_column="alt,re")
    assert (one.captions, one.languages) == (("one", "two"), ())
    one, two = read_jsonl(path, caption_column="alt")
    assert one.captions == ("one",) and two.fault.startswith("no caption (fields: image, re)")
