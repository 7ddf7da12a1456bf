"""`dist-vse shard`: options, the summary, and what it says when they are wrong."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.error_budget import parse_error_budget
from dist_vse.shards.options import parse_shard_size
from dist_vse.shards.record import Record
from dist_vse.shards.sources import SOURCES
from tests.support.datasets import draw, encode
from tests.support.shards import COCO, run_shard, write_pairs


def test_sharding_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(tmp_path / "in", 5)
    (tmp_path / "in/3.png").write_bytes(b"")
    options = ("--shard-size", "2", "--max-bad", "20%", "--workers", "1", "--split", "val")
    assert run_shard("jsonl", pairs, tmp_path / "out", *options) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "val" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:4] == ["val", "4", "8", "3"]
    assert cells[-1] == "1"
    assert "skipped.jsonl" in out.replace("\n", "")
    assert read_index(tmp_path / "out").split("val").num_samples == 4


def read_named(path: Path, *, split: str | None = None) -> Iterator[Record]:
    """The smallest source: a folder of images whose names are their captions."""
    for image in sorted(path.glob("*.png")):
        yield Record(image, (image.stem.replace("-", " "),), split or "train", image.stem)


def test_a_new_source_is_one_function_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SOURCES, "named", ("images named by their captions", read_named))
    (tmp_path / "in").mkdir()
    for i, name in enumerate(["a-red-square", "a-blue-cross"]):
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(draw(i)))
    options = ("--split", "val", "--workers", "1")  # the command has an option a parameter
    assert run_shard("named", tmp_path / "in", tmp_path / "out", *options) == 0
    index = read_index(tmp_path / "out")
    assert [*index.splits] == ["val"]
    captions = {}
    with tarfile.open(next((tmp_path / "out").rglob("*.tar"))) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                captions[member.name] = json.load(tar.extractfile(member))["captions"]
    assert captions == {
        "a-blue-cross.json": ["a blue cross"],
        "a-red-square.json": ["a red square"],
    }
    with pytest.raises(SystemExit):
        run_shard("--help")
    assert "images named by their captions" in capsys.readouterr().out


def test_karpathy_from_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "dataset_coco.json").write_text(json.dumps(COCO))
    for i, entry in enumerate(COCO["images"]):
        path = tmp_path / "coco" / entry["filepath"] / entry["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(i), "JPEG"))
    options = ("--images", tmp_path / "coco", "--restval", "extra", "--workers", "1")
    assert run_shard("karpathy", tmp_path / "dataset_coco.json", tmp_path / "out", *options) == 0
    index = read_index(tmp_path / "out")
    assert {name: (s.num_samples, s.num_captions) for name, s in index.splits.items()} == {
        "test": (1, 6),
        "extra": (1, 7),
        "train": (1, 5),
    }
    shard = index.split("test").shards[0]
    _, _, offset, length, _ = index.offsets(shard)[0].tolist()
    meta = json.loads((tmp_path / "out" / shard.path).read_bytes()[offset : offset + length])
    assert meta["cocoid"] == 391895
    assert meta["captions"][5] == "A man rides a motor bike, take 5."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jsonl", "--shard-size", "0"], r"--shard-size \(0\) must be at least 1"),
        (["jsonl", "--workers", "0"], r"--workers \(0\) must be at least 1"),
        (["jsonl", "--max-bad", "few"], "--max-bad 'few': give a number"),
        (["jsonl", "--max-bad=-1"], "--max-bad '-1': give a number"),
        (["jsonl", "--max-bad", "200%"], "--max-bad '200%': give a number"),
        (["flickr"], "pairs.jsonl:1: .* no caption like those before it; fix the line"),
        (["jsonl", "--images", "/nowhere"], "/nowhere: no such folder"),
        (["folder"], "pairs.jsonl: is a file; give its folder"),
        (["jsonl", "--shard-size", "1TB"], r"--shard-size \(1TB\) must be at least 1: samples"),
        (["jsonl", "--quality", "80"], "--quality changes nothing .* add --max-side or"),
        (["jsonl", "--quality", "80", "--format", "png"], "nothing with --format png"),
        (["jsonl", "--quality", "101", "--max-side", "9"], r"--quality \(101\) must be at most"),
        (["jsonl", "--max-side", "0"], r"--max-side \(0\) must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    source, *options = arguments
    with pytest.raises(UserError, match=message) as caught:
        run_shard(source, write_pairs(tmp_path / "in", 1), tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jsonlines", "in", "out"], "invalid choice: 'jsonlines' (choose from"),
        (["jsonl", "in", "out", "--restval", "x"], "unrecognized arguments: --restval"),
    ],
)
def test_an_option_that_means_nothing_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_shard(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("500", (500, 0)), ("200MB", (0, 200_000_000)), ("1GiB", (0, 2**30)), ("9b", (0, 9))],
)
def test_shard_size_is_samples_or_bytes(text: str, size: tuple[int, int]) -> None:
    assert parse_shard_size(text) == size


def test_tars_that_are_read_or_not_ours_are_never_written_over(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    pairs = write_pairs(tmp_path / "in", 3)
    assert run_shard("jsonl", pairs, ours, "--workers", "1") == 0
    theirs.mkdir()
    (theirs / "train-00000.tar").write_bytes((ours / "train-00000.tar").read_bytes())
    before = {p: p.read_bytes() for p in (*ours.iterdir(), *theirs.iterdir())}
    for message, *arguments in (
        ("is read, and would be overwritten", "reshard", ours, ours),
        ("is read, and would be overwritten", "reshard", ours / "train-00000.tar", ours),
        ("was made by `dist-vse shard` and is in", "index", ours),
        ("was made by `dist-vse shard` and is in", "index", ours, "--split", "val"),
        ("was not made by `dist-vse shard`", "jsonl", pairs, theirs),
    ):
        with pytest.raises(UserError, match=rf"train-00000\.tar: {message}"):
            run_shard(*arguments)
        assert {p: p.read_bytes() for p in (*ours.iterdir(), *theirs.iterdir())} == before
    assert run_shard("index", theirs, "--workers", "1") == 0  # which leaves a manifest there
    with pytest.raises(UserError, match="was not made by `dist-vse shard`"):
        run_shard("jsonl", pairs, theirs)


def test_out_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "in", 1)
    assert run_shard("jsonl", pairs, "out", "--workers", "1") == 0
    for arguments in (("jsonl", pairs, "s3://b/out"), ("index", "out", "--out", "s3://b/out")):
        with pytest.raises(UserError, match="s3:/b/out: is a URL; give a local folder"):
            run_shard(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_languages_may_have_blanks_and_must_occur(tmp_path: Path) -> None:
    line = {"image": "0.png", "captions": {"de": ["eins"], "en": ["one"], "fr": ["un"]}}
    pairs = write_pairs(tmp_path / "in", 1)
    pairs.write_text(json.dumps(line) + "\n")
    run_shard("jsonl", pairs, tmp_path / "out", "--languages", " en, de", "--workers", "1")
    assert read_index(tmp_path / "out").split("train").num_captions == 2
    for codes in ("en,it", "it", "en,", ""):
        with pytest.raises(UserError, match=r"no caption is in '(it)?'; .*: de,en,fr$"):
            run_shard("jsonl", pairs, tmp_path / "none", "--languages", codes)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tar is written by a thread; /dev/full stands for a disk without room."""
    pairs = write_pairs(tmp_path / "in", 3)
    real = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "train-00000.tar.tmp":
            real(path, "wb").close()
            path = Path("/dev/full")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write the shards \(No space left on device\)"):
        run_shard("jsonl", pairs, tmp_path / "out", "--workers", "1")
    assert not list((tmp_path / "out").glob("*.t*"))


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl: no images found for the source jsonl"):
        run_shard("jsonl", write_pairs(tmp_path / "in", 0), tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        run_shard("jsonl", tmp_path / "none.jsonl", tmp_path / "out")


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"out: cannot write the shards \(File exists\)"):
        run_shard("jsonl", write_pairs(tmp_path / "in", 1), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "allowed"), [("0", 0), ("7", 7), ("0.1%", 10), ("0.29%", 29), ("100%", 10_000)]
)
def test_max_bad_is_a_count_or_a_share(text: str, allowed: int) -> None:
    assert parse_error_budget(text).allowed(10_000) == allowed


def test_its_options_need_no_heavy_import() -> None:
    code = (
        "import argparse, sys; from dist_vse.shards import cli;"
        "cli.add_arguments(argparse.ArgumentParser());"
        "print(sorted({'PIL', 'numpy', 'rich', 'torch'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
