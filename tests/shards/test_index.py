"""`dist-vse shard index`: tars of others are read where they lie, and never written."""

import functools
import hashlib
import http.server
import json
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig
from dist_vse.data.eval_stream import captions, eval_batches
from dist_vse.data.index import image_id, read_index
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary
from dist_vse.shards.index.wds_reader import read_samples
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_img2dataset, write_tar


def _state(paths: list[Path]) -> list[tuple[int, bytes]]:
    return [(p.stat().st_mtime_ns, p.read_bytes()) for p in paths]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve `tmp_path` on the loopback; yield its URL."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_img2dataset_tars_are_indexed_beside_themselves(tmp_path: Path) -> None:
    tars = write_img2dataset(tmp_path / "cc3m")
    before = _state(tars)
    assert run_shard("index", tmp_path / "cc3m", "--workers", "1") == 0
    assert _state(tars) == before
    index = read_index(tmp_path / "cc3m")
    assert [s.path for s in index.split("train").shards] == ["00000.tar", "00001.tar"]
    assert index.split("train").num_captions == 14
    for shard, tar in zip(index.split("train").shards, tars, strict=True):
        data = tar.read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert shard.meta_name is not None
        metas = (tmp_path / "cc3m" / shard.meta_name).read_bytes()
        for at, size, meta_at, meta_size, identity in index.offsets(shard).tolist():
            meta = json.loads(metas[meta_at : meta_at + meta_size])
            number = int(meta["key"])
            assert meta["captions"] == [f"a drawing, number {number}"]
            assert data[at : at + size] == encode(draw(number), "JPEG")
            assert identity == image_id(data[at : at + size])


def test_the_stream_reads_what_was_indexed(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local, over HTTP and through a pipe: the same samples in the same order."""
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    first, second = write_img2dataset(tmp_path / "far")
    urls = (f"{server}/far/00000.tar", f"pipe:cat {second}")
    assert run_shard("index", *urls, "--out", tmp_path / "remote", "--workers", "2") == 0
    assert run_shard("index", first, second, "--out", tmp_path / "local", "--workers", "2") == 0
    found = []
    for name in ("local", "remote"):
        index = read_index(tmp_path / name, allow_pipe=True)
        tokenizer = WordTokenizer(build_vocabulary(captions(index, "train"), 1), 16)
        batches = eval_batches(index, "train", tokenizer, ImageConfig(size=16), batch_size=5)
        found.append([(b.keys, b.captions, b.image_ids.tolist(), b.images) for b in batches])
    assert sum(len(batch[0]) for batch in found[0]) == 14
    for here, there in zip(*found, strict=True):
        assert here[:3] == there[:3]
        assert (here[3] == there[3]).all()
    remote = read_index(tmp_path / "remote").splits["train"].shards
    assert [shard.path for shard in remote] == list(urls)
    assert not list((tmp_path / "remote").glob("*.tmp"))


def test_tars_at_urls_are_resharded_as_local_ones(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bytes; a second run and a repair keep them, and no copy is left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    write_img2dataset(tmp_path / "far")
    write_tar(tmp_path / "far/00002.tar", {"bad.jpg": b"", "bad.txt": "no bytes"})
    urls, near, far = f"{server}/far/{{00000..00002}}.tar", tmp_path / "near", tmp_path / "out"
    options = ("--shard-size", "6", "--max-bad", "1", "--workers", "2")
    run_shard("reshard", tmp_path / "far", near, *options)
    run_shard("reshard", urls, far, *options)
    for name in ("index.json", "train-00002.tar"):
        assert (far / name).read_bytes() == (near / name).read_bytes()
    (skipped,) = (far / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["path"] == f"{server}/far/00002.tar at byte 512"
    before = {path: path.stat().st_mtime_ns for path in far.glob("*.tar")}
    run_shard("reshard", urls, far, *options)
    run_shard("repair", far, "--workers", "1")
    assert {path: path.stat().st_mtime_ns for path in far.glob("*.tar")} == before
    run_shard("reshard", f"pipe:cat {tmp_path}/far/00000.tar", tmp_path / "pipe", "--workers", "1")
    assert read_index(tmp_path / "pipe").split("train").num_samples == 7
    assert not list((tmp_path / "tmp").iterdir())
    run_shard("index", f"{server}/far/00000.tar", "--out", tmp_path / "index", "--workers", "1")
    with pytest.raises(UserError, match=r"00000\.tar: is remote, and the index in .* names it"):
        run_shard("reshard", tmp_path / "index", tmp_path / "none")


def test_a_second_run_reads_only_what_changed(tmp_path: Path) -> None:
    tars = write_img2dataset(tmp_path / "in")
    out = tmp_path / "in"
    run_shard("index", *tars, "--workers", "1")
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in out.glob("train.*")}
    write_tar(tars[1], {"1.png": encode(draw(1)), "1.txt": "one"})
    run_shard("index", *tars, "--workers", "1")
    after = {p.name: (p.stat().st_ino, p.read_bytes()) for p in out.glob("train.*")}
    assert {name for name in before if before[name] == after[name]} == {
        "train.00000.npy",
        "train.00000.jsonl",
    }
    assert read_index(out).split("train").num_samples == 8

    kept = _state(tars)
    run_shard("index", tars[0], "--workers", "1")  # the other one is dropped, but not removed
    assert _state(tars) == kept
    assert sorted(p.name for p in out.glob("train.*")) == ["train.00000.jsonl", "train.00000.npy"]
    assert read_index(out).split("train").num_samples == 7


def test_tars_of_one_name_and_other_splits_live_together(tmp_path: Path) -> None:
    (one, _), (two, _) = write_img2dataset(tmp_path / "a"), write_img2dataset(tmp_path / "b", 3)
    out = tmp_path / "out"
    run_shard("index", one, two, "--out", out, "--workers", "1")
    run_shard("index", two, "--out", out, "--split", "val", "--workers", "1")
    index = read_index(out)
    assert {name: split.num_samples for name, split in index.splits.items()} == {
        "train": 10,
        "val": 3,
    }
    sides = [shard.side for split in index.splits.values() for shard in split.shards]
    assert sides == ["train.00000", "train.00000-2", "val.00000"]


def test_the_fate_of_odd_samples(tmp_path: Path) -> None:
    image = encode(draw(0))
    tar = write_tar(
        tmp_path / "odd.tar",
        {
            "a.b/1.png": image,  # the key ends at the first dot of the file's name
            "a.b/1.cls": "3",
            "a.b/1.txt": " from the text \n",
            "2.seg.png": image,
            "2.json": {"caption": None},
            "2.txt": "null in the JSON",
            "3.PNG": image,
            "3.json": {"captions": ["one", "eins"], "languages": ["en", "de"]},
            "3.txt": "not this",
            "4.txt": "no image",
            "5.png": image,
            "6.png": b"",
            "6.txt": "no bytes",
            "7.png": image,
            "7.json": b"{broken",
            "8.png": image,
            "8.txt": b"\xe9",
            "__meta__": "{}",
        },
    )
    with pytest.raises(UserError, match=r"sample '4' \(.*odd\.tar\): no image"):
        run_shard("index", tar)
    run_shard("index", tar, "--max-bad", "5")
    index = read_index(tmp_path)
    (shard,) = index.split("train").shards
    lines = (tmp_path / f"{shard.side}.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"key": "a.b/1", "captions": ["from the text"]},
        {"key": "2", "captions": ["null in the JSON"]},
        {"key": "3", "captions": ["one", "eins"], "languages": ["en", "de"]},
    ]
    skipped_log = (tmp_path / "skipped.jsonl").read_text().splitlines()
    reasons = {entry["key"]: entry["reason"] for entry in map(json.loads, skipped_log)}
    assert reasons.keys() == {"4", "5", "6", "7", "8"}
    assert reasons["5"].startswith("no caption (members: 5.png); --caption-key")
    assert reasons["6"] == "the image file is empty (0 bytes)"
    assert "broken" in reasons["7"] and "broken" in reasons["8"]
    run_shard("index", tar, "--max-bad", "62.5%")
    with pytest.raises(UserError, match="5 bad of 8 samples where --max-bad allows 4"):
        run_shard("index", tar, "--max-bad", "62%")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{in}/packed.tar"], r"packed\.tar: no plain tar, or cut"),
        (["{in}/cut.tar"], r"cut\.tar: no plain tar, or cut"),
        (["{in}/none.tar"], r"none\.tar: no such file"),
        (["{in}/empty"], "empty: no tars here"),
        (["{in}/*.zip"], r"\*\.zip: no tars here"),
        pytest.param(  # it is tried again for some seconds
            ["http://127.0.0.1:9/a.tar", "--out", "{in}/o"],
            r"http://127\.0\.0\.1:9/a\.tar: cannot",
            marks=pytest.mark.slow,
        ),
        (["{in}/lost.tar"], r"lost\.tar: no plain tar, or cut \(no end of the archive at byte"),
        (["{in}/header.tar"], r"header\.tar: no plain tar, or cut \(no end of the archive"),
        (["nowhere://a.tar", "--out", "{in}/o"], r"nowhere://a\.tar: cannot be read \(Protocol"),
        (["pipe:", "--out", "{in}/o"], "pipe:: no plain tar"),
        (["http://127.0.0.1:9/a.tar"], "name a folder for its index with --out"),
        (["pipe:exit 3", "--out", "{in}/o"], "pipe:exit 3: cannot be read .*exited with code 3"),
        (["{in}/good.tar", "{in}/good.tar"], r"good\.tar: is given twice"),
        (["{in}/good.tar", "--split", "a/b"], "split 'a/b' .* no file name"),
    ],
)
def test_what_cannot_be_indexed(tmp_path: Path, arguments: list[str], message: str) -> None:
    good = write_tar(tmp_path / "good.tar", {"1.png": encode(draw(1, size=64)), "1.txt": "one"})
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(good)
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:700])
    whole = bytearray(good.read_bytes())
    caption = whole.index(b"1.txt")
    (tmp_path / "lost.tar").write_bytes(whole[:caption])  # cut where a member would begin
    whole[caption] ^= 1
    (tmp_path / "header.tar").write_bytes(whole)
    (tmp_path / "empty").mkdir()
    (tmp_path / "o").mkdir()
    given = [argument.replace("{in}", str(tmp_path)) for argument in arguments]
    with pytest.raises(UserError, match=message) as caught:
        run_shard("index", *given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("index.json")) and not list(tmp_path.rglob("*.tmp"))


def test_a_url_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(UserError, match=r"^s3://x/a\.jsonl: URLs need .*dist_vse\[remote\]'$"):
        run_shard("jsonl", "s3://x/a.jsonl", tmp_path / "out")


def test_braces_and_patterns_name_many(tmp_path: Path) -> None:
    write_img2dataset(tmp_path)
    run_shard(
        "index", f"{tmp_path}/{{00000..00001}}.tar", "--out", tmp_path / "a", "--workers", "1"
    )
    run_shard("index", f"{tmp_path}/*.tar", "--out", tmp_path / "b", "--workers", "1")
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "b/index.json").read_bytes()
    assert read_index(tmp_path / "a").split("train").num_samples == 14


def test_a_tar_of_ours_is_read_back(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar", {"k.png": encode(draw(1)), "k.json": {"captions": ["a", "b"]}}
    )
    (sample,) = read_samples(tar)
    assert (sample.key, sample.captions) == ("k", ("a", "b"))
