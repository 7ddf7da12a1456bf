"""A file is written whole or not at all."""

import os
from pathlib import Path

import pytest
import torch

from dist_vse.common import files
from dist_vse.common.errors import UserError
from dist_vse.common.files import (
    atomic_output,
    atomic_write,
    check_output,
    output_json,
    sha256_of_file,
    write_json,
)
from dist_vse.runs import checkpoint


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_block_leaves_the_file_and_the_folder_as_they_were(
    tmp_path: Path, shared: bool
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path, shared=shared) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path, shared=True) as first, atomic_write(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # whose block ends last


def test_content_reaches_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "a.json", []
    replace = os.replace

    def note_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(files, "fsync_path", lambda _: calls.append("fsync"))
    write_json(path, {"a": 1}, fsync=True)
    write_json(path, {"a": 1})
    assert calls == ["fsync", "rename", "rename"]
    assert path.read_text() == '{"a": 1}\n'


def test_an_output_makes_its_folder_or_names_the_refusal(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("a")
    assert (tmp_path / "new" / "a.txt").read_text() == "a"
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="can't be written"),
        atomic_output(tmp_path / "file" / "a.txt"),
    ):
        pass


def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path) -> None:
    named = tmp_path / "pipe"
    os.mkfifo(named)
    reading, writing = os.pipe()
    opened = os.open(named, os.O_RDWR | os.O_NONBLOCK)
    for path, end in ((named, opened), (Path(f"/dev/fd/{writing}"), reading)):
        check_output(path)
        with atomic_output(path) as temporary:
            write_json(temporary, {"a": 1})
        assert os.read(end, 100) == b'{"a": 1}\n'
    assert named.is_fifo() and [*tmp_path.iterdir()] == [named]
    for end in (reading, writing, opened):
        os.close(end)


def test_a_pipe_gets_only_the_last_of_several_contents(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    file = tmp_path / "file"
    for path in (Path(f"/dev/fd/{writing}"), file):
        output_json(path, [1], more_follows=True)
    assert file.read_text() == "[\n 1\n]\n"  # what a killed process leaves
    output_json(Path(f"/dev/fd/{writing}"), {})
    assert os.read(reading, 100) == b"{}\n"
    os.close(reading)
    os.close(writing)


def test_a_planted_link_to_a_pipe_is_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "report.html"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    check_output(link)
    with atomic_output(link) as temporary:
        temporary.write_text("page")
    assert link.read_text() == "page" and not link.is_symlink() and pipe.is_fifo()


def test_the_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256_of_file(path).startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9c")


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("mine")
    (tmp_path / "report.html.tmp").symlink_to(victim)
    with atomic_output(path) as temporary:
        temporary.write_text("page")
    assert victim.read_text() == "mine" and path.read_text() == "page" and not path.is_symlink()


def test_a_planted_folder_of_a_checkpoint_is_not_written_into(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "step-000001.tmp"
    victim.mkdir()
    folder.symlink_to(victim)
    assert checkpoint.write_files(folder, {"rank-0.safetensors": {"x": torch.zeros(1)}})
    assert not [*victim.iterdir()] and [p.name for p in folder.iterdir()] == ["rank-0.safetensors"]
