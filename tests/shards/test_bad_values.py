"""A bad value is a bad sample within the budget, and its reason points to the remedy."""

import http.server
import json
import os
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.index.wds_reader import read_samples
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard, write_tar

IMAGE = encode(draw(1))
ONE = ("--workers", "1")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "b.png", "caption": NaN}', "no caption (fields: image, caption)"),
        ('{"image": "b.png", "caption": null}', "no caption"),
        ('{"image": "b.png", "caption": {"en": {"x": 1}}}', "its caption is {'en': {'x': 1}}"),
        ('{"image": null, "caption": "x"}', "no 'image' (fields: image, caption)"),
        ('{"image": 3, "caption": "x"}', "its image is a int, no path"),
        ('{"image": "b.png", "caption": "x", "key": ["k"]}', "'key' is ['k']; make it a string"),
        ('{"image": "https://host/b.png", "caption": "x"}', "its image is a URL; download it"),
        ('{"image": "dir", "caption": "x"}', "the path is no image file (no regular file)"),
        ('{"image": "pipe", "caption": "x"}', "the path is no image file (no regular file)"),
        ('{"image": "' + "b" * 300 + '", "caption": "x"}', "the path is no image file (File name"),
        ('{"image": "b\\u0000.png", "caption": "x"}', "the path is no image file (embedded null"),
        ('{"image": "\\ud800.png", "caption": "x"}', ""),
        ('{"image": "a.png", "caption": "\\ud800"}', "caption 1 is no valid Unicode"),
        ('{"image": "im\\\\a.png", "caption": "x"}', "no such image file (it is there with / for"),
    ],
)
def test_in_jsonl(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    (tmp_path / "im").mkdir()
    (tmp_path / "im/a.png").write_bytes(IMAGE)
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "p.jsonl").write_text('{"image": "a.png", "caption": "fine"}\n' + line)
    run_shard("jsonl", tmp_path / "p.jsonl", tmp_path / "out", "--max-bad", "1", *ONE)
    assert read_index(tmp_path / "out").split("train").num_samples == 1
    (skipped,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["reason"].startswith(reason)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_another_unicode_spelling_is_pointed_out(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / unicodedata.normalize(form, "café.png")).write_bytes(IMAGE)  # type: ignore[arg-type]
    name = unicodedata.normalize(other, "café.png")  # type: ignore[arg-type]
    (tmp_path / "p.csv").write_text(f"image,caption\n{name},x\n")
    with pytest.raises(UserError, match=rf"another Unicode spelling \({form}\): normalize"):
        run_shard("csv", tmp_path / "p.csv", tmp_path / "out", *ONE)


def test_deep_json_in_a_tar(tmp_path: Path) -> None:
    members: dict[str, bytes | str | dict[str, object]] = {"a.png": IMAGE, "a.json": "[" * 100_000}
    members |= {"b.png": IMAGE, "b.txt": "y"}
    deep, fine = read_samples(write_tar(tmp_path / "x.tar", members))
    assert "nested deeper than 100" in deep.fault and not fine.fault


def test_a_run_that_failed_blocks_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", {"a.png": IMAGE, "a.txt": "x", "b.png": b"", "b.txt": "empty"})
    with pytest.raises(UserError, match="empty"):
        run_shard("index", tmp_path / "in", *ONE)
    run_shard("reshard", tmp_path / "in", tmp_path / "out", "--max-bad", "1", *ONE)
    assert read_index(tmp_path / "out").split("train").num_samples == 1


def test_a_fault_that_is_mended_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.png").write_bytes(IMAGE)
        (tmp_path / f"in/{name}.txt").write_bytes(b"\xe9" if name == "b" else b"x")
    run_shard("folder", tmp_path / "in", tmp_path / "out", "--max-bad", "1", *ONE)
    (tmp_path / "in/b.txt").write_text("y")
    run_shard("folder", tmp_path / "in", tmp_path / "out", *ONE)
    assert read_index(tmp_path / "out").split("train").num_samples == 2


def test_tars_that_hold_nothing_or_lie_elsewhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty/0.tar", {})
    with pytest.raises(UserError, match=r"no samples in 0\.tar"):
        run_shard("index", tmp_path / "empty", *ONE)
    write_tar(tmp_path / "cc3m/train/0.tar", {"a.png": IMAGE, "a.txt": "x"})
    for command, out in (("index", ()), ("reshard", (tmp_path / "o",))):
        with pytest.raises(UserError, match="no tars here; but there are in train; give such"):
            run_shard(command, tmp_path / "cc3m", *out, *ONE)


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members: dict[str, bytes | str | dict[str, object]] = {f"{i}.png": IMAGE for i in range(3)}
    members |= {f"{i}.txt": f"caption {i}" for i in range(3)}
    samples = list(read_samples(write_tar(tmp_path / "x.tar", members)))
    assert [(s.key, s.captions) for s in samples] == [(str(i), (f"caption {i}",)) for i in range(3)]


def test_dots_in_names_part_samples_where_they_must(tmp_path: Path) -> None:
    members: dict[str, bytes | str | dict[str, object]] = {}
    for i in range(3):
        members |= {f"img.{i:04d}.png": IMAGE, f"img.{i:04d}.txt": f"caption {i}"}
    del members["img.0002.txt"]
    members |= {"one.x.png": IMAGE, "one.x.txt": "of one"}
    members |= {"k.png": IMAGE, "k.seg.png": b"seg", "k.txt": "whole"}
    members |= {"l.left.png": IMAGE, "l.right.png": b"right", "l.txt": "both"}
    samples = {s.key: s for s in read_samples(write_tar(tmp_path / "x.tar", members))}
    assert {key: s.captions for key, s in samples.items()} == {
        "img.0000": ("caption 0",),
        "img.0001": ("caption 1",),
        "img.0002": (),
        "one.x": ("of one",),
        "k": ("whole",),
        "l": ("both",),
    }
    assert samples["img.0002"].fault.startswith("no caption")


def test_what_exists_is_a_path_whatever_its_name_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run:1", "data[1]", "x{a,b}"):
        write_tar(tmp_path / name / "0.tar", {"a.png": IMAGE, "a.txt": "x"})
    monkeypatch.chdir(tmp_path)
    run_shard("index", "run:1/0.tar", "--out", ".", *ONE)
    (shard,) = read_index(tmp_path).split("train").shards
    assert shard.path == "./run:1/0.tar"
    assert run_shard("verify", tmp_path, *ONE) == 0
    run_shard("index", "data[1]/*.tar", *ONE)
    run_shard("index", "x{a,b}/0.tar", *ONE)
    run_shard("reshard", "run:1/0.tar", "out", *ONE)


class _Signed(http.server.BaseHTTPRequestHandler):
    """Serves one path, byte for byte as it was signed."""

    content: bytes
    wanted = "/0.tar?X-Goog-Credential=me%40host%2F20260101%2Fauto&sig=a%2Bb%3D%7E%3A"

    def do_GET(self) -> None:
        right = self.path == self.wanted
        self.send_response(200 if right else 403)
        self.send_header("Content-Length", str(len(self.content) if right else 0))
        self.end_headers()
        if right:
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def _server(content: bytes) -> Iterator[str]:
    handler = type("Handler", (_Signed,), {"content": content})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_signed_url_is_sent_as_it_is_and_a_status_is_shown(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.png": IMAGE, "a.txt": "x"})
    with _server(tar.read_bytes()) as host:
        run_shard("index", host + _Signed.wanted, "--out", tmp_path / "i", *ONE)
        run_shard("reshard", host + _Signed.wanted, tmp_path / "r", *ONE)
        with pytest.raises(UserError, match=r"the server responded 403 Forbidden"):
            run_shard("index", f"{host}/0.tar?sig=other", "--out", tmp_path / "j", *ONE)
    for name in "ir":
        assert read_index(tmp_path / name).split("train").num_samples == 1


@pytest.mark.parametrize("given", ["", "/0.tar", "/{0..3}.tar"])
def test_tars_given_for_an_index_are_told_how(tmp_path: Path, given: str) -> None:
    write_tar(tmp_path / "0.tar", {"a.png": IMAGE, "a.txt": "x"})
    with pytest.raises(UserError, match="index the tars once with `dist-vse shard index '"):
        read_index(f"{tmp_path}{given}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("images", r"make one with `dist-vse shard folder '.*/images' OUT`; give OUT"),
        ("p.csv", r"p\.csv: no such index; make one with `dist-vse shard csv '.*/p\.csv' OUT`"),
        ("parts", r"make one with `dist-vse shard parquet '.*/parts' OUT`"),
        ("packed", r"unpack the tars, or `dist-vse shard reshard '.*/packed' OUT`; give OUT"),
        ("capitals", r"index the tars once with `dist-vse shard index '.*/capitals' --out DIR`"),
        (
            "none",
            r"none/index\.json: no such index; make one with `dist-vse shard`, and give its OUT",
        ),
    ],
)
def test_what_is_given_instead_of_an_index_is_told_how(
    tmp_path: Path, given: str, said: str
) -> None:
    names = ("images/a.jpg", "p.csv", "parts/0.parquet", "packed/0.tar.gz", "capitals/0.TAR")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=said):
        read_index(tmp_path / given)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/{00..99}.tar", "index the tars once with `dist-vse shard index 'https://"),
        ("pipe:aws s3 cp s3://b/0.tar -", "index the tars once"),
        ("s3://bucket/data", "s3://bucket/data: no such index; it must lie on this machine"),
    ],
)
def test_a_url_instead_of_an_index_is_told_how(url: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_index(url)
    assert said in str(caught.value)
