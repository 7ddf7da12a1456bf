"""Every file in a tar ends in a sample or in a line that says why not."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.common.files import is_leftover
from dist_vse.data.index import read_index
from dist_vse.shards.index.wds_reader import plain_tars, read_samples
from dist_vse.shards.sources.folder import read_folder
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_tar

IMAGE = encode(draw(1))
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(82)


def _pair(key: str) -> dict[str, bytes | str | dict[str, object]]:
    return {f"{key}.png": IMAGE, f"{key}.txt": f"caption {key}"}


def _link(tar: Path, name: str, target: str, kind: bytes) -> None:
    """Append a link, and the caption of its sample."""
    with tarfile.open(tar, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
        text = tarfile.TarInfo(Path(name).stem + ".txt")
        text.size = 1
        archive.addfile(text, io.BytesIO(b"x"))


def test_a_hard_link_takes_the_bytes_of_its_target(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", _pair("a"))
    _link(tar, "b.png", "a.png", tarfile.LNKTYPE)
    first, second = read_samples(tar)
    assert second.image == first.image and second.captions == ("x",)
    assert not second.fault


@pytest.mark.parametrize(
    ("kind", "target", "fault"),
    [
        (tarfile.LNKTYPE, "gone.png", "'b.png' is a hard link to 'gone.png', which is not before"),
        (tarfile.SYMTYPE, "a.png", "'b.png' is a symbolic link"),
        (tarfile.FIFOTYPE, "", "'b.png' is no regular file"),
        (tarfile.CHRTYPE, "", "'b.png' is no regular file"),
    ],
)
def test_what_has_no_bytes_in_the_tar_is_a_fault_of_its_sample(
    tmp_path: Path, kind: bytes, target: str, fault: str
) -> None:
    tar = write_tar(tmp_path / "x.tar", _pair("a"))
    _link(tar, "b.png", target, kind)
    first, second = read_samples(tar)
    assert not first.fault
    assert second.fault.startswith(fault)
    assert run_shard("index", tar, "--max-bad", "1", "--workers", "1") == 0
    (skipped,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["reason"] == second.fault
    assert read_index(tmp_path).split("train").num_samples == 1


def test_a_sparse_member_is_a_fault_of_its_sample(tmp_path: Path) -> None:
    """By GNU tar's header of an old sparse file: type S, no data blocks."""
    tar = tmp_path / "x.tar"
    member = tarfile.TarInfo("a.png")
    member.type = tarfile.GNUTYPE_SPARSE
    tar.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    (sample,) = read_samples(tar)
    assert sample.fault.startswith("'a.png' is a sparse file")


def test_tars_joined_by_cat_are_read_to_the_last(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"in/{key}.tar", _pair(key)) for key in "abc"]
    tar = tmp_path / "all.tar"
    tar.write_bytes(b"".join(part.read_bytes() for part in parts))
    samples = list(read_samples(tar))
    assert [sample.key for sample in samples] == ["a", "b", "c"]
    content = tar.read_bytes()
    for sample in samples:
        assert sample.image is not None
        offset, size = sample.image
        assert content[offset : offset + size] == IMAGE


def test_bytes_behind_the_end_that_are_no_tar_are_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", _pair("a"))
    with tar.open("ab") as file:
        file.write(b"junk" * 1000)
    with pytest.raises(UserError, match=r"x\.tar: no plain tar, or cut"):
        list(read_samples(tar))


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.zst"])
def test_a_compressed_tar_in_the_folder_is_named(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "in"
    write_tar(folder / "0.tar", _pair("a"))
    (folder / f"1.{suffix}").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=rf"1\.{suffix}: is compressed; unpack it"):
        run_shard("index", folder, "--out", tmp_path / "out", "--workers", "1")
    with pytest.raises(
        UserError, match=rf"1\.{suffix}: (cannot be unpacked|is compressed in a way)"
    ):
        run_shard("reshard", folder, tmp_path / "out", "--workers", "1")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_cut_anew_like_others(tmp_path: Path, mode: str) -> None:
    write_tar(tmp_path / "plain/0.tar", {**_pair("a"), **_pair("b")})
    packed = tmp_path / f"packed/0.tar.{mode}"
    packed.parent.mkdir()
    with tarfile.open(packed, f"w:{mode}") as tar:
        for name, data in {**_pair("a"), **_pair("b")}.items():
            member = tarfile.TarInfo(name)
            content = data.encode() if isinstance(data, str) else data
            assert isinstance(content, bytes)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("plain", "packed"):
        run_shard("reshard", tmp_path / name, tmp_path / f"{name}-out", "--workers", "1")
    plain, unpacked = (tmp_path / f"{name}-out/train-00000.tar" for name in ("plain", "packed"))
    assert plain.read_bytes() == unpacked.read_bytes()


@pytest.mark.parametrize(
    "name",
    ["._a.jpg", "./._a.jpg", ".DS_Store", "__MACOSX/a.jpg", "x/.ipynb_checkpoints/a.jpg",
     ".Trash-0/files/a.jpg", "x/Thumbs.db"],
)  # fmt: skip
def test_what_a_system_leaves_is_known(name: str) -> None:
    assert is_leftover(name)


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "x.y/a.b.jpg", "../a.jpg", "_a.jpg", "/a/b"])
def test_what_a_user_names_is_data(name: str) -> None:
    assert not is_leftover(name)


def test_leftovers_in_a_tar_part_no_sample(tmp_path: Path) -> None:
    members: dict[str, bytes | str | dict[str, object]] = {"./._.DS_Store": b"x", ".DS_Store": b"x"}
    for key in "ab":
        for name, content in _pair(key).items():
            members[f"./._{name}"] = APPLE_DOUBLE
            members[f"./{name}"] = content
        members[f"__MACOSX/._{key}.png"] = APPLE_DOUBLE
    tar = write_tar(tmp_path / "x.tar", members)
    assert [(s.captions, s.fault) for s in read_samples(tar)] == [
        (("caption a",), ""),
        (("caption b",), ""),
    ]


def test_leftovers_in_folders_are_no_data(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/b.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE)
        path.with_suffix(".txt").write_text("x")
    assert [record.key for record in read_folder(tmp_path / "in")] == ["a"]
    (tmp_path / "in/train").mkdir()
    (tmp_path / "in/a.png").rename(tmp_path / "in/train/a.png")
    assert [record.key for record in read_folder(tmp_path / "in")] == ["train/a"]
    tars = tmp_path / "tars"
    write_tar(tars / "0.tar", _pair("a"))
    (tars / "._0.tar").write_bytes(APPLE_DOUBLE)
    assert [path.name for path in plain_tars(tars)] == ["0.tar"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    path = tmp_path / ".cache/in/a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(IMAGE)
    assert len(list(read_folder(path.parent))) == 1


def test_what_else_lies_in_a_folder_of_tars_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0.tar", "1.TAR", "more/2.tar"):
        write_tar(tmp_path / name, _pair("a"))
    (tmp_path / "3.zip").write_bytes(b"PK")
    assert [path.name for path in plain_tars(tmp_path)] == ["0.tar", "1.TAR"]
    notes = capsys.readouterr().err.splitlines()
    assert [re.sub(r".*/", "", note) for note in notes] == [
        "3.zip: is not read; give a folder of tars alone, or name each of them",
        "more: its tars are not read; give a folder of tars alone, or name each of them",
    ]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_format(tmp_path: Path, kind: int) -> None:
    long = "d/" * 10 + "k" * 60 if kind == tarfile.USTAR_FORMAT else "d/" * 60 + "k" * 120
    names = (
        f"{long}.JPG",
        f"{long}.txt",
        "./café 漢.JPEG",
        "./café 漢.txt",
        "v.1/0.png",
        "v.1/0.txt",
    )
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for name in names:
            data = b"a caption" if name.endswith("txt") else IMAGE
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    samples = list(read_samples(tmp_path / "x.tar"))
    assert [sample.key for sample in samples] == [long, "./café 漢", "v.1/0"]
    assert not any(sample.fault for sample in samples)


def test_a_name_that_is_no_unicode_gives_a_key_that_is(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        for name, data in (("café.png", IMAGE), ("café.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (sample,) = read_samples(tmp_path / "x.tar")
    assert sample.key == "caf\\udce9" and sample.captions == ("x",)


def test_a_file_that_is_no_sample_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"README.md": "hello", **_pair("a")})
    readme, good = read_samples(tar)
    assert readme.fault == "no image (README.md)" and not good.fault
