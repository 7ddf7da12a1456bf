"""`verify` finds every kind of damage; `repair` rewrites that and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from tests.support.datasets import Sample, draw, encode, make_sample, write_shards
from tests.support.shards import run_shard, write_img2dataset

ONE = ("--workers", "1")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two splits by two commands, with one bad sample, some images shrunk."""
    (tmp_path / "in").mkdir()
    for i in range(13):
        image = draw(i, size=64 if i % 2 else 32)
        (tmp_path / f"in/{i}.png").write_bytes(encode(image) if i != 7 else b"")
    for name, numbers in (("train", range(10)), ("val", range(10, 13))):
        lines = [{"image": f"{i}.png", "captions": ["a", "b"], "split": name} for i in numbers]
        pairs = tmp_path / f"in/{name}.jsonl"
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ("--shard-size", "3", "--max-side", "48", "--max-bad", "10%", *ONE)
        run_shard("jsonl", pairs, tmp_path / "out", *options)
    return tmp_path / "out"


def _state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_ino, p.read_bytes()) for p in folder.iterdir()}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("train-00001.tar", Path.unlink, "the tar is missing"),
    ("train-00001.tar", _flip, r"the bytes are not those of the index \(SHA-256\)"),
    ("train-00001.tar", lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes where the index says"),
    ("train-00001.npy", Path.unlink, "npy.*is missing"),
    ("train-00001.npy", lambda p: p.write_bytes(b""), "npy cannot be used"),
    ("train-00001.npy", lambda p: np.save(p, np.zeros_like(np.load(p))), "other bytes"),
]


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGE)
def test_damage_is_found_and_mended(
    made: Path,
    name: str,
    harm: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_shard("verify", made, *ONE) == 0
    before = _state(made)
    harm(made / name)
    capsys.readouterr()
    with pytest.raises(UserError, match=rf"1 of its shards are damaged; .*repair {made}"):
        run_shard("verify", made, "--workers", "2")
    output = capsys.readouterr().out
    with pytest.raises(AssertionError, match=rf"(?m)^train-00001\.tar: .*{message}"):
        raise AssertionError(output)
    assert output.count(".tar: ") == 1
    assert run_shard("repair", made, *ONE) == 0
    assert run_shard("verify", made, *ONE) == 0
    after = _state(made)
    assert {n: data for n, (_, data) in after.items()} == {n: d for n, (_, d) in before.items()}
    tars = [n for n in before if n.endswith(".tar") and n != "train-00001.tar"]
    assert {n: after[n][0] for n in tars} == {n: before[n][0] for n in tars}
    assert len(tars) == 4


@pytest.mark.parametrize(("name", "harm", "message"), [DAMAGE[0], DAMAGE[3], DAMAGE[4]])
def test_stats_tell_what_is_missing_or_cut(
    made: Path, name: str, harm: Callable[[Path], object], message: str
) -> None:
    harm(made / name)
    with pytest.raises(UserError, match=rf"{name}: is (missing|cut)") as caught:
        run_shard("stats", made, *ONE)
    assert "\n" not in str(caught.value) and "dist-vse shard" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '{"splits": 1, "options": {}}'])
def test_a_broken_note_of_the_commands_is_told(made: Path, text: str) -> None:
    (made / "commands.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=r"commands\.jsonl: is broken \(.*; remove it"):
        run_shard("repair", made, *ONE)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[]",
        b'{"format": 1, "splits": []}',
        b'{"format": 1, "splits": {"train": {"shards": [{"path": 5, "num_samples": 1, '
        b'"num_bytes": 1, "sha256": ""}], "num_captions": 1}}}',
        b'{"format": 1, "splits": {"train": {"shards": [{"path": "a", "num_samples": "1", '
        b'"num_bytes": 1, "sha256": ""}], "num_captions": 1}}}',
    ],
)
def test_a_broken_index_is_told(made: Path, content: bytes) -> None:
    (made / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json: not a dist_vse index \(.*; make it"):
        run_shard("verify", made, *ONE)


def test_an_index_of_another_format_is_told(made: Path) -> None:
    (made / "index.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match=r"index\.json: format 9, but this version reads 1$"):
        run_shard("verify", made, *ONE)


def test_resharding_misses_no_tar_of_the_index(made: Path) -> None:
    (made / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar: is missing, and the index names it"):
        run_shard("reshard", made, made.parent / "again", *ONE)


def test_repair_needs_to_know_the_command(made: Path) -> None:
    (made / "commands.jsonl").unlink()
    with pytest.raises(UserError, match="run the command that made the shards again"):
        run_shard("repair", made)
    with pytest.raises(UserError, match="no such index"):
        run_shard("verify", made.parent / "in")


def test_samples_that_cannot_be_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of another writer, whole by their checksums."""
    good, photo = make_sample(0), encode(draw(1), "JPEG")
    samples = [
        good,
        Sample("broken", b"GIF89a", ("a",)),
        Sample("json", photo, ("a",), "jpg", meta=b'{"key": "json"}'),
        Sample("blank", photo, ("a", " "), "jpg"),
        Sample("rows", photo, ("a",), "jpg", meta=b"nothing"),
    ]
    write_shards(tmp_path, {"train": [samples]})
    with pytest.raises(UserError, match="4 samples cannot be used, though their bytes are as"):
        run_shard("verify", tmp_path, *ONE)
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if line.startswith("train-00000.tar: sample")]
    named = ("'broken': the file", "'json': its JSON", "'blank': caption 2",
             "in row 4: its JSON")  # fmt: skip
    assert len(faults) == 4
    for fault, name in zip(faults, named, strict=True):
        assert fault.startswith(f"train-00000.tar: sample {name}"), fault


def test_captions_are_counted(made: Path) -> None:
    path = made / "index.json"
    path.write_text(path.read_text().replace('"num_captions": 6', '"num_captions": 7'))
    with pytest.raises(UserError, match="1 of its shards are damaged"):
        run_shard("verify", made, *ONE)


def test_indexed_tars_are_verified_and_indexed_again(tmp_path: Path) -> None:
    first, second = write_img2dataset(tmp_path / "far")
    out = tmp_path / "out"
    run_shard("index", first, f"pipe:cat {second}", "--out", out, *ONE)
    assert run_shard("verify", out, *ONE, "--allow-pipe") == 0
    before = _state(out)
    _flip(out / "train.00001.jsonl")
    (out / "train.00000.npy").unlink()
    with pytest.raises(UserError, match="2 of its shards are damaged"):
        run_shard("verify", out, *ONE, "--allow-pipe")
    run_shard("repair", out, *ONE, "--allow-pipe")
    assert {n: d for n, (_, d) in _state(out).items()} == {n: d for n, (_, d) in before.items()}
    assert read_index(out).splits["train"].num_samples == 14
    data = bytearray(first.read_bytes())
    data[600] ^= 1
    first.write_bytes(data)
    with pytest.raises(UserError, match="1 of its shards are damaged"):
        run_shard("verify", out, *ONE, "--allow-pipe")
