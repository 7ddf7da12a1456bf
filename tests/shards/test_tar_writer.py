"""The fast tar writer writes what Python's does, whatever the size of its chunks."""

import errno
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dist_vse.shards.build import tar_writer as tar
from dist_vse.shards.build import write
from dist_vse.shards.build.tar_writer import TarWriter, header


@pytest.fixture(autouse=True)
def _no_free_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_free_buffers", [])  # those of other tests may have another size


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1])
@pytest.mark.parametrize("name", ["a", "k-2.json", "x" * 96 + ".jpg"])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii")


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 22])
def test_a_whole_tar_is_that_of_tarfile(
    tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "CHUNK_BYTES", chunk_bytes)
    members = {f"{i:04d}.bin": bytes([i]) * (i * 37) for i in range(40)}
    with (tmp_path / "ours.tar").open("wb", buffering=0) as file:
        writer = TarWriter(file)
        offsets = [writer.add(name, data) for name, data in members.items()]
        digest = writer.close()
    ours = (tmp_path / "ours.tar").read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as reference:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            reference.addfile(info, io.BytesIO(data))
    assert ours == buffer.getvalue()
    assert (digest, writer.num_bytes) == (hashlib.sha256(ours).hexdigest(), len(ours))
    for offset, data in zip(offsets, members.values(), strict=True):
        assert ours[offset : offset + len(data)] == data


@pytest.mark.parametrize("before", [0, 1, 700, 5000])
def test_a_buffer_has_room_for_what_it_was_asked_for(
    tmp_path: Path, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the member nearly fills a chunk, and what lies before it is carried over."""
    monkeypatch.setattr(tar, "CHUNK_BYTES", 1 << 15)
    given = 0
    for num_bytes in range((1 << 15) - 12_000, 1 << 15, 256):
        path = tmp_path / f"{num_bytes}.tar"
        with path.open("wb", buffering=0) as file, TarWriter(file) as writer:
            writer.add("before", b"b" * before)
            buffer = writer.reserve(num_bytes)
            if buffer is None:
                continue
            assert len(buffer) == num_bytes
            given += 1
            buffer[:] = b"m" * num_bytes
            offset = writer.add_filled("member", num_bytes)
            writer.close()
        assert path.read_bytes()[offset : offset + num_bytes] == b"m" * num_bytes
        with tarfile.open(path) as archive:
            assert [m.size for m in archive] == [before, num_bytes]
    assert given > 10


class _Reluctant(io.FileIO):
    """A file that takes few bytes at a time, as a pipe or a network disk may."""

    def write(self, data: Any) -> int:
        return super().write(data[:1000])


def test_members_filled_in_place_are_carried_over_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "CHUNK_BYTES", 16384)
    used = [memoryview(bytearray(b"x" * 16384)) for _ in range(tar._CHUNKS)]  # an earlier tar's
    monkeypatch.setattr(tar, "_free_buffers", used)
    members = {f"{i:04d}.bin": bytes([i + 1]) * (i * 71 + 1) for i in range(40)}
    with _Reluctant(tmp_path / "ours.tar", "wb") as file, TarWriter(file) as writer:
        for name, data in members.items():
            view = writer.reserve(len(data))
            assert view is not None
            view[:] = data
            writer.add_filled(name, len(data))
        digest = writer.close()
    whole = (tmp_path / "ours.tar").read_bytes()
    assert digest == hashlib.sha256(whole).hexdigest()
    with tarfile.open(tmp_path / "ours.tar") as archive:
        for member in archive:
            end = member.offset_data + member.size
            assert not any(whole[end : end + -member.size % 512])
        assert {m.name: archive.extractfile(m).read() for m in archive} == members  # type: ignore[union-attr]


@pytest.mark.parametrize(("num_bytes", "whole"), [(9, True), (8, False), (10, False)])
def test_a_file_of_another_size_is_not_taken_in_place(
    tmp_path: Path, num_bytes: int, whole: bool
) -> None:
    (tmp_path / "image").write_bytes(bytes(num_bytes))
    assert write._read_into(memoryview(bytearray(10)), tmp_path / "image") is whole


class _Full(io.FileIO):
    """A file on a full disk."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")


def test_buffers_go_to_the_next_writer_each_once_even_after_an_error(tmp_path: Path) -> None:
    def fill(file: io.FileIO) -> str:
        with file, TarWriter(file) as writer:
            for number in range(20):
                writer.add(f"{number}.bin", bytes([number]) * tar.CHUNK_BYTES)
            return writer.close()

    with pytest.raises(OSError, match="no space left"):
        fill(_Full(tmp_path / "none.tar", "wb"))
    first = {id(buffer.obj) for buffer in tar._free_buffers}
    assert len(first) == len(tar._free_buffers) == tar._CHUNKS
    assert fill(io.FileIO(tmp_path / "a.tar", "wb")) == fill(io.FileIO(tmp_path / "b.tar", "wb"))
    assert {id(buffer.obj) for buffer in tar._free_buffers} == first
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
