"""An index and side files that somebody else made: one line for whatever they hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.data.index import FORMAT, Index, Shard, Split, read_index

SHARD = {"path": "a.tar", "num_samples": 2, "num_bytes": 1000, "sha256": "x"}


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b'{"format": 1, "splits": {"train": {"shards": [], "num_captions": "x"}}}',
        b'{"format": 1, "splits": {"train": {"shards": [5], "num_captions": 1}}}',
        json.dumps(
            {
                "format": 1,
                "splits": {"train": {"shards": [SHARD | {"num_bytes": -1}], "num_captions": 1}},
            }
        ).encode(),
    ],
)
def test_an_odd_index_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(UserError, match="not a dist_vse index"):
        read_index(tmp_path)


@pytest.mark.parametrize("side", ["", "side"])
@pytest.mark.parametrize(
    ("column", "value"), [(0, -1), (0, 1 << 62), (1, -1), (1, 1 << 62), (2, -5), (3, 1 << 62)]
)
def test_impossible_places_are_refused(side: str, column: int, value: int, tmp_path: Path) -> None:
    shard = Shard("a.tar", 2, 1000, "x", side)
    index = Index(tmp_path, {"train": Split([shard], 2)})
    table = np.array([[0, 500, 500, 500, 7], [0, 1000, 1000, 0, -7]])
    np.save(tmp_path / shard.offsets_name, table)
    assert np.array_equal(index.offsets(shard), table)
    table[1, column] = value
    np.save(tmp_path / shard.offsets_name, table)
    with pytest.raises(UserError, match="places a sample outside"):
        index.offsets(shard)


def test_offsets_of_another_type_are_refused(tmp_path: Path) -> None:
    shard = Shard("a.tar", 2, 1000, "x")
    np.save(tmp_path / "a.npy", np.zeros((2, 5)))
    with pytest.raises(UserError, match="places a sample outside"):
        Index(tmp_path, {}).offsets(shard)


def test_tars_without_an_index_are_told_how(tmp_path: Path) -> None:
    for name, remedy in (
        ("0.tar", "dist-vse shard index '.*' --out DIR"),
        ("0.tar.gz", "unpack the tars, or `dist-vse shard reshard '.*' OUT`"),
    ):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        (folder / name).write_bytes(b"")
        for given in (folder, folder / name, folder / f"{{0..9}}{name[1:]}"):
            with pytest.raises(UserError, match=remedy):
                read_index(given)


@pytest.mark.parametrize("splits", ["{}", '{"train": {"num_captions": 0, "shards": []}}'])
def test_a_data_set_without_samples_is_no_traceback(splits: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(f'{{"format": {FORMAT}, "splits": {splits}}}')
    for command in ("stats", "verify"):
        assert cli.main(["shard", command, str(tmp_path), "--workers", "1"]) == 0
