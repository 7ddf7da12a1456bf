"""`stats` counts what is there; the contact sheet shows it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.shards.verify.stats import COLUMNS, GREY, THUMB, dataset_stats, shared_images
from tests.support.datasets import Sample, draw, encode, make_sample, write_shards
from tests.support.shards import run_shard, write_tar


def test_stats_count_and_find_what_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [make_sample(n, captions=1 + n % 2, size=32 + 8 * (n % 2)) for n in range(10)]
    meta = json.dumps({"key": "p", "captions": ["ein Wort"], "languages": ["de"]}).encode()
    photo = Sample("p", encode(draw(40, size=96), "JPEG"), ("ein Wort",), "jpg", meta)
    write_shards(
        tmp_path, {"train": [train[:6], train[6:], [train[3]]], "val": [[train[0], photo]]}
    )
    stats = dataset_stats(read_index(tmp_path), workers=2, advance=lambda count: None)
    assert stats["train"].captions == Counter({1: 5, 2: 6})
    assert stats["train"].sides == Counter({32: 5, 40: 6})
    assert stats["train"].formats == Counter({"PNG": 11})
    assert sum(stats["train"].words.values()) == 17
    assert stats["train"].words[5] >= 10  # "a red square on blue"
    assert (stats["train"].repeated, stats["val"].repeated) == (1, 0)
    assert stats["val"].languages == Counter({"de": 1})
    assert shared_images(stats) == [("train", "val", 1)]

    sheet = tmp_path / "sheet.png"
    assert run_shard("stats", tmp_path, "--workers", "1", "--contact-sheet", sheet) == 0
    output = capsys.readouterr().out
    assert "1 images are in both train and val" in output
    assert "words a caption (median 5)" in output
    with Image.open(sheet) as image:
        assert image.width == COLUMNS * 168
        colours = image.convert("RGB").getcolors(1 << 20)
        assert colours is not None and len(colours) > 100  # pictures and text, not blank

    write_shards(tmp_path / "bad", {"train": [[Sample("b", b"GIF89a", ("a",))]]})
    with pytest.raises(UserError, match=r"row 0 is broken .*shard verify"):
        run_shard("stats", tmp_path / "bad", "--workers", "1")


def test_an_unusable_image_is_a_grey_tile(tmp_path: Path) -> None:
    """Indexing decodes nothing, so that half a JPEG may be among the samples."""
    photo = encode(draw(1, size=96), "JPEG")
    members = {"1.jpg": photo, "1.txt": "whole", "2.jpg": photo[: len(photo) // 2], "2.txt": "half"}
    run_shard("index", write_tar(tmp_path / "x.tar", members), "--workers", "1")
    sheet = tmp_path / "sheet.png"
    assert run_shard("stats", tmp_path, "--workers", "1", "--contact-sheet", sheet) == 0
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    first, second = ((pixels[:, at : at + 168] == GREY).all(-1) for at in (0, 168))
    assert first.sum() < 50  # edges of letters
    assert 0.9 * THUMB**2 < second.sum() < THUMB**2  # the rest says "unusable"
