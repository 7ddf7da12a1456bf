"""Remote shards: copied once, checked, tried again, and named when they cannot be had."""

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.download import CHUNK_BYTES
from dist_vse.data.index import Shard, is_remote
from dist_vse.data.shard_cache import fetch
from tests.support.far_shards import cache, far_shards
from tests.support.flaky_server import STALL_S, Server, serve
from tests.support.waiting import is_running, wait_until


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return far_shards(tmp_path / "far", [5])[0]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with serve(tmp_path / "far") as server:
        yield server


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
    (part,) = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert part.suffix == ".part" and part.stat().st_size == 0


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
    stalls = f"pipe:echo $$ > {pids}; sh -c 'echo $$ >> {pids}; exec sleep 600' | cat"
    with pytest.raises(UserError, match=r"no byte in 0\.5 s"):
        fetch(replace(shard, path=stalls), cache(tmp_path / "cache"))
    shell, sleeper = map(int, pids.read_text().split())
    assert shell != sleeper
    assert not is_running(shell)
    wait_until(lambda: not is_running(sleeper), "the end of a killed process", patience_s=10)


@pytest.mark.parametrize("scheme", ["pipe", "file", "memory"])
def test_a_source_without_end_is_left(shard: Shard, tmp_path: Path, scheme: str) -> None:
    source = tmp_path / "far" / "train-00000.tar"
    if scheme == "memory":
        with fsspec.open("memory://longer.tar", "wb") as file:
            file.write(source.read_bytes() + b"x")
    zeros = {
        "pipe": "pipe:cat /dev/zero",
        "file": "file:///dev/zero",
        "memory": "memory://longer.tar",
    }
    far = replace(shard, path=zeros[scheme])
    with pytest.raises(UserError, match=rf"goes on after {shard.num_bytes} bytes, its size in"):
        fetch(far, cache(tmp_path / "cache", 0.0))
    (part,) = (tmp_path / "cache").glob("*.part")
    assert part.stat().st_size <= shard.num_bytes + CHUNK_BYTES


def test_webdatasets_and_fsspecs_schemes_are_read(shard: Shard, tmp_path: Path) -> None:
    content = (tmp_path / "far" / "train-00000.tar").read_bytes()
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(content)
    far = replace(shard, path="memory://bucket/a.tar")
    assert fetch(far, cache(tmp_path / "cache")).read_bytes() == content


def test_a_library_that_hangs_is_left(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hangs = os.open(fifo, os.O_RDWR)  # a writer that never writes
    with pytest.raises(UserError, match=r"timed out: no byte in 0\.5 s"):
        fetch(replace(shard, path=fifo.as_uri()), cache(tmp_path / "cache"))
    os.close(hangs)  # the reader that was left finds the end


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("abcd://c/x.tar", "abcd"),  # no such scheme
        ("http://host:port/x.tar", "port"),
        ("http://[host/x.tar", "Invalid IPv6 URL"),
        ("http:///x.tar", "no host"),
        ("pipe:echo \0", "null byte"),
    ],
)
def test_an_address_that_makes_no_sense_is_named(
    shard: Shard, tmp_path: Path, url: str, reason: str
) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(url)}: cannot be fetched .*{reason}"):
        fetch(replace(shard, path=url), cache(tmp_path / "cache"))


def test_a_url_may_hold_any_letter(shard: Shard, server: Server, tmp_path: Path) -> None:
    source = tmp_path / "far" / "train-00000.tar"
    for name in ("ü b.tar", "%C3%BC%20b.tar"):  # quoted already: not once more
        (tmp_path / "far" / "ü b.tar").write_bytes(source.read_bytes())
        path = fetch(replace(shard, path=server.url(name)), cache(tmp_path / name))
        assert path.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "fault", ["stall", "truncate", "reset", "503", "corrupt", "trickle", "slow headers"]
)
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
        ("truncate", r"ended [\d,]+ bytes early"),
        ("reset", "reset"),
        ("503", "responded 503"),
        ("corrupt", "SHA-256"),
        ("trickle", r"only \d+ bytes in 0\.5 s"),
        ("slow headers", "timed out"),
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
    with pytest.raises(UserError, match="responded 404"):
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
    assert fetch(far, cache(tmp_path / "cache")).is_file()  # a later one tries again
