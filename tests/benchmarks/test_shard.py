"""`bench shard` times what it says, end to end, on a handful of photographs."""

import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.support.shard_peers import shard_writer, write_photographs


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_benchmark_runs_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    sizes = ("--images", "6", "--resized", "4", "--repeats", "1")
    assert main(["shard", str(tmp_path / "work"), *sizes, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["figures"]["results"]
    assert [(row["photographs"], row["against"].split(",")[0]) for row in rows] == [
        ("6 untouched", "tar cf"),
        ("6 untouched", "webdataset.ShardWriter"),
        ("4 to 256 px", "webdataset.ShardWriter"),
    ]
    for row in rows:
        ratio = row["seconds"][0] / row["our_seconds"][0]
        assert row["theirs_by_ours"] == pytest.approx(ratio, rel=0.2, abs=0.02)


def test_the_peer_writes_the_same_samples(tmp_path: Path) -> None:
    pairs = write_photographs(tmp_path / "in", 3)
    shard_writer(pairs, tmp_path / "out", 0)
    with tarfile.open(tmp_path / "out/train-00000.tar") as tar:
        assert len(tar.getnames()) == 9
        member = tar.extractfile("00000001.jpg")
        assert member is not None
        assert member.read() == (tmp_path / "in/00000001.jpg").read_bytes()
