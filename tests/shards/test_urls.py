"""Lists of URLs: downloaded in parallel from a server on this machine that misbehaves."""

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.shards.build import fetch
from dist_vse.shards.fetching import Fetching, refused_by
from dist_vse.shards.public_url import public_url
from tests.support.datasets import draw, encode
from tests.support.flaky_server import Server, serve
from tests.support.shards import run_shard
from tests.support.waiting import wait_until


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)
    fetch._fetcher.cache_clear()
    with serve(tmp_path / "far") as server:
        yield server


def _write(server: Server, count: int) -> list[tuple[str, str]]:
    """Put images on the server; return their URLs and captions."""
    for i in range(count):
        (server.folder / f"{i}.png").write_bytes(encode(draw(i)))
    return [(server.url(f"{i}.png?size=1&x={i}"), f"a drawing, number {i}") for i in range(count)]


def _csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *rows])
    return path


def _tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("train-*"))}


def _shard(source: Path, out: Path, *options: str) -> dict[str, bytes]:
    assert run_shard("urls", source, out, "--workers", "1", *options) == 0
    return _tars(out)


def _skipped(folder: Path) -> dict[str, str]:
    path = folder / "skipped.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {line["path"].split("/")[-1].split("?")[0]: line["reason"] for line in lines}


def test_all_formats_give_the_same_shards(server: Server, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = _write(server, 6)
    rows.append((rows[0][0], "a second caption"))
    urls, captions = zip(*rows, strict=True)
    first = _shard(_csv(tmp_path / "a.csv", rows), tmp_path / "a")
    (tmp_path / "b.tsv").write_text("\n".join("\t".join(r) for r in [("url", "caption"), *rows]))
    named = [{"link": url, "alt": caption} for url, caption in rows]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, named)))
    table = pyarrow.table({"url": urls, "caption": captions, "status": ["ok"] * len(rows)})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert _shard(tmp_path / "b.tsv", tmp_path / "b") == first
    columns = ("--url-column", "link", "--caption-column", "alt")
    assert _shard(tmp_path / "c.jsonl", tmp_path / "c", *columns) == first
    assert _shard(tmp_path / "d.parquet", tmp_path / "d") == first

    with tarfile.open(tmp_path / "a" / "train-00000.tar") as tar:
        found = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith("json")]  # type: ignore[arg-type]
    by_url = {sample["url"]: sample["captions"] for sample in found}
    assert len(by_url) == 6 and by_url[urls[0]] == [captions[0], "a second caption"]
    with pytest.raises(UserError, match=r"no column 'url' .*; did you mean 'URL'"):
        run_shard("urls", _csv_named(tmp_path, "URL,TEXT"), tmp_path / "e")
    with pytest.raises(UserError, match=r"list\.txt: must be called \.csv, \.tsv"):
        run_shard("urls", tmp_path / "list.txt", tmp_path / "e")
    with pytest.raises(UserError, match=r"--shard-size 10MB: .* a number of samples"):
        run_shard("urls", tmp_path / "a.csv", tmp_path / "e", "--shard-size", "10MB")


def _csv_named(folder: Path, header: str) -> Path:
    (folder / "x.csv").write_text(f"{header}\nhttp://host/a.jpg,a cat\n")
    return folder / "x.csv"


@pytest.mark.slow
def test_failures_are_listed_with_the_servers_answer(server: Server, tmp_path: Path) -> None:
    rows = _write(server, 8)
    (server.folder / "page.jpg").write_text("<html>gone</html>")
    (server.folder / "1.png").unlink()
    (server.folder / "2.png").write_bytes(bytes(3_000_000))
    (server.folder / "robots.txt").write_text("User-agent: dist-vse\nDisallow: /4.png\n")
    server.headers = {"3.png": "all, NoAI", "5.png": "otherbot: noai"}
    server.fault, server.faults = "503", 1  # each first answer
    rows += [(server.url("page.jpg"), "a page"), ("ftp://host/x.png", "far"), (rows[7][0], " ")]
    source = _csv(tmp_path / "list.csv", rows)

    _shard(source, tmp_path / "out", "--robots", "full", "--max-image", "1MB")
    skipped = _skipped(tmp_path / "out")
    assert skipped == {
        "1.png": "the server responded 404 Not Found",
        "2.png": "it has more than 1,000,000 bytes",
        "3.png": "X-Robots-Tag says noai",
        "4.png": "robots.txt disallows it",
        "page.jpg": skipped["page.jpg"],
        "x.png": "its URL is none of http or https",
    }
    assert "no image of a known format" in skipped["page.jpg"]
    assert server.requests["0.png"] == 2 and server.requests["4.png"] == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["splits"]["train"]["num_samples"] + len(skipped) == 10  # different URLs

    # By default X-Robots-Tag counts and robots.txt does not; then nothing does.
    _shard(source, tmp_path / "usual")
    assert _skipped(tmp_path / "usual").keys() == skipped.keys() - {"4.png"}
    _shard(source, tmp_path / "all", "--robots", "ignore")
    assert _skipped(tmp_path / "all").keys() == skipped.keys() - {"3.png", "4.png"}
    with pytest.raises(UserError, match=r"sample .*; fix or remove it, or skip .* --max-bad"):
        _shard(source, tmp_path / "none", "--max-bad", "0")


def test_failures_can_be_tried_again(server: Server, tmp_path: Path) -> None:
    source = _csv(tmp_path / "list.csv", _write(server, 6))
    lost = server.folder / "1.png"
    lost.rename(server.folder / "away")
    before = _shard(source, tmp_path / "out", "--shard-size", "2")
    (server.folder / "away").rename(lost)
    server.requests.clear()
    assert _shard(source, tmp_path / "out", "--shard-size", "2") == before  # they stay as they are
    assert not server.requests
    after = _shard(source, tmp_path / "out", "--shard-size", "2", "--retry-failed")
    assert after == _shard(source, tmp_path / "whole", "--shard-size", "2")
    assert not _skipped(tmp_path / "out")
    assert before.keys() == after.keys() and sum(before[n] == after[n] for n in before) == 4


def test_a_dead_network_ends_the_run_and_it_goes_on(server: Server, tmp_path: Path) -> None:
    rows = _write(server, 24)
    source = _csv(tmp_path / "list.csv", rows)
    dead = _csv(tmp_path / "dead.csv", [(u.replace("127.0.0.1", "127.0.0.2"), c) for u, c in rows])
    with pytest.raises(UserError, match="20 images in a row; is the network down"):
        _shard(dead, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    whole = _shard(source, tmp_path / "out")
    assert whole == _shard(source, tmp_path / "other", "--connections", "1")


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://u:pass@host:80/a.jpg?id=3&sig=x", "https://host:80/a.jpg?id=3"),
        ("https://b.s3/a.jpg?X-Amz-Date=1&X-Amz-Signature=x", "https://b.s3/a.jpg"),
        ("https://host/a.jpg?alt=media&token=x", "https://host/a.jpg?alt=media"),
        ("https://host/a.jpg?Expires=1&Key-Pair-Id=k&Signature=x", "https://host/a.jpg"),
        ("https://host/i.php?keyword=cat&design=2&x", "https://host/i.php?keyword=cat&design=2&x"),
        ("http://[host/a.jpg?sig=x", "http://[host/a.jpg"),
    ],
)
def test_what_is_kept_of_a_url(url: str, public: str) -> None:
    assert public_url(url) == public


def test_a_list_with_passwords_and_signatures_leaves_none(server: Server, tmp_path: Path) -> None:
    urls = [url.replace("//", "//me:SECRET@") + "&n=1" for url, _ in _write(server, 3)]

    def signed(mark: str) -> Path:
        rows = [(f"{url}&X-Amz-Signature={mark}", "x") for url in (*urls, server.url("gone.png?"))]
        return _csv(tmp_path / "list.csv", rows)

    first = _shard(signed("SECRET_ONE"), tmp_path / "out")
    assert server.logins == {"Basic bWU6U0VDUkVU", ""}
    for path in (tmp_path / "out").iterdir():
        assert b"SECRET" not in path.read_bytes(), path
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        found = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith("json")]  # type: ignore[arg-type]
    assert {sample["url"] for sample in found} == {u.replace("me:SECRET@", "") for u in urls}
    server.requests.clear()  # signed again, the list names the same images
    assert _shard(signed("SECRET_TWO"), tmp_path / "out") == first and not server.requests


def test_an_image_that_came_cut_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    source = _csv(tmp_path / "list.csv", _write(server, 2))
    server.fault, server.faults = "cut", 1
    assert len(_shard(source, tmp_path / "out")) == 2 and not _skipped(tmp_path / "out")
    server.faults = 9
    server.requests.clear()
    with pytest.raises(UserError, match=r"the connection ended [\d,]+ bytes early"):
        _shard(source, tmp_path / "none")


def test_images_wait_for_the_writer(server: Server) -> None:
    rows = _write(server, 40)
    fetcher = fetch.Fetcher(Fetching(connections=2))
    with ThreadPoolExecutor(2) as pool:
        ahead = fetch.FetchedAhead(fetcher, [url for url, _ in rows], pool)
        wait_until(lambda: sum(server.requests.values()) == 2 * fetch.AHEAD, "the window")
        assert ahead.read(rows[3][0]) == encode(draw(3))  # the first three are dropped
        wait_until(lambda: sum(server.requests.values()) == 2 * fetch.AHEAD + 4, "four more")


def test_a_host_is_asked_no_more_often_than_allowed(server: Server, tmp_path: Path) -> None:
    source = _csv(tmp_path / "list.csv", _write(server, 8))
    start = time.monotonic()
    _shard(source, tmp_path / "out", "--per-host", "40")
    assert time.monotonic() - start >= 7 / 40


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("noai", "noai"),
        ("all, noimageindex", "noimageindex"),
        ("dist-vse: noai", "noai"),
        ("otherbot: noai", ""),
        ("nofollow", ""),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", ""),
    ],
)
def test_x_robots_tag(line: str, refusal: str) -> None:
    headers = Message()
    headers["x-robots-tag"] = line
    assert refused_by(headers, Fetching().token) == refusal


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    source = _csv(tmp_path / "list.csv", _write(server, 60))
    command = [sys.executable, "-m", "dist_vse.cli", "shard", "urls", str(source)]
    command += [str(tmp_path / "out"), "--shard-size", "6", "--workers", "2"]
    environment = os.environ | {"no_proxy": "*"}
    run = subprocess.Popen([*command, "--per-host", "25"], env=environment, start_new_session=True)
    manifest = tmp_path / "out" / "receipts.jsonl"
    wait_until(lambda: manifest.exists() and manifest.read_text().count("\n") >= 2, "two shards")
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = manifest.read_text().count("\n")
    assert done < 10
    server.requests.clear()
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert sum(server.requests.values()) == 60 - 6 * done
    assert _tars(tmp_path / "out") == _shard(source, tmp_path / "whole", "--shard-size", "6")
