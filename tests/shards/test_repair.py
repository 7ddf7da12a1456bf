"""`repair` and a second run touch only what is theirs: no healthy split, no tar of others."""

import json
import os
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.build import sync
from dist_vse.shards.manifest import ShardEntry
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_img2dataset, write_pairs

ONE = ("--workers", "1")


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return inode and bytes of the tars, and the bytes of all else."""
    return {
        path.name: (path.stat().st_ino if path.suffix == ".tar" else 0, path.read_bytes())
        for path in folder.iterdir()
    }


def _source(path: Path, samples: list[tuple[int, str, str]]) -> Path:
    """Write JSONL of (number of a drawing, key, split)."""
    lines = []
    for number, key, split in samples:
        image = path.parent / f"{number}.png"
        image.write_bytes(encode(draw(number)))
        lines.append({"image": str(image), "caption": f"c{number}", "key": key, "split": split})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _flip(path: Path) -> None:
    """Flip a bit, as a disk might: the time of the file stays."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_repair_leaves_a_split_to_the_command_that_made_it_last(tmp_path: Path) -> None:
    """Keys depend on all records of a source (`k`, `k-2`), of which two splits are made again."""
    first = _source(tmp_path / "a", [(0, "k", "train"), (1, "k", "west"), (2, "v", "val")])
    second = _source(tmp_path / "b", [(3, "k", "test"), (4, "k", "train"), (5, "v", "val")])
    out = tmp_path / "out"
    for source in (first, second):
        assert run_shard("jsonl", source, out, *ONE) == 0
    before = _contents(out)
    lines = [json.loads(line) for line in (out / "commands.jsonl").read_text().splitlines()]
    owners = {split: Path(line["options"]["input"]) for line in lines for split in line["splits"]}
    assert owners == {"west": first, "test": second, "train": second, "val": second}
    assert sum(len(line["splits"]) for line in lines) == 4

    assert run_shard("repair", out, *ONE) == 0
    assert _contents(out) == before
    for split in ("west", "val"):
        _flip(out / f"{split}-00000.tar")
    assert run_shard("repair", out, *ONE) == 0
    assert {name: data for name, (_, data) in _contents(out).items()} == {
        name: data for name, (_, data) in before.items()
    }
    _source(tmp_path / "a", [(0, "k", "train")])
    with pytest.raises(UserError, match="a: has no samples of split 'west' any more"):
        run_shard("repair", out, *ONE)


def test_repair_does_not_guess_who_owns_a_split(tmp_path: Path) -> None:
    source = _source(tmp_path / "a", [(0, "k", "train"), (2, "v", "val")])
    assert run_shard("jsonl", source, tmp_path / "out", *ONE) == 0
    note = tmp_path / "out/commands.jsonl"
    line = json.loads(note.read_text())
    note.write_text(note.read_text() + json.dumps(line | {"splits": ["val"]}) + "\n")
    with pytest.raises(UserError, match=r"commands\.jsonl: names 2 commands for split 'val'"):
        run_shard("repair", tmp_path / "out", *ONE)


@pytest.mark.parametrize("remote", [False, True])
def test_repair_never_takes_damaged_bytes_of_an_indexed_tar_for_true(
    tmp_path: Path, remote: bool
) -> None:
    """Neither where the tar's time stayed, nor where it changed; `index` does, when it is told."""
    first, second = write_img2dataset(tmp_path / "far")
    out, given = tmp_path / "out", [first, f"pipe:cat {second}" if remote else second]
    consent = ["--allow-pipe"] if remote else []
    assert run_shard("index", *given, "--out", out, *ONE) == 0
    before, whole = read_index(out), second.read_bytes()
    _flip(second)
    with pytest.raises(UserError, match=r"repair .*; copy an indexed tar again first"):
        run_shard("verify", out, *ONE, *consent)
    for _ in range(2):
        with pytest.raises(UserError, match=r"00001\.tar: the bytes are not those that were ind"):
            run_shard("repair", out, *ONE, *consent)
        assert read_index(out) == before
        os.utime(second)
    damaged = second.read_bytes()
    second.write_bytes(whole)
    assert run_shard("repair", out, *ONE, *consent) == 0
    assert run_shard("verify", out, *ONE, *consent) == 0
    assert read_index(out) == before

    second.write_bytes(damaged)
    with pytest.raises(UserError, match="run `dist-vse shard index` to accept the new bytes"):
        run_shard("repair", out, *ONE, *consent)
    assert run_shard("index", *given, "--out", out, *ONE) == 0
    assert read_index(out) != before
    assert run_shard("repair", out, *ONE, *consent) == 0
    if not remote:
        second.unlink()
        with pytest.raises(UserError, match=r"00001\.tar: is missing; copy it there again"):
            run_shard("repair", out, *ONE, *consent)


def test_a_tar_of_others_among_ours_is_never_written_over(tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "in", 4), tmp_path / "out"
    assert run_shard("jsonl", pairs, out, "--shard-size", "2", *ONE) == 0
    theirs = out / "train-00002.tar"
    theirs.write_bytes((out / "train-00001.tar").read_bytes())
    before = _contents(out)
    for arguments in (("jsonl", pairs, out, "--shard-size", "1"), ("repair", out)):
        with pytest.raises(UserError, match=r"train-00002\.tar: was not made by `dist-vse shard`"):
            run_shard(*arguments, *ONE)
        assert _contents(out) == before
    theirs.unlink()
    (out / "receipts.jsonl").write_text("{torn")  # the index still says which are ours
    assert run_shard("repair", out, *ONE) == 0
    assert (out / "receipts.jsonl").read_bytes() == before["receipts.jsonl"][1]


def test_what_a_killed_run_left_goes_once_no_task_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before the second shard's entry; another split comes between, then larger shards."""
    pairs, out, expected = write_pairs(tmp_path / "in", 4), tmp_path / "out", tmp_path / "expected"
    real, made = sync.append_entry, list[str]()

    def cut(folder: Path, entry: ShardEntry) -> None:
        made.append(entry.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        real(folder, entry)

    monkeypatch.setattr(sync, "append_entry", cut)
    with pytest.raises(KeyboardInterrupt):
        run_shard("jsonl", pairs, out, "--shard-size", "1", *ONE)
    monkeypatch.undo()
    assert made == ["train-00000.tar", "train-00001.tar"]
    assert (out / "train-00001.npy").is_file()
    with pytest.raises(UserError, match=r"train-00001\.tar: was made by .* once that run ends"):
        run_shard("index", out / "train-00001.tar", *ONE)  # it would go as a stale one of ours
    with pytest.raises(UserError, match="out: the run that makes split 'train' was cut"):
        run_shard("reshard", out, tmp_path / "again", *ONE)
    for folder in (expected, out):
        run_shard("jsonl", pairs, folder, "--split", "val", *ONE)
        assert (out / "planned.json").is_file()
        run_shard("jsonl", pairs, folder, "--shard-size", "4", *ONE)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in expected.iterdir())
    assert "planned.json" not in names and "train-00001.tar" not in names
    assert (out / "index.json").read_bytes() == (expected / "index.json").read_bytes()
