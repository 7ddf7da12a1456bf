"""Remote shards: copied once, checked, tried again, and named when they cannot be had."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_vse.errors import UserError
from dist_vse.index import Index, Shard, Split, is_remote, write_index
from dist_vse.stream import captions
from dist_vse.stream.fetch import fetch
from tests.datasets import write_dataset


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A shard that lies elsewhere, with a URL for its path."""
    index = write_dataset(tmp_path / "far", {"train": 5})
    entry = index.split("train").shards[0]
    return replace(entry, path=(tmp_path / "far" / entry.path).as_uri())


def test_what_is_remote() -> None:
    remote = ("https://host/a.tar", "gs://bucket/a.tar", "pipe:cat a.tar", "file:///a.tar")
    assert all(map(is_remote, remote))
    assert not any(map(is_remote, ("a.tar", "sub/a.tar", "/abs/a.tar", "../a.tar")))


def test_a_copy_is_made_once(shard: Shard, tmp_path: Path) -> None:
    source = tmp_path / "far" / "train-00000.tar"
    content = source.read_bytes()
    path = fetch(shard, tmp_path / "cache")
    assert path.read_bytes() == content
    source.unlink()
    assert fetch(shard, tmp_path / "cache") == path
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_wrong_copy_never_appears(shard: Shard, tmp_path: Path) -> None:
    wrong = replace(shard, sha256="0" * 64)
    with pytest.raises(UserError, match=r"train-00000\.tar: cannot be fetched .*SHA-256"):
        fetch(wrong, tmp_path / "cache", delays_s=(0.0,))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("path", ["file:///nowhere/a.tar", "pipe:exit 3; cat /nowhere/a.tar"])
def test_a_missing_source_is_named(shard: Shard, tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"nowhere.*DIST_VSE_CACHE"):
        fetch(replace(shard, path=path), tmp_path / "cache", delays_s=())


def test_a_failed_copy_is_tried_again(shard: Shard, tmp_path: Path) -> None:
    source, mark = tmp_path / "far" / "train-00000.tar", tmp_path / "mark"
    flaky = f"pipe:test -e {mark} && cat {source} || (touch {mark}; head -c 900 {source})"
    with pytest.raises(UserError):
        fetch(replace(shard, path=flaky), tmp_path / "cache", delays_s=())
    mark.unlink()
    path = fetch(replace(shard, path=flaky), tmp_path / "cache", delays_s=(0.0,))
    assert path.read_bytes() == source.read_bytes()


@pytest.fixture
def remote_index(shard: Shard, tmp_path: Path) -> Callable[[str], Index]:
    def build(path: str) -> Index:
        near = tmp_path / "near"
        near.mkdir()
        (near / "train-00000.npy").write_bytes((tmp_path / "far/train-00000.npy").read_bytes())
        index = Index(near, {"train": Split([replace(shard, path=path)], 10)})
        write_index(index)
        return index

    return build


def test_a_data_set_of_remote_shards_is_read(
    remote_index: Callable[[str], Index],
    shard: Shard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    index = remote_index(shard.path)
    assert len(list(captions(index, "train"))) == 10
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
