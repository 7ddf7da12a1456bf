"""Whatever a tar or a list holds: no traceback, and samples in = samples kept + samples listed."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.index.wds_reader import read_samples
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ONE = ("--workers", "1", "--max-bad", "100%")
GOOD = encode(draw(1))
IMAGES = st.sampled_from([GOOD, encode(draw(2), "JPEG"), GOOD[:40], b"", b"<html>"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = ("image", "caption", "captions", "split", "key", "languages", "x")
FIELDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
EXTENSIONS = ("png", "jpg", "txt", "json", "seg.png", "1.png", "1.txt", "2.png", "heic", "cls", "")


def _kept_and_listed(folder: Path) -> tuple[int, int]:
    kept = sum(split.num_samples for split in read_index(folder).splits.values())
    path = folder / "skipped.jsonl"
    return kept, len(path.read_text().splitlines()) if path.is_file() else 0


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tar(data: st.DataObject) -> None:
    contents = IMAGES | st.binary(max_size=8) | FIELDS.map(lambda f: json.dumps(f).encode())
    keys = st.sampled_from(["a", "b", "d/a", "img"])
    names = st.builds(lambda key, end: f"{key}.{end}", keys, st.sampled_from(EXTENSIONS))
    members: Any = data.draw(st.dictionaries(names, contents, max_size=10))
    with tempfile.TemporaryDirectory() as folder:
        members["good.png"], members["good.txt"] = GOOD, "fine"
        tar = write_tar(Path(folder) / "x.tar", members)
        count = len(list(read_samples(tar)))
        run_shard("index", tar, *ONE)
        assert sum(_kept_and_listed(Path(folder))) == count
        run_shard("reshard", tar, Path(folder) / "out", "--split", "all", *ONE)
        assert sum(_kept_and_listed(Path(folder) / "out")) == count
        run_shard("stats", Path(folder) / "out", "--workers", "1")


@given(st.lists(FIELDS, max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_jsonl(lines: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.png").write_bytes(GOOD)
        good = {"image": "a.png", "caption": "fine"}
        path = folder / "p.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in [good, *lines]))
        try:
            run_shard("jsonl", path, folder / "out", *ONE)
        except UserError as error:  # a split's name, or a split without a good sample
            assert "split" in str(error) and len(str(error).splitlines()) == 1
            return
        assert sum(_kept_and_listed(folder / "out")) == 1 + len(lines)
