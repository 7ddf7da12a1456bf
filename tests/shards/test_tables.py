"""COCO's, Flickr's and tabular sources read their formats to the letter."""

import functools
import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.record import Record, in_languages
from dist_vse.shards.remote import to_path
from dist_vse.shards.sources.coco import read_coco
from dist_vse.shards.sources.flickr import read_flickr
from dist_vse.shards.sources.jsonl import read_jsonl
from dist_vse.shards.sources.table import read_csv, read_parquet, read_tsv
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard

COCO: dict[str, Any] = {
    "info": {"description": "COCO 2017 Dataset", "year": 2017},
    "licenses": [{"id": 4, "name": "Attribution License"}],
    "images": [
        {"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640, "id": 397133},
        {"license": 4, "file_name": "000000037777.jpg", "height": 230, "width": 352, "id": 37777},
        {"license": 4, "file_name": "000000252219.jpg", "height": 428, "width": 640, "id": 252219},
    ],
    "annotations": [
        {"image_id": 37777, "id": 89, "caption": "The dining table near the kitchen.\n"},
        {"image_id": 397133, "id": 370509, "caption": "A man is in a kitchen making pizzas."},
        {"image_id": 37777, "id": 98, "caption": "A kitchen with a refrigerator"},
    ],
}
TOKENS = (
    "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands .\n"
    "1000092795.jpg#1\tTwo young , White males are outside near many bushes .\n"
    "10002456.jpg#0\tSeveral men in hard hats are operating a giant pulley system .\n"
    "2258277193_586949ec62.jpg.1#0\tsome people sit .\n"
)
BARS = (
    "image_name| comment_number| comment\n"
    "1000092795.jpg| 1| Two young , White males are outside | near many bushes .\n"
    "1000092795.jpg| 0| Two young guys with shaggy hair .\n"
    "2199200615.jpg| 4   A dog runs across the grass .\n"  # as it is published
)
PAIRS = (
    "image,caption\n"
    "1000268201_693b08cb0e.jpg,A child in a pink dress .\n"
    '1000268201_693b08cb0e.jpg,"A girl, in a ""pink"" dress ."\n'
    "1001773457_577c3a7d70.jpg,A black dog, and a spotted dog are fighting\n"
)
TRIPLES = "image_name,comment_number,comment\n1.jpg, 0, Two young guys , outside .\n"


def _captions(records: list[Record]) -> dict[str, tuple[str, ...]]:
    return {record.key: record.captions for record in records}


def test_coco_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps(COCO))
    (tmp_path / "val2017").mkdir()
    first, second, third = read_coco(path, images=tmp_path / "val2017")
    assert second == Record(
        image=str(tmp_path / "val2017/000000037777.jpg"),
        captions=("The dining table near the kitchen.", "A kitchen with a refrigerator"),
        split="val",
        key="000000037777",
        extra={"filename": "000000037777.jpg", "cocoid": 37777, "annotation_ids": [89, 98]},
    )
    assert first.captions == ("A man is in a kitchen making pizzas.",)
    assert third.captions == ()
    assert {record.split for record in read_coco(path, split="dev")} == {"dev"}
    other = path.rename(tmp_path / "mine.json")
    assert {record.split for record in read_coco(other)} == {"train"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 5, "id": 1, "caption": "x"}]}, "annotates image 5"),
        ({"annotations": [{"image_id": 37777}]}, r"annotations\[0\] .*'caption'"),
        ({"images": [{"id": 37777}]}, r"images\[0\] .*'file_name'"),
        ({"images": None}, "images is not of COCO's format"),
    ],
)
def test_coco_names_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "captions_train2017.json"
    path.write_text(json.dumps(COCO | change))
    with pytest.raises(UserError, match=message):
        list(read_coco(path))


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        (
            TOKENS,
            {
                "1000092795": (
                    "Two young guys with shaggy hair look at their hands .",
                    "Two young , White males are outside near many bushes .",
                ),
                "10002456": ("Several men in hard hats are operating a giant pulley system .",),
                "2258277193_586949ec62.jpg": ("some people sit .",),
            },
        ),
        (
            BARS,
            {
                "1000092795": (
                    "Two young guys with shaggy hair .",
                    "Two young , White males are outside | near many bushes .",
                ),
                "2199200615": ("A dog runs across the grass .",),
            },
        ),
        (
            PAIRS,
            {
                "1000268201_693b08cb0e": (
                    "A child in a pink dress .",
                    'A girl, in a "pink" dress .',
                ),
                "1001773457_577c3a7d70": ("A black dog, and a spotted dog are fighting",),
            },
        ),
        (TRIPLES, {"1": ("Two young guys , outside .",)}),
    ],
)
def test_flickr(tmp_path: Path, text: str, captions: dict[str, tuple[str, ...]]) -> None:
    path = tmp_path / "results"
    path.write_text(text)
    records = list(read_flickr(path, split="val"))
    assert _captions(records) == captions
    assert {record.split for record in records} == {"val"}
    assert records[0].image == str(tmp_path / records[0].extra["filename"])


@pytest.mark.parametrize(
    ("text", "line"), [(TOKENS + "no tab here\n", 5), (BARS + "3.jpg| x| y\n", 5), ("1.jpg a", 1)]
)
def test_flickr_names_the_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"results\.csv:{line}: "):
        list(read_flickr(path))


ROWS = [
    {"path": "a/1.jpg", "text": 'one, "quoted"', "set": "train", "lang": "en", "id": "k1"},
    {"path": "2.jpg", "text": "two\nlines", "set": "val", "lang": "en", "id": ""},
    {"path": "a/1.jpg", "text": "eins\tein", "set": "train", "lang": "de", "id": "k1"},
    {"path": "3.jpg", "text": "", "set": "", "lang": "", "id": ""},
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(
            file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("read", "suffix"), [(read_csv, "csv"), (read_tsv, "tsv"), (read_parquet, "parquet")]
)
def test_tables(tmp_path: Path, read: Callable[..., Any], suffix: str) -> None:
    path = _write(tmp_path / f"pairs.{suffix}", ROWS)
    columns: dict[str, Any] = {"image_column": "path", "caption_column": "text"}
    columns |= {"split_column": "set", **({"quoted": True} if suffix == "tsv" else {})}
    records = list(read(path, **columns, language_column="lang", key_column="id", split="extra"))
    assert records == [
        Record(
            str(tmp_path / "a/1.jpg"), ('one, "quoted"', "eins\tein"), "train", "k1",
            languages=("en", "de"),
        ),
        Record(str(tmp_path / "2.jpg"), ("two\nlines",), "val", "2", languages=("en",)),
        Record(str(tmp_path / "3.jpg"), (), "extra", "3"),
    ]  # fmt: skip
    (tmp_path / "images").mkdir()
    plain = list(read(path, **columns, images=tmp_path / "images"))
    assert plain[0].image == str(tmp_path / "images/a/1.jpg")
    assert plain[0].languages == ()
    with pytest.raises(UserError, match=r"no column 'txt' \(columns: path.*did you mean 'text'"):
        list(read(path, image_column="path", caption_column="txt"))


def test_parquet_of_several_files_holds_lists(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    _write(folder / "1.parquet", [{"image": "b.jpg", "caption": ["three", None]}])
    _write(folder / "0.parquet", [{"image": "a.jpg", "caption": ["one", "two"]}])
    assert _captions(list(read_parquet(folder))) == {"a": ("one", "two"), "b": ("three",)}
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"x\.parquet: no Parquet file"):
        list(read_parquet(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\n1.jpg,one,two\n", r":2: 3 cells where the header has 2"),
        ('image,caption\n1.jpg,"one" two\n', r":2: .*fix the quotes"),
        ("image,caption,split\n1.jpg,a,val\n1.jpg,b,test\n", r":3: 1\.jpg is of split 'test', but"),
        ("", "is empty"),
    ],
)
def test_csv_names_the_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_csv(path, split_column="split" if "split" in text else None))


def test_languages_are_kept_apart_and_chosen(tmp_path: Path) -> None:
    line = {"image": "1.png", "captions": {"en": ["one", "a one"], "de": "eins"}}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(line))
    (record,) = read_jsonl(pairs)
    assert record.captions == ("one", "a one", "eins")
    assert record.languages == ("en", "en", "de")
    chosen = in_languages(record, ["de"])
    assert (chosen.captions, chosen.languages) == (("eins",), ("de",))
    (wide,) = read_csv(
        _write(tmp_path / "w.csv", [{"image": "1.png", "e": "one", "d": "eins"}]),
        caption_column="e=en, d=de",
    )
    assert (wide.captions, wide.languages) == (("one", "eins"), ("en", "de"))

    (tmp_path / "1.png").write_bytes(encode(draw(1)))
    run_shard("jsonl", pairs, tmp_path / "out", "--workers", "1")
    run_shard("reshard", tmp_path / "out", tmp_path / "de", "--languages", "de", "--workers", "1")
    for name, languages in (("out", ["en", "en", "de"]), ("de", ["de"])):
        index = read_index(tmp_path / name)
        (shard,) = index.split("train").shards
        _, _, at, size, _ = index.offsets(shard)[0].tolist()
        meta = json.loads((tmp_path / name / shard.path).read_bytes()[at : at + size])
        assert meta["languages"] == languages
        assert len(meta["captions"]) == len(languages)
    pairs.write_text(json.dumps({"image": "1.png", "caption": "one"}))
    with pytest.raises(UserError, match=r"sample '1' .*names no languages"):
        run_shard("jsonl", pairs, tmp_path / "out", "--languages", "de")


def test_annotations_and_images_may_lie_at_urls(tmp_path: Path) -> None:
    """The same bytes as from the disk, in two processes."""
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encode(draw(i)))
    lines = "".join(json.dumps({"image": f"{i}.png", "caption": f"c{i}"}) + "\n" for i in range(6))
    (tmp_path / "pairs.jsonl").write_text(lines)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/pairs.jsonl"
        options = ("--workers", "2", "--shard-size", "2", "--max-bad", "1")
        run_shard("jsonl", url, tmp_path / "far", *options)
        server.shutdown()
    run_shard("jsonl", tmp_path / "pairs.jsonl", tmp_path / "near", *options)
    assert (tmp_path / "far/index.json").read_bytes() == (tmp_path / "near/index.json").read_bytes()
    (skipped,) = (tmp_path / "far/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["reason"].startswith("no such image file")
    with pytest.raises(UserError, match=r"no URL that can be read"):
        to_path("nonsense://host/a.json")


@pytest.mark.slow
def test_tars_are_cut_and_shuffled_anew(tmp_path: Path) -> None:
    """Reshard there and back: the samples and their bytes stay."""
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(encode(draw(i)))
    lines = [{"image": f"{i}.png", "caption": f"c{i}", "n": i} for i in range(9)]
    lines[8]["split"] = "val"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = ("--workers", "1", "--shard-size")
    run_shard("jsonl", tmp_path / "pairs.jsonl", tmp_path / "a", *size, "3")
    run_shard("reshard", tmp_path / "a", tmp_path / "b", *size, "500B", "--seed", "1")
    run_shard("reshard", tmp_path / "b", tmp_path / "c", *size, "3")
    assert len(list((tmp_path / "b").glob("train-*.tar"))) > 3
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "c/index.json").read_bytes()
    assert sorted(read_index(tmp_path / "c").splits) == ["train", "val"]
    run_shard("reshard", tmp_path / "a", tmp_path / "d", "--split", "all", "--workers", "1")
    assert list(read_index(tmp_path / "d").splits) == ["all"]
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/a\.tar: cannot be read"):
        run_shard("reshard", "http://127.0.0.1:9/a.tar", tmp_path / "e")
