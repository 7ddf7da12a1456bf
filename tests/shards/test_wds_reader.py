"""No sample of a tar gets lost: all come out, or stand in the skipped_log."""

import json
from pathlib import Path

import pytest
import webdataset

from dist_vse.data.index import read_index
from dist_vse.shards.index.wds_reader import read_samples
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_tar

ONE = ("--workers", "1")
IMAGE = encode(draw(0))


def test_only_webdatasets_own_notes_are_skipped(tmp_path: Path) -> None:
    names = ("__dog.png", "__x__.png", "a/__y__.png", "__note__", "__notes__/z.png", "_b.png", "c.")
    tar = write_tar(tmp_path / "x.tar", {name: IMAGE for name in names})
    read = webdataset.WebDataset([str(tar)], shardshuffle=False)
    keys = [sample.key for sample in read_samples(tar)]
    assert keys == [sample["__key__"] for sample in read]
    assert keys == ["__dog", "__x__", "a/__y__", "_b", "c"]


def test_an_extension_that_comes_again_begins_another_sample(tmp_path: Path) -> None:
    """`_tar` takes a dict: the second pair has capitals, which are the same extensions."""
    members = {"d.png": IMAGE, "d.txt": "one", "d.PNG": encode(draw(1)), "d.TXT": "two"}
    tar = write_tar(tmp_path / "in/x.tar", members | {"d.Txt": "and no image"})
    first, second, third = read_samples(tar)
    assert first.image != second.image
    assert [sample.captions for sample in (first, second)] == [("one",), ("two",)]
    assert third.fault == "no image (d.Txt)"
    run_shard("index", tar, "--out", tmp_path / "index", "--max-bad", "1", *ONE)
    run_shard("reshard", tar, tmp_path / "out", "--max-bad", "1", *ONE)
    for folder in (tmp_path / "index", tmp_path / "out"):
        assert read_index(folder).split("train").num_samples == 2
        (skipped,) = (folder / "skipped.jsonl").read_text().splitlines()
        assert json.loads(skipped)["reason"] == "no image (d.Txt)"


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_the_image_is_the_member_with_a_bare_extension(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    members = [("c.depth.png", encode(draw(1))), ("c.png", IMAGE), ("c.txt", b"one")]
    tar = write_tar(tmp_path / "x.tar", dict(members[i] for i in order))
    (sample,) = read_samples(tar)
    assert sample.image is not None
    at, size = sample.image
    assert tar.read_bytes()[at : at + size] == IMAGE


def test_resharding_reads_what_the_index_names(tmp_path: Path) -> None:
    """Not the tars beside them; each under the split that it was indexed as."""
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"in/{name}.tar", {f"{name}.png": IMAGE, f"{name}.txt": name})
    run_shard("index", tmp_path / "in/a.tar", *ONE)
    run_shard("index", tmp_path / "in/b.tar", "--split", "val", *ONE)
    run_shard("reshard", tmp_path / "in", tmp_path / "out", *ONE)
    splits = read_index(tmp_path / "out").splits
    assert {name: split.num_samples for name, split in splits.items()} == {"train": 1, "val": 1}
