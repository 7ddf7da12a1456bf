"""Tables as people have them: read whole, or one line that says what is wrong."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.sample_checks import BadSampleError, check_image
from dist_vse.shards.sources.jsonl import read_jsonl
from dist_vse.shards.sources.stored_images import base64_image
from dist_vse.shards.sources.table import read_csv, read_parquet, read_tsv
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard

ONE = ("--workers", "1")


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_quotation_marks_in_tsv_are_text_unless_it_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _text(tmp_path / "p.tsv", 'image\tcaption\na\t"mind the gap\nb\tsays the sign"\nc\tx\n')
    assert [record.captions for record in read_tsv(path)] == [
        ('"mind the gap',),
        ('says the sign"',),
        ("x",),
    ]
    assert not capsys.readouterr().err
    _text(path, 'image\tcaption\na\t"say ""hi"""\n')
    (record,) = read_tsv(path)
    assert record.captions == ('"say ""hi"""',)
    assert "--quoted" in capsys.readouterr().err
    (record,) = read_tsv(path, quoted=True)
    assert record.captions == ('say "hi"',)


def test_a_column_that_is_there_twice_is_an_error_if_it_is_read(tmp_path: Path) -> None:
    path = _text(tmp_path / "p.csv", "image,caption,caption,x,x\na.jpg,first,second,1,2\n")
    with pytest.raises(UserError, match="column 'caption' is there twice"):
        list(read_csv(path))
    _text(path, "image,caption,x,x\na.jpg,first,1,2\n")
    assert len(list(read_csv(path))) == 1


def test_a_split_may_be_called_0(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    rows = {"image": ["a", "b", "c"], "caption": ["x", "y", "z"], "fold": [0, 1, None]}
    parquet.write_table(pyarrow.table(rows), path)
    assert [record.split for record in read_parquet(path, split_column="fold")] == [
        "0",
        "1",
        "train",
    ]


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('"[""A cat sits."", ""A mat.""]"', ("A cat sits.", "A mat.")),
        ("\"['A cat sits.', 'A mat.']\"", ("A cat sits.", "A mat.")),
        ("[red] and [blue]", ("[red] and [blue]",)),
        ("[1]", ("[1]",)),
        ("[" * 5000 + "]", ("[" * 5000 + "]",)),
    ],
)
def test_a_list_in_a_cell(tmp_path: Path, cell: str, captions: tuple[str, ...]) -> None:
    (record,) = read_csv(_text(tmp_path / "p.csv", f"image,caption\na.jpg,{cell}\n"))
    assert record.captions == captions


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("image\tcaption\na.jpg\tx\n", "the separator is a tab: use `dist-vse shard tsv`"),
        ("image;caption\na.jpg;x\n", "the separator is a semicolon: .* --separator ';'"),
    ],
)
def test_another_separator_is_named(tmp_path: Path, text: str, hint: str) -> None:
    path = _text(tmp_path / "p.csv", text)
    with pytest.raises(UserError, match=hint):
        list(read_csv(path))
    (record,) = read_csv(path, separator=text[5])
    assert record.captions == ("x",)
    with pytest.raises(UserError, match="the separator is a comma"):
        list(read_tsv(_text(path, "image,caption\na,b\n")))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    text = "image,caption\na.jpg," + "x" * 200_000 + "\n"
    (record,) = read_csv(_text(tmp_path / "p.csv", text))
    assert len(record.captions[0]) == 200_000


def test_compressed_lists_are_read_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(draw(1)))
    lists = {
        "jsonl": b'{"image": "a.png", "caption": "x"}\n',
        "csv": b"image,caption\na.png,x\n",
        "flickr": b"a.png#0\tx\n",
    }
    for source, content in lists.items():
        path = tmp_path / f"p.{source}.gz"
        path.write_bytes(gzip.compress(content))
        run_shard(source, path, tmp_path / source, *ONE)
        assert read_index(tmp_path / source).split("train").num_samples == 1
        path.write_bytes(gzip.compress(content)[:-9])
        with pytest.raises(UserError, match=r"\.gz: is damaged"):
            run_shard(source, path, tmp_path / f"{source}-cut", *ONE)
        path.write_bytes(b"\x28\xb5\x2f\xfd" + content)
        with pytest.raises(UserError, match=r"\.gz: is compressed \(zstd\); unpack it"):
            run_shard(source, path, tmp_path / f"{source}-zst", *ONE)


def _hub(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_images_in_the_cells_of_a_hub_s_parquet_are_read(tmp_path: Path) -> None:
    one, two = encode(draw(1)), encode(draw(2), "JPEG")
    path = _hub(
        tmp_path / "in/0.parquet",
        [
            {"image": {"bytes": one, "path": "x/one.png"}, "caption": ["a", "b"]},
            {"image": {"bytes": two, "path": None}, "caption": ["c"]},
            {"image": {"bytes": one, "path": "x/one.png"}, "caption": ["d"]},
            {"image": {"bytes": None, "path": None}, "caption": ["lost"]},
        ],
    )
    run_shard("parquet", path, tmp_path / "out", "--max-bad", "1", "--workers", "2")
    index = read_index(tmp_path / "out")
    assert (index.split("train").num_samples, index.split("train").num_captions) == (2, 4)
    (shard,) = index.split("train").shards
    content = (tmp_path / "out" / shard.path).read_bytes()
    images = {content[at : at + n] for at, n, *_ in index.offsets(shard).tolist()}
    assert images == {one, two}
    (skipped,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert "name an image file" in skipped and len(skipped) < 500
    tar = tmp_path / "out/train-00000.tar"
    before = tar.stat().st_ino
    run_shard("parquet", path, tmp_path / "out", "--max-bad", "1", *ONE)
    assert tar.stat().st_ino == before  # the same images again: nothing is written


def test_a_column_of_bytes_is_one_of_images(tmp_path: Path) -> None:
    path = _hub(tmp_path / "p.parquet", [{"image": encode(draw(1)), "caption": "x"}])
    run_shard("parquet", path, tmp_path / "out", *ONE)
    assert read_index(tmp_path / "out").split("train").num_samples == 1
    _hub(path, [{"image": b"\xff" * 50_000, "caption": "x"}])
    with pytest.raises(UserError) as caught:
        run_shard("parquet", path, tmp_path / "out", *ONE)
    assert "no image of a known format" in str(caught.value) and len(str(caught.value)) < 500


def test_parts_further_down_are_named(tmp_path: Path) -> None:
    _hub(tmp_path / "in/split=train/0.parquet", [{"image": "a", "caption": "x"}])
    with pytest.raises(UserError, match="no Parquet files here; but there are in split=train"):
        list(read_parquet(tmp_path / "in"))


def test_the_hub_s_parts_are_of_the_splits_that_their_names_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test")
    for number, name in enumerate(names):
        rows = [{"image": {"bytes": encode(draw(number)), "path": None}, "caption": name}]
        _hub(tmp_path / f"in/{name}.parquet", rows)
    records = list(read_parquet(tmp_path / "in"))
    assert [(r.split, r.key) for r in records] == [
        ("test", "test.parquet: row 1"),
        ("train", "train-00000-of-00002.parquet: row 1"),
        ("train", "train-00001-of-00002.parquet: row 1"),
        ("val", "validation-00000-of-00001.parquet: row 1"),
    ]
    assert "are 1 of test, 2 of train, 1 of val; --split makes them one" in capsys.readouterr().err
    assert {r.split for r in read_parquet(tmp_path / "in", split="all")} == {"all"}
    (tmp_path / "in/more").mkdir()
    (tmp_path / "in/test.parquet").rename(tmp_path / "in/more/test.parquet")
    assert len(list(read_parquet(tmp_path / "in"))) == 3
    assert "in/more: its Parquet files are not read" in capsys.readouterr().err


def test_images_in_base64_are_read(tmp_path: Path) -> None:
    image = encode(draw(1), "JPEG")
    text = base64.b64encode(image).decode()
    for name, cell in (("plain", text), ("url", f"data:image/jpeg;base64,{text}")):
        table = _text(tmp_path / f"{name}.tsv", f"image\tcaption\n{cell}\tx\n")
        lines = _text(tmp_path / f"{name}.jsonl", json.dumps({"image": cell, "caption": "x"}))
        for source, path in (("tsv", table), ("jsonl", lines)):
            out = tmp_path / f"{name}-{source}"
            run_shard(source, path, out, *ONE)
            (shard,) = read_index(out).split("train").shards
            ((at, size, *_),) = read_index(out).offsets(shard).tolist()
            assert (out / shard.path).read_bytes()[at : at + size] == image
    assert not base64_image(text[:-3]) and not base64_image("/9j/a.jpg")


def test_one_json_list_is_read_as_its_lines(tmp_path: Path) -> None:
    rows = [{"image": "a", "caption": "x"}, {"image": "b", "caption": "y"}]
    for indent in (None, 2):
        path = _text(tmp_path / "p.json", "\ufeff" + json.dumps(rows, indent=indent))
        assert [(r.key, r.captions) for r in read_jsonl(path)] == [("a", ("x",)), ("b", ("y",))]
    with pytest.raises(UserError, match=r"p\.json: entry 2: must be an object"):
        list(read_jsonl(_text(tmp_path / "p.json", json.dumps([rows[0], "b"]))))
    with pytest.raises(UserError, match=r"p\.json: no JSON \(nested deeper than 100\)"):
        list(read_jsonl(_text(tmp_path / "p.json", "[" * 100_000)))
    with pytest.raises(UserError, match="write one object a line, or one JSON list of them"):
        list(read_jsonl(_text(tmp_path / "p.json", json.dumps({"images": rows}, indent=2))))


def test_a_column_of_negatives(tmp_path: Path) -> None:
    text = 'image,caption,wrong\na,x,"[""no x"", ""not x""]"\na,y,no x\nb,z,\n'
    one, two = read_csv(_text(tmp_path / "p.csv", text), negatives_column="wrong")
    assert one.captions == ("x", "y") and one.extra == {"negatives": ["no x", "not x"]}
    assert two.extra == {}


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n"
    for source, name in (("csv", "p"), ("parquet", "p"), ("jsonl", "p"), ("reshard", "p.tar")):
        path = _text(tmp_path / name, pointer)
        with pytest.raises(UserError, match=r"is a pointer of Git LFS, .*; run `git lfs pull`"):
            run_shard(source, path, tmp_path / "out", *ONE)
    with pytest.raises(BadSampleError, match="is a pointer of Git LFS"):
        check_image(pointer.encode())


def test_splits_are_read_without_blanks_and_an_empty_table_is_named(tmp_path: Path) -> None:
    path = _text(tmp_path / "p.csv", "image,caption,split\na,x, test \n")
    assert [r.split for r in read_csv(path, split_column="split")] == ["test"]
    with pytest.raises(UserError, match="is empty; give a table with a header"):
        list(read_csv(_text(path, "")))


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("https://host/a.jpg", "is a URL; download it with `dist-vse shard urls`"),
        ("file:///a.jpg", r"is a URL \(file://\); write the path alone"),
        ("s3://bucket/a.jpg", r"is a URL \(s3://\); copy the images here, or give .* as --images"),
    ],
)
def test_a_url_where_a_path_goes_is_told_what_to_do(tmp_path: Path, url: str, fault: str) -> None:
    (record,) = read_csv(_text(tmp_path / "p.csv", f"image,caption\n{url},x\n"))
    assert re.fullmatch(f"its image {fault}", record.fault)
    assert str(record.image) == f"{tmp_path}/p.csv:2" and record.key == "p.csv:2"
