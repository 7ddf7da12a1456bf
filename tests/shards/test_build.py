"""Shards hold the samples to the byte; a run can be cut anywhere and ends the same."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dist_vse.common.errors import UserError
from dist_vse.data.index import image_id, read_index
from dist_vse.shards.build.dataset import build_dataset
from dist_vse.shards.build.plan import Options
from dist_vse.shards.build.recode import Recode
from dist_vse.shards.error_budget import ErrorBudget
from dist_vse.shards.manifest import ShardEntry
from dist_vse.shards.record import Record
from tests.support.datasets import draw, encode


def _records(folder: Path, count: int, split: str = "train") -> list[Record]:
    """Write `count` images (every third a JPEG) with one to seven captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        path = folder / f"{split}{i}.img"
        path.write_bytes(encode(draw(i), "JPEG" if i % 3 == 0 else "PNG"))
        captions = tuple(f"caption {c} of {i}: café" for c in range(1 + i % 7))
        records.append(Record(path, captions, split, f"{split}{i}", {"number": i}))
    return records


def _build(
    records: list[Record],
    out: Path,
    *,
    options: Options = Options(shard_size=4),  # noqa: B008
    max_bad: int = 0,
    workers: int = 1,
) -> list[ShardEntry]:
    return build_dataset(
        records,
        out,
        options,
        max_bad=ErrorBudget(str(max_bad), max_bad),
        workers=workers,
        advance=lambda count: None,
    )


def _bytes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def _contents(folder: Path) -> dict[str, list[str]]:
    """Return index and entries by their shards' names."""
    entries = (folder / "receipts.jsonl").read_text().splitlines()
    splits = read_index(folder).splits.values()
    return {
        "manifest": [json.loads(line)["name"] for line in entries],
        "shards": [shard.sha256 for split in splits for shard in split.shards],
    }


def test_webdataset_reads_every_sample_back(tmp_path: Path) -> None:
    records = _records(tmp_path / "in", 14)
    _build(records, tmp_path / "out")
    index = read_index(tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.path) for shard in index.split("train").shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = {sample["__key__"]: sample for sample in dataset}
    assert samples.keys() == {record.key for record in records}
    for i, record in enumerate(records):
        sample = samples[record.key]
        assert sample["jpg" if i % 3 == 0 else "png"] == record.image.read_bytes()
        assert json.loads(sample["json"]) == {
            "key": record.key,
            "captions": list(record.captions),
            "split": "train",
            "number": i,
        }
        assert sample["txt"].decode() == record.captions[0]
    assert max(len(record.captions) for record in records) == 7
    assert index.split("train").num_captions == sum(len(record.captions) for record in records)


def test_offsets_and_digests_point_at_the_right_bytes(tmp_path: Path) -> None:
    records = {record.key: record for record in _records(tmp_path / "in", 9)}
    _build(list(records.values()), tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert [shard.num_samples for shard in index.split("train").shards] == [4, 4, 1]
    for shard in index.split("train").shards:
        tar = (tmp_path / "out" / shard.path).read_bytes()
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard.num_bytes, shard.sha256)
        table = index.offsets(shard)
        assert table.dtype == np.int64
        for image_at, image_bytes, meta_at, meta_bytes, identity in table.tolist():
            image = tar[image_at : image_at + image_bytes]
            record = records.pop(json.loads(tar[meta_at : meta_at + meta_bytes])["key"])
            assert image == record.image.read_bytes()
            assert identity == image_id(image)
    assert not records


@pytest.mark.parametrize("recode", [None, Recode(max_side=24, format="jpeg")])
def test_one_two_and_three_workers_write_the_same_bytes(
    tmp_path: Path, recode: Recode | None
) -> None:
    options = Options(shard_size=4, recode=recode)
    records = _records(tmp_path / "in", 13) + _records(tmp_path / "in", 5, "val")
    records[4].image.write_bytes(b"broken")
    for workers in (1, 2, 3):
        _build(records, tmp_path / str(workers), options=options, workers=workers, max_bad=1)
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "2") == _bytes(tmp_path / "3")
    assert "skipped.jsonl" in _bytes(tmp_path / "1")


def test_a_finished_run_is_kept_and_a_damaged_one_mended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = _records(tmp_path / "in", 12)
    _build(records, out)
    before = _bytes(out)
    inodes = {p.name: p.stat().st_ino for p in out.glob("train-*")}

    _build(records, out)
    assert {p.name: p.stat().st_ino for p in out.glob("train-*")} == inodes

    (out / "train-00000.tar").unlink()
    damaged = bytearray((out / "train-00001.tar").read_bytes())
    damaged[600] ^= 1
    (out / "train-00001.tar").write_bytes(damaged)
    (out / "train-00002.npy").write_bytes(b"")
    (out / "train-00007.tar.tmp").write_bytes(b"half")
    _build(records, out)
    assert _bytes(out) == before


RUN = """
import argparse, os, sys
from dist_vse.shards import cli
from dist_vse.shards.build import write

add = write._add_sample

def wait_and_add(tar, record, *rest):
    if record.key == os.environ.get("WAIT_KEY"):
        open(os.environ["WAIT_PIPE"]).read()
    return add(tar, record, *rest)

write._add_sample = wait_and_add
parser = argparse.ArgumentParser()
cli.add_arguments(parser)
sys.exit(cli.run(parser.parse_args()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("max_side", [0, 24])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, max_side: int) -> None:
    """Kill the process between two images of a shard: the shards before it are whole."""
    records = _records(tmp_path / "in", 12)
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"image": str(r.image), "captions": r.captions, "key": r.key, **r.extra} for r in records
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-c", RUN, "jsonl", str(pairs), "--shard-size=4"]
    command += [f"--max-side={max_side}"] if max_side else []
    expected, out = tmp_path / "expected", tmp_path / "out"
    subprocess.run([*command, str(expected)], check=True, stdout=subprocess.DEVNULL)

    names = [f"train-{number:05d}.tar" for number in range(3)]
    last = webdataset.WebDataset([str(expected / names[-1])], shardshuffle=False)
    second = [sample["__key__"] for sample in last][1]
    os.mkfifo(tmp_path / "pipe")
    command.append(str(out))
    waiting = {**os.environ, "WAIT_KEY": second, "WAIT_PIPE": str(tmp_path / "pipe")}
    process = subprocess.Popen([*command, "--workers=1"], stderr=subprocess.PIPE, env=waiting)
    pipe = os.open(tmp_path / "pipe", os.O_WRONLY)  # waits until the process opens it to read
    process.kill()
    assert process.wait() == -signal.SIGKILL
    os.close(pipe)
    assert process.stderr is not None
    process.stderr.close()
    assert not (out / "index.json").exists()
    done = {name: (out / name).stat().st_ino for name in names[:-1]}
    assert not (out / names[-1]).exists()

    subprocess.run([*command, "--workers=2"], check=True, stdout=subprocess.DEVNULL)
    assert {name: (out / name).stat().st_ino for name in names[:-1]} == done
    assert _bytes(out) == _bytes(expected)


def test_a_changed_input_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = _records(tmp_path / "in", 12)
    _build(records, out)
    old = read_index(out)
    records[0].image.write_bytes(encode(draw(99)))
    _build(records, out)
    new = read_index(out)
    pairs = zip(old.split("train").shards, new.split("train").shards, strict=True)
    assert sum(a != b for a, b in pairs) == 1

    _build(records[:6], out, options=Options(shard_size=3))  # fewer and smaller: nothing stale
    assert sorted(p.name for p in out.glob("*.tar")) == ["train-00000.tar", "train-00001.tar"]
    assert sorted(p.name for p in out.glob("*.npy")) == ["train-00000.npy", "train-00001.npy"]
    assert read_index(out).split("train").num_samples == 6


def test_another_run_may_add_a_split(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _build(_records(tmp_path / "in", 6), out)
    _build(_records(tmp_path / "in", 3, "val"), out)
    index = read_index(out)
    assert {name: split.num_samples for name, split in index.splits.items()} == {
        "train": 6,
        "val": 3,
    }
    other = tmp_path / "other"
    _build(_records(tmp_path / "in", 3, "val"), other)
    _build(_records(tmp_path / "in", 6), other)
    assert _contents(other) == _contents(out)

    broken = _records(tmp_path / "in", 6)
    broken[3].image.write_bytes(b"")
    with pytest.raises(UserError):
        _build(broken, out)
    assert list(read_index(out).splits) == ["val"]  # a half-made split is in no index


def test_bad_samples_are_an_error_that_names_the_key(tmp_path: Path) -> None:
    records = _records(tmp_path / "in", 8)
    records[5].image.unlink()
    with pytest.raises(UserError, match=r"sample 'train5' \(.*train5\.img\): no such image file"):
        _build(records, tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def test_bad_samples_within_the_budget_are_listed(tmp_path: Path) -> None:
    records = _records(tmp_path / "in", 12)
    records[1].image.unlink()
    records[2].image.write_bytes(b"")
    records[3].image.write_bytes(records[3].image.read_bytes()[:-90])
    _build(records, tmp_path / "out", max_bad=3)
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    skipped = {entry["key"]: entry for entry in map(json.loads, lines)}
    assert skipped.keys() == {"train1", "train2", "train3"}
    assert skipped["train2"]["path"] == str(records[2].image)
    assert skipped["train2"]["reason"] == "the image file is empty (0 bytes)"
    assert "does not decode" in skipped["train3"]["reason"]
    assert read_index(tmp_path / "out").split("train").num_samples == 9

    with pytest.raises(UserError, match=r"bad of 12 samples where --max-bad allows 2; .*skipped"):
        _build(records, tmp_path / "out", max_bad=2)

    _build(_records(tmp_path / "in", 12), tmp_path / "out")  # fixed: nothing is skipped
    assert not (tmp_path / "out/skipped.jsonl").exists()
    assert read_index(tmp_path / "out").split("train").num_samples == 12


def test_a_split_of_bad_samples_is_an_error(tmp_path: Path) -> None:
    records = _records(tmp_path / "in", 3) + _records(tmp_path / "in", 2, "val")
    for record in records[3:]:
        record.image.write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="split 'val': every sample is bad"):
        _build(records, tmp_path / "out", max_bad=5)
