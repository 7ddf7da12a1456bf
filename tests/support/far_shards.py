"""Shards that lie elsewhere, and a cache for their copies."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_vse.data.index import Shard
from dist_vse.data.shard_cache import Cache
from tests.support.datasets import write_dataset
from tests.support.flaky_server import STALL_S


def far_shards(folder: Path, sizes: Sequence[int]) -> list[Shard]:
    """Write shards into the folder; return them with URLs for paths."""
    shards = write_dataset(folder, {"train": sizes}).split("train").shards
    return [replace(shard, path=(folder / shard.path).as_uri()) for shard in shards]


def cache(folder: Path, *delays_s: float, limit: float = 1e9) -> Cache:
    """Return a cache that waits these seconds before it tries again, here never.

    It runs commands: `tests/data/test_consent.py` is about those that may not run.
    """
    return Cache(folder, limit, STALL_S, delays_s, allow_pipe=True)
