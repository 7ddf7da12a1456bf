"""The cache of remote shards: its limit, the room that copies hold, its settings."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data import shard_cache
from dist_vse.data.shard_cache import cache_from_environment, fetch, open_copy
from tests.support.far_shards import cache, far_shards
from tests.support.waiting import wait_until


def test_the_cache_keeps_to_its_limit(tmp_path: Path) -> None:
    shards = far_shards(tmp_path / "far", [4] * 6)
    room = cache(tmp_path / "cache", limit=3.5 * max(s.num_bytes for s in shards))
    left_over = tmp_path / "cache" / f"{'0' * 16}-old.tar.9999999.part"  # by a killed process
    somebodys = tmp_path / "cache" / "notes.tar"
    left_over.parent.mkdir()
    for path in (left_over, somebodys):
        path.write_bytes(bytes(1000))
        os.utime(path, (0, 0))
    for n in (0, 1, 2):
        path, file = open_copy(shards[n], room)
        os.close(file)
        os.utime(path, (100 + n, 100 + n))
    for n in (0, 3):  # 0 is used again, so that 1 is the one used longest ago
        os.close(open_copy(shards[n], room)[1])
    kept = {path.name.partition("-")[2] for path in (tmp_path / "cache").glob("*-*.tar")}
    assert kept == {"train-00000.tar", "train-00002.tar", "train-00003.tar"}
    assert not left_over.exists()
    assert somebodys.exists()


def test_a_shard_larger_than_the_cache_is_told(tmp_path: Path) -> None:
    (shard,) = far_shards(tmp_path / "far", [5])
    message = rf"has {shard.num_bytes:,} bytes, more than .* may hold .*; raise DIST_VSE_CACHE_GIB"
    with pytest.raises(UserError, match=message):
        fetch(shard, cache(tmp_path / "cache", limit=shard.num_bytes - 1))
    fetch(shard, cache(tmp_path / "cache", limit=shard.num_bytes))


def test_copies_that_are_being_made_hold_their_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard waits while another is copied, where there is no room for both."""
    go, far, folder = (tmp_path / name for name in ("go", "far", "cache"))
    first, second = far_shards(far, [4] * 2)
    until = f"until test -e {go}; do sleep 0.01; done"
    first = replace(first, path=f"pipe:{until}; cat {far}/train-00000.tar")
    second = replace(second, path=f"pipe:test -e {go} && cat {far}/train-00001.tar")
    room = cache(folder, limit=1.5 * max(first.num_bytes, second.num_bytes))
    waits = threading.Event()
    monkeypatch.setattr(shard_cache, "WAIT_S", 0.01)
    monkeypatch.setattr(shard_cache, "_reserve", _telling(shard_cache._reserve, waits))
    threads = [threading.Thread(target=fetch, args=(first, replace(room, stall_s=20)))]
    threads[0].start()
    wait_until(lambda: list(folder.glob("*.part")), "the first copy", patience_s=20)
    threads.append(threading.Thread(target=fetch, args=(second, room)))
    threads[1].start()
    assert waits.wait(20)
    go.touch()
    for thread in threads:
        thread.join(20)
    (kept,) = folder.glob("*.tar")  # the first one made room
    assert kept.name.startswith(second.sha256[:16])


def _telling(reserve: Callable[..., bool], refused: threading.Event) -> Callable[..., bool]:
    def wrapped(*arguments: Any) -> bool:
        has_room = reserve(*arguments)
        if not has_room:
            refused.set()
        return has_room

    return wrapped


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_VSE_CACHE_GIB", "2.5")
    assert cache_from_environment().limit_bytes == 2.5 * 2**30
    monkeypatch.setenv("DIST_VSE_CACHE_GIB", "much")
    with pytest.raises(UserError, match="DIST_VSE_CACHE_GIB='much': give a number above 0"):
        cache_from_environment()
