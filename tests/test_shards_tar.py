"""The fast tar writer writes what Python's does, whatever the size of its chunks."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from shards import tar
from shards.tar import TarWriter, header


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
