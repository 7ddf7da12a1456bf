"""Whatever a tar, a list, a folder or an image holds: no traceback, and no sample is lost unseen.

Samples in = samples kept + samples listed, counted here without the tool's own readers. For a
longer search: `FUZZ_EXAMPLES=2000 pytest tests/shards/test_fuzz.py --hypothesis-seed=1`.
"""

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dist_vse.common.errors import UserError
from dist_vse.data.decode import Transform, decode_image
from dist_vse.data.index import read_index
from dist_vse.shards.index.wds_reader import read_samples
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SEARCH = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
ONE = ("--workers", "1")
ANY = (*ONE, "--max-bad", "100%")
GOOD = encode(draw(1))
PHOTOS = [encode(draw(2, size=40), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
TEXTS = st.text(max_size=8) | st.sampled_from(["", " ", "\ufeff", "[]", '["a", "b"]', "[1", "nan"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = ("image", "caption", "captions", "split", "key", "languages", "negatives")
FIELDS = st.dictionaries(st.sampled_from((*NAMES, "caption_weights", "x")), VALUES, max_size=5)
EXTENSIONS = ("png", "jpg", "txt", "json", "seg.png", "1.png", "1.txt", "2.png", "heic", "cls", "")


@st.composite
def _images(draw_: st.DrawFn) -> bytes:
    """Return an image with some bytes changed, cut, or repeated."""
    data = bytearray(draw_(st.sampled_from(PHOTOS)))
    for _ in range(draw_(st.integers(0, 4))):
        data[draw_(st.integers(0, len(data) - 1))] = draw_(st.integers(0, 255))
    end = draw_(st.just(len(data)) | st.integers(0, len(data)))
    return bytes(data[:end]) + draw_(st.binary(max_size=4))


def _kept(folder: Path) -> list[str]:
    """Return the keys of what was kept."""
    index = read_index(folder)
    metas = []
    for split in index.splits.values():
        for shard in split.shards:
            content = (folder / (shard.meta_name or shard.path)).read_bytes()
            metas += [
                content[at : at + size] for _, _, at, size, _ in index.offsets(shard).tolist()
            ]
    return [json.loads(meta)["key"] for meta in metas]


def _listed(folder: Path) -> list[str]:
    path = folder / "skipped.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["key"] for line in lines]


def _shard(source: str, path: Path, out: Path, *options: str) -> int | None:
    """Return how many samples are accounted for; None where one line says what is wrong."""
    try:
        run_shard(source, path, *(() if source == "index" else (out,)), *ANY, *options)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return None
    return len(_kept(out)) + len(_listed(out))


@given(st.data())
@SEARCH
def test_any_tar(data: st.DataObject) -> None:
    contents = _images() | st.binary(max_size=8) | FIELDS.map(lambda f: json.dumps(f).encode())
    keys = st.sampled_from(["a", "b", "d/a", "img"])
    names = st.builds(lambda key, end: f"{key}.{end}", keys, st.sampled_from(EXTENSIONS))
    members: Any = data.draw(st.dictionaries(names, contents, max_size=10))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members["good.png"], members["good.txt"] = GOOD, "fine"
        tar = write_tar(folder / "x.tar", members)
        count = len(list(read_samples(tar)))
        assert _shard("index", tar, folder) == count
        found = {key.partition(".")[0] for key in (*_kept(folder), *_listed(folder))}
        assert found == {member.partition(".")[0] for member in members}
        assert _shard("reshard", tar, folder / "out", "--split", "all") == count
        run_shard("stats", folder / "out", *ONE)


@given(st.lists(FIELDS, max_size=6), st.booleans())
@SEARCH
def test_any_jsonl(lines: list[dict[str, Any]], as_list: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.png").write_bytes(GOOD)
        rows = [{"image": "a.png", "caption": "fine"}, *lines]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "p.jsonl").write_text(json.dumps(rows) if as_list else text)
        assert _shard("jsonl", folder / "p.jsonl", folder / "out") in (len(rows), None)


CELLS = st.sampled_from(["a.png", "b.png", "gone.png", "x\ty", "https://host/a.png"]) | TEXTS


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=6), st.sampled_from(["csv", "tsv"]))
@SEARCH
def test_any_table(rows: list[tuple[str, str, str]], source: str) -> None:
    rows = [("a.png", "fine", ""), *rows]
    if source == "tsv":  # without quotation, cells hold neither tabs nor line ends
        rows = [tuple(" ".join(cell.split()) for cell in row) for row in rows]  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in ("a.png", "b.png"):
            (folder / image).write_bytes(GOOD)
        with (folder / "p").open("w", newline="", encoding="utf-8", errors="replace") as file:
            if source == "csv":
                csv.writer(file).writerows([("image", "caption", "wrong"), *rows])
            else:
                lines = ["image\tcaption\twrong", *("\t".join(row) for row in rows)]
                file.write("\n".join(lines) + "\n")
        found = _shard(source, folder / "p", folder / "out", "--negatives-column", "wrong")
        blank = sum(not row[0].strip().strip("\ufeff").strip() for row in rows)
        named = {row[0] for row in rows if row[0].strip().strip("\ufeff").strip()}
        assert found in (blank + len(named), None)


HUB = st.fixed_dictionaries(
    {
        "image": st.none() | st.fixed_dictionaries({"bytes": st.none() | _images()}),
        "caption": st.none() | st.lists(st.none() | TEXTS, max_size=3),
    }
)


@given(st.lists(HUB, max_size=5))
@SEARCH
def test_any_parquet(rows: list[dict[str, Any]]) -> None:
    rows = [{"image": {"bytes": GOOD}, "caption": ["fine"]}, *rows]
    for row in rows:
        if row["image"] is not None:
            row["image"]["path"] = None
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("caption", pyarrow.list_(pyarrow.string()))])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        parquet.write_table(table, folder / "p.parquet")
        stored = [(row["image"] or {}).get("bytes") for row in rows]
        count = len({data for data in stored if data}) + sum(not data for data in stored)
        assert _shard("parquet", folder / "p.parquet", folder / "out") == count


@given(st.lists(_images(), min_size=1, max_size=5), st.sampled_from(["", "--decode", "--max-side"]))
@SEARCH
def test_any_image(images: list[bytes], option: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, data in enumerate([GOOD, *images]):
            (folder / f"{number}.jpg").write_bytes(data)
            (folder / f"{number}.txt").write_text("x")
        options = {"": (), "--decode": ("--decode",), "--max-side": ("--max-side", "16")}[option]
        assert _shard("folder", folder, folder / "out", *options) == 1 + len(images)
        try:
            run_shard("verify", folder / "out", *ONE)
        except UserError as error:  # unusable, though its structure is whole: without --decode
            assert not option and len(str(error).splitlines()) == 1
            return
        index = read_index(folder / "out")
        for shard in index.split("train").shards:  # what verify passes, training decodes
            content = (folder / "out" / shard.path).read_bytes()
            for at, size, *_ in index.offsets(shard).tolist():
                decode_image(content[at : at + size], Transform(8))
