"""Damaged or altered files of a run: the older state or one line, and no silence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError
from dist_vse.data.samples import Skipped
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import MANIFEST, Progress
from dist_vse.runs.environment import read_environment, record_environment
from dist_vse.runs.files import ENVIRONMENT_NAME, METRICS_NAME, drop_lines_after
from dist_vse.runs.lease import acquire
from dist_vse.runs.skipped import SkippedLog


def _write(folder: Path, step: int) -> Path:
    """Write a whole checkpoint of two ranks; return its folder."""
    path = folder / f"step-{step:06d}"
    names = ("model.safetensors", "rank-0.safetensors", "rank-1.safetensors")
    receipts = checkpoint.write_files(path, {name: {"x": torch.ones(2)} for name in names})
    more = {"world_size": 2, "zero_stage": 1, "score": 1.5, "attempt": 1}
    checkpoint.write_manifest(path, Progress(step, 8 * step, [[0, 8], [1, 0]]), receipts, **more)
    return path


def test_any_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    older, newer = _write(tmp_path, 10), _write(tmp_path, 20)
    whole = (newer / MANIFEST).read_bytes()
    content = checkpoint.read_manifest(newer)
    for place in range(len(whole)):
        for bit in (0, 1, 4, 7):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (newer / MANIFEST).write_bytes(changed)
            try:
                assert checkpoint.read_manifest(newer) == content  # white space, say
            except BadFileError:
                assert checkpoint.find_fault(newer) is not None
    (newer / MANIFEST).write_bytes(whole.replace(b'"step": 20', b'"step": 10'))
    assert checkpoint.latest(tmp_path) == older
    (newer / MANIFEST).write_bytes(whole)
    assert checkpoint.latest(tmp_path) == newer


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": []},
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"world_size": 3},
        {"world_size": 10**18},
        {"world_size": "2"},
        {"step": -1},
        {"step": 1.5},
        {"step": None},
        {"streams": [[0]]},
        {"streams": [[1 << 40, 0]]},
        {"streams": None},
        {"score": "high"},
    ],
)
def test_the_fields_of_a_manifest_are_checked(change: dict[str, Any], tmp_path: Path) -> None:
    """Also where somebody has given it a checksum that fits."""
    older, newer = _write(tmp_path, 10), _write(tmp_path, 20)
    content = checkpoint.read_manifest(newer) | change
    content["checksum"] = checkpoint._checksum(content)
    (newer / MANIFEST).write_text(json.dumps(content))
    assert checkpoint.latest(tmp_path) == older


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_object_is_damaged(content: bytes, tmp_path: Path) -> None:
    older, newer = _write(tmp_path, 10), _write(tmp_path, 20)
    (newer / MANIFEST).write_bytes(content)
    assert checkpoint.latest(tmp_path) == older
    checkpoint.prune(tmp_path, keep_last=1, keep_best=1)
    assert checkpoint.steps(tmp_path) == [older, newer]


def test_bad_lines_of_a_log_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    good = [{"step": 1, "x": "\ud800"}, {"step": 2}]
    bad = [b"5", b"{}", b"[]", b"\xff\xfe", b'{"step": "x"}', b'{"step": 9}', b'{"step": 1']
    path.write_bytes(b"\n".join([*bad[:-1], *(json.dumps(g).encode() for g in good), bad[-1]]))
    drop_lines_after(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == good


def test_a_damaged_log_of_skipped_samples_and_lease_end_nothing(tmp_path: Path) -> None:
    (tmp_path / "skipped.jsonl").write_bytes(b'[]\n\xff\n{"step": 1}\n{"step": 1, "epoch": 0}\n')
    log = SkippedLog(tmp_path / "skipped.jsonl", 5, share=0.1, per_epoch=10)
    log.add(6, (Skipped("k", "s", "r", 0),))
    with pytest.raises(UserError, match="epoch 0 has 2 bad samples"):
        log.flush()
    for content in ('{"attempt": "x"}', "[]", '{"attempt": 1, "restarts": []}', "\udcff"):
        (tmp_path / "lease.json").write_bytes(content.encode(errors="surrogateescape"))
        assert acquire(tmp_path).attempt == 1


def test_a_run_does_not_go_on_with_other_data_or_words(tmp_path: Path) -> None:
    words = tmp_path / "vocabulary.json"
    words.write_text('["a"]')
    record_environment(tmp_path, 0, {"/old": "aaaa", "/other": "bbbb"})
    record_environment(tmp_path, 5, {"/moved": "bbbb", "/new": "aaaa"})  # the same, elsewhere
    with pytest.raises(UserError, match=r"began with other data .*aaaa, bbbb; now aaaa, cccc"):
        record_environment(tmp_path, 5, {"/old": "aaaa", "/other": "cccc"})
    words.write_text('["b"]')
    with pytest.raises(UserError, match=r"vocabulary\.json: has changed since the run began"):
        record_environment(tmp_path, 5, {"/old": "aaaa", "/other": "bbbb"})
    record_environment(tmp_path, 0, {"/old": "cccc"})  # nothing was learned yet


def test_garbage_in_the_environments_log_is_left_out(tmp_path: Path) -> None:
    record_environment(tmp_path, 0, {"/old": "aaaa"})
    path = tmp_path / ENVIRONMENT_NAME
    whole = path.read_bytes()
    path.write_bytes(b"\xff\n" + whole + b'{"data": 5}\n{}\n[]\n' + b"[" * 100_000)
    found = read_environment(tmp_path)
    assert found is not None and found["data"] == {"/old": "aaaa"}
