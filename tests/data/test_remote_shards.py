"""Data sets whose shards lie elsewhere: read by several ranks, or lost for all of them."""

import argparse
import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig
from dist_vse.data import shard_cache
from dist_vse.data.eval_stream import captions, eval_batches
from dist_vse.data.index import Index, Split, read_index, write_index
from dist_vse.data.samples import Placement
from dist_vse.data.streams import TrainSet
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.shards import cli
from tests.support.datasets import draw, encode, write_dataset
from tests.support.distributed import run_distributed
from tests.support.flaky_server import STALL_S, Server, serve
from tests.support.streams import PLAIN, open_rank
from tests.support.waiting import wait_until


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with serve(tmp_path / "far") as server:
        yield server


@pytest.fixture
def remote_index(tmp_path: Path) -> Callable[[Callable[[str], str]], Index]:
    """Write four shards far away, and near only what points to them."""

    def build(url: Callable[[str], str]) -> Index:
        near = tmp_path / "near"
        near.mkdir()
        index = write_dataset(tmp_path / "far", {"train": [9] * 4}, size=16)
        for path in (tmp_path / "far").glob("*.npy"):
            (near / path.name).write_bytes(path.read_bytes())
        split = index.split("train")
        shards = [replace(s, path=url(s.path)) for s in split.shards]
        remote = Index(near, {"train": Split(shards, split.num_captions)}, allow_pipe=True)
        write_index(remote)
        return remote

    return build


def _stream(folder: Path, num_workers: int, steps: int) -> list[list[int]] | str:
    """Read this rank's samples, or the error that all ranks agree on."""
    os.environ |= {
        "DIST_VSE_CACHE": str(folder.parent / "cache"),
        "DIST_VSE_STALL_S": str(STALL_S),
        "no_proxy": "*",
    }
    shard_cache.RETRY_DELAYS_S = (0.1,)
    index = read_index(folder, allow_pipe=True)
    batches = open_rank(
        [TrainSet(index, "train")],
        Placement(distributed.rank(), distributed.world_size()),
        num_workers=num_workers,
        global_batch_size=12,
        num_streams=2,
        shuffle_window=9,
        **PLAIN,
    )
    rows = []
    try:
        for _ in range(steps):
            with distributed.raise_on_all_ranks():
                batch = next(batches)
            rows += batch.origin.tolist()
    except UserError as error:
        return str(error)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_read_a_remote_data_set_once(
    remote_index: Callable[[Callable[[str], str]], Index],
    server: Server,
    tmp_path: Path,
    num_workers: int,
) -> None:
    server.fault, server.faults = "truncate", 1  # each shard's first answer
    remote_index(server.url)
    ranks = run_distributed(_stream, 2, tmp_path / "near", num_workers, 3)
    seen = Counter(tuple(row) for rows in ranks for row in rows)
    assert seen == Counter((0, number) for number in range(36))
    assert set(server.requests.values()) == {2}  # the two ranks share the copies


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stall", "truncate", "reset", "503", "slow headers"])
def test_a_lost_shard_ends_every_rank_alike(
    remote_index: Callable[[Callable[[str], str]], Index],
    server: Server,
    tmp_path: Path,
    fault: str,
) -> None:
    server.fault = fault
    remote_index(server.url)
    began = time.monotonic()
    first, second = run_distributed(_stream, 2, tmp_path / "near", 0, 3)
    assert isinstance(first, str) and first == second
    assert "train-0000" in first and "cannot be fetched" in first
    assert time.monotonic() - began < 20


def wait_for_copies(cache: Path, count: int) -> None:
    wait_until(lambda: len(list(cache.glob("*.tar"))) >= count, f"{count} copies", patience_s=20)


def test_the_next_blocks_shards_are_copied_ahead(
    remote_index: Callable[[Callable[[str], str]], Index],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    index = remote_index(server.url)
    batches = open_rank(
        [TrainSet(index, "train")], global_batch_size=1, num_streams=1, shuffle_window=9, **PLAIN
    )
    next(batches)
    wait_for_copies(tmp_path / "cache", 3)  # of 4; blocks touch two or three


def test_evaluation_copies_the_next_shard_ahead(
    remote_index: Callable[[Callable[[str], str]], Index],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    batches = eval_batches(
        remote_index(server.url),
        "train",
        WordTokenizer(["a"], 8),
        ImageConfig(size=8),
        batch_size=5,
    )
    next(batches)  # within the first shard
    wait_for_copies(tmp_path / "cache", 2)
    assert sorted(server.requests) == ["train-00000.tar", "train-00001.tar"]
    assert sum(len(batch.keys) for batch in batches) == 36 - 5


def _write_img2dataset(folder: Path) -> list[Path]:
    """Write two tars as img2dataset names and fills them."""
    folder.mkdir()
    paths = [folder / f"{shard:05d}.tar" for shard in range(2)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(shard * 10000, shard * 10000 + 12):
                key, caption = f"{number:09d}", f"picture number {number}"
                meta = {
                    "key": key,
                    "caption": caption,
                    "url": "http://x/1.jpg",
                    "status": "success",
                }
                parts = {
                    "jpg": encode(draw(number), "JPEG"),
                    "json": json.dumps(meta).encode(),
                    "txt": caption.encode(),
                }
                for extension, data in parts.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_img2datasets_tars_train_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    for name in ("DIST_VSE_CACHE", "DIST_VSE_STALL_S", "no_proxy"):  # `_stream` sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(shard_cache, "RETRY_DELAYS_S", ())
    tars = _write_img2dataset(tmp_path / "far")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    out = tmp_path / "near"
    sources = [f"{prefix}{path}" for path in tars]
    assert cli.run(parser.parse_args(["index", *sources, "--out", str(out), "--workers=1"])) == 0
    rows = _stream(out, 0, 4)  # two epochs
    assert Counter(map(tuple, rows)) == Counter((turn, n) for turn in (0, 1) for n in range(24))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == (2 if prefix else 0)


@pytest.mark.parametrize("scheme", ["file", "pipe"])
def test_a_data_set_of_remote_shards_is_read(
    remote_index: Callable[[Callable[[str], str]], Index],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    prefix = "pipe:cat " if scheme == "pipe" else "file://"
    index = remote_index(lambda name: f"{prefix}{tmp_path}/far/{name}")
    assert len(list(captions(index, "train"))) == 4 * 9 * 2
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
