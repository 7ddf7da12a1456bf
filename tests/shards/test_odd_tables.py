"""Tables as people have them: read whole, or one line that says what is wrong."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
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
