"""Remote shards: copied once, checked, tried again, and named when they cannot be had."""

import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vse import distributed
from dist_vse.errors import UserError
from dist_vse.index import Index, Shard, Split, is_remote, read_index, write_index
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary
from dist_vse.stream import TrainSet, captions, train_batches
from dist_vse.stream import fetch as fetch_module
from dist_vse.stream.fetch import Cache, cache_from_environment, fetch, open_copy
from tests.datasets import write_dataset
from tests.distributed import run_distributed

STALL_S = 0.5


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A shard that lies elsewhere, with a URL for its path."""
    index = write_dataset(tmp_path / "far", {"train": 5})
    entry = index.split("train").shards[0]
    return replace(entry, path=(tmp_path / "far" / entry.path).as_uri())


def cache(folder: Path, *delays_s: float, limit: float = 1e9) -> Cache:
    return Cache(folder, limit, STALL_S, delays_s)


class Server(ThreadingHTTPServer):
    """Serves a folder; a file misbehaves as many times as `faults` says, then behaves."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault = folder, ""
        self.faults = 1_000_000
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.released = threading.Event()

    def shutdown_request(self, request: Any) -> None:
        """Close without the polite end of a connection, which would hide a reset."""
        self.close_request(request)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        self.server.requests[path.name] += 1
        if not path.is_file():
            return self.send_error(404)
        fault = self.server.fault
        if self.server.requests[path.name] > self.server.faults:
            fault = ""
        if fault == "503":
            return self.send_error(503)
        data = path.read_bytes()
        begin = 0
        if "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if fault == "":
            self.wfile.write(data[begin:])
        elif fault == "corrupt":
            self.wfile.write(bytes(len(data) - begin))
        elif fault == "trickle":
            while not self.server.released.wait(STALL_S / 10):
                self.wfile.write(b"x")
        else:
            self.wfile.write(data[begin : begin + (len(data) - begin) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(60)
            elif fault == "reset":  # RST instead of FIN
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "far").mkdir(exist_ok=True)
    with Server(tmp_path / "far") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()


def test_what_is_remote() -> None:
    remote = ("https://host/a.tar", "gs://bucket/a.tar", "pipe:cat a.tar", "file:///a.tar")
    assert all(map(is_remote, remote))
    assert not any(map(is_remote, ("a.tar", "sub/a.tar", "/abs/a.tar", "../a.tar")))


def test_a_copy_is_made_once(shard: Shard, tmp_path: Path) -> None:
    source = tmp_path / "far" / "train-00000.tar"
    content = source.read_bytes()
    path = fetch(shard, cache(tmp_path / "cache"))
    assert path.read_bytes() == content
    source.unlink()
    assert fetch(shard, cache(tmp_path / "cache")) == path
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_wrong_copy_never_appears(shard: Shard, tmp_path: Path) -> None:
    wrong = replace(shard, sha256="0" * 64)
    with pytest.raises(UserError, match=r"train-00000\.tar: cannot be fetched .*SHA-256"):
        fetch(wrong, cache(tmp_path / "cache", 0.0))
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


@pytest.mark.parametrize("path", ["file:///nowhere/a.tar", "pipe:exit 3; cat /nowhere/a.tar"])
def test_a_missing_source_is_named(shard: Shard, tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"nowhere.*DIST_VSE_CACHE"):
        fetch(replace(shard, path=path), cache(tmp_path / "cache"))


def test_a_failed_copy_is_tried_again(shard: Shard, tmp_path: Path) -> None:
    source, mark = tmp_path / "far" / "train-00000.tar", tmp_path / "mark"
    flaky = f"pipe:test -e {mark} && cat {source} || (touch {mark}; head -c 900 {source})"
    with pytest.raises(UserError, match=rf"ends after 900 of {shard.num_bytes} bytes"):
        fetch(replace(shard, path=flaky), cache(tmp_path / "cache"))
    mark.unlink()
    path = fetch(replace(shard, path=flaky), cache(tmp_path / "cache", 0.0))
    assert path.read_bytes() == source.read_bytes()


def test_a_stalled_command_is_ended_with_all_that_it_started(shard: Shard, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stalls = f"pipe:(echo $BASHPID $$ > {pids}; exec sleep 600) | cat"
    with pytest.raises(UserError, match=r"no byte in 0\.5 s"):
        fetch(replace(shard, path=stalls), cache(tmp_path / "cache"))
    for pid in pids.read_text().split():
        assert not Path(f"/proc/{pid}/cmdline").exists() or not _runs(int(pid))


def _runs(pid: int) -> bool:
    """Tell whether a process lives; one that only waits to be reaped does not."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("fault", ["stall", "truncate", "reset", "503", "corrupt", "trickle"])
def test_a_server_that_fails_once_does_no_harm(
    shard: Shard, server: Server, tmp_path: Path, fault: str
) -> None:
    server.fault, server.faults = fault, 1
    far = replace(shard, path=server.url("train-00000.tar"))
    path = fetch(far, cache(tmp_path / "cache", 0.0, 0.0))
    assert path.read_bytes() == (tmp_path / "far" / "train-00000.tar").read_bytes()
    if fault in ("stall", "truncate"):  # gone on with where it broke off
        assert server.ranges == [f"bytes={shard.num_bytes // 2}-"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stall", "timed out"),
        ("truncate", r"ends after \d+ of \d+ bytes"),
        ("reset", "reset"),
        ("503", "answers 503"),
        ("corrupt", "SHA-256"),
        ("trickle", r"only \d+ bytes in 0\.5 s"),
    ],
)
def test_a_server_that_goes_on_failing_is_told_soon(
    shard: Shard, server: Server, tmp_path: Path, fault: str, reason: str
) -> None:
    server.fault = fault
    far = replace(shard, path=server.url("train-00000.tar"))
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^http://\S+train-00000\.tar: cannot .*{reason}"):
        fetch(far, cache(tmp_path / "cache", 0.1))
    assert time.monotonic() - began < 2 * (2 * STALL_S + 0.1) + 2
    assert server.requests["train-00000.tar"] == 2


def test_what_is_gone_is_asked_for_once(shard: Shard, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answers 404"):
        fetch(replace(shard, path=server.url("gone.tar")), cache(tmp_path / "cache", 9.0, 9.0))
    assert server.requests["gone.tar"] == 1


def test_who_waited_for_a_failure_does_not_wait_again(
    shard: Shard, server: Server, tmp_path: Path
) -> None:
    server.fault = "stall"
    far = replace(shard, path=server.url("train-00000.tar"))
    errors: list[str] = []

    def ask() -> None:
        with pytest.raises(UserError) as caught:
            fetch(far, cache(tmp_path / "cache", 0.0))
        errors.append(str(caught.value))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 4 and len(set(errors)) == 1
    assert server.requests["train-00000.tar"] == 2
    server.fault = ""
    assert fetch(far, cache(tmp_path / "cache")).is_file()  # a later one tries anew


def test_the_cache_keeps_to_its_limit(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "far", {"train": [4] * 6})
    shards = [
        replace(s, path=(tmp_path / "far" / s.path).as_uri()) for s in index.split("train").shards
    ]
    room = cache(tmp_path / "cache", limit=3.5 * max(s.num_bytes for s in shards))
    left_over = tmp_path / "cache" / "old.part"
    left_over.parent.mkdir()
    left_over.write_bytes(bytes(1000))
    os.utime(left_over, (0, 0))
    for n in (0, 1, 2, 0, 3):  # 0 is used again, so that 1 is the oldest
        path, file = open_copy(shards[n], room)
        os.close(file)
        os.utime(path, (time.time() + 10 * n, time.time() + (40 if n == 0 else 10 * n)))
    kept = {path.name.partition("-")[2] for path in (tmp_path / "cache").glob("*.tar")}
    assert kept == {"train-00000.tar", "train-00002.tar", "train-00003.tar"}
    assert not left_over.exists()


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE_GIB", "2.5")
    assert cache_from_environment().limit_bytes == 2.5 * 2**30
    monkeypatch.setenv("DIST_VSE_CACHE_GIB", "much")
    with pytest.raises(UserError, match="DIST_VSE_CACHE_GIB='much': give a number above 0"):
        cache_from_environment()


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
        remote = Index(near, {"train": Split(shards, split.num_captions)})
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
    fetch_module.RETRY_DELAYS_S = (0.1,)
    index = read_index(folder)
    batches = train_batches(
        [TrainSet(index, "train")],
        seed=0,
        global_batch_size=12,
        lanes=2,
        shuffle_window=9,
        size=8,
        crop="center",
        min_crop_area=1.0,
        flip=False,
        color_jitter=0.0,
        tokenizer=WordTokenizer(["a"], 8),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=num_workers,
    )
    rows = []
    try:
        for _ in range(steps):
            with distributed.same_verdict():
                batch = next(batches)
            rows += batch.origin.tolist()
    except UserError as error:
        return str(error)
    return rows


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


@pytest.mark.parametrize("fault", ["stall", "truncate", "reset", "503"])
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


def test_the_next_blocks_shards_are_copied_ahead(
    remote_index: Callable[[Callable[[str], str]], Index],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    index = remote_index(server.url)
    batches = train_batches(
        [TrainSet(index, "train")],
        seed=0,
        global_batch_size=1,
        lanes=1,
        shuffle_window=9,
        size=8,
        crop="center",
        min_crop_area=1.0,
        flip=False,
        color_jitter=0.0,
        tokenizer=WordTokenizer(build_vocabulary(captions(index, "train"), 1), 8),
        rank=0,
        world_size=1,
        num_workers=0,
        state=np.zeros((1, 2), np.int64),
    )
    for path in (tmp_path / "cache").iterdir():  # what the vocabulary read
        path.unlink()
    next(batches)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*.tar"))) < 3:  # of 4; blocks touch two or three
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
