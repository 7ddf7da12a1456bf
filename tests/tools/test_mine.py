"""`dist-vse mine`: the texts of a dense search, in shards that training reads."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.functional import normalize

from dist_vse import cli
from dist_vse.data.index import read_index
from dist_vse.data.reader import ShardReader
from dist_vse.evaluation.evaluate import Embedded
from dist_vse.shards.record import Record
from dist_vse.tools.search import mine
from dist_vse.tools.search.embed import embed_split, open_model
from dist_vse.tools.search.mine import Mining, found_negatives
from tests.support.distributed import run_distributed
from tests.support.runs import trained_run

CPU = torch.device("cpu")


def _split(images: int = 40) -> Embedded:
    """Draw two captions an image; some images and captions stand twice, in a mixed order."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(images, 8, generator=generator)
    image_of_text = torch.arange(2 * images) // 2
    near = made[image_of_text] + torch.randn(2 * images, 8, generator=generator)
    image_ids, text_ids = torch.arange(images) * 7919 % 101, torch.arange(2 * images) * 31 % 997
    for copy, of in ((5, 3), (9, 3)):
        made[copy], image_ids[copy] = made[of], image_ids[of]
    for copy, of in ((50, 20), (61, 20), (3, 2)):
        near[copy], text_ids[copy] = near[of], text_ids[of]
    captions = [f"text {number}" for number in text_ids.tolist()]
    keys = [str(number) for number in range(images)]
    features = normalize(made, dim=1), normalize(near, dim=1)
    return Embedded(keys, captions, *features, image_of_text, image_ids, text_ids)


def _dense(found: Embedded, mining: Mining) -> list[list[str]]:
    """Sort all texts of each image."""
    scores = found.image_features.double() @ found.text_features.double().T
    answers = []
    for i, row in enumerate(scores):
        same = found.image_ids[found.image_of_text] == found.image_ids[i]
        own = {found.captions[j] for j in same.nonzero().view(-1).tolist()}
        limit = max(float(row[j]) for j, text in enumerate(found.captions) if text in own)
        limit -= mining.ignore_above if mining.ignore_above is not None else -9
        order = sorted(range(len(row)), key=lambda j: (-float(row[j]), j))
        texts = [found.captions[j] for j in order if float(row[j]) < limit]
        answers.append([text for text in dict.fromkeys(texts) if text not in own][: mining.top])
    return answers


@pytest.mark.parametrize("margin", [None, 0.1, -0.2])
def test_negatives_are_those_of_a_dense_search(
    margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, mining = _split(), Mining(top=4, ignore_above=margin)
    expected = _dense(found, mining)
    for tile in (1024, 7):
        monkeypatch.setattr(mine, "TILE", tile)
        parts = [found_negatives(found, mining, CPU, *part) for part in ((0, 14), (14, 40))]
        assert parts[0] + parts[1] == expected
    assert (expected == _dense(found, Mining(top=4))) == (margin is None)


def test_a_large_k_gives_all_others() -> None:
    found = _split()
    texts = found_negatives(found, Mining(top=999), CPU, 0, 1)[0]
    own = {*found.captions[:2]}
    assert {*texts} == {*found.captions} - own and len({*texts}) == len(texts)


def test_negatives_that_are_there_stay() -> None:
    record = Record("a.png", ("a",), "train", "k", {"negatives": ["b", "c"], "more": 1})
    joined = mine._with_negatives(record, ["c", "d"])
    assert joined.extra == {"negatives": ["b", "c", "d"], "more": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [20, 13], "val": [8]}
    return trained_run(tmp_path_factory.mktemp("run"), splits, "total_steps=2")


def _mine(arguments: list[str]) -> int:
    """Mine as a rank of the harness, whose process group is there already."""
    with mock.patch("dist_vse.distributed.process_group", contextlib.nullcontext):
        return cli.main(arguments)


@pytest.mark.slow
def test_mined_shards_are_whole_and_hold_the_negatives(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "mined", tmp_path / "again"
    command = ["mine", str(trained), str(out), "--top", "3", "--ignore-above", "-0.05"]
    assert cli.main(command) == 0
    index, source = read_index(out), read_index(trained.parent / "shards")
    found = embed_split(open_model(trained), source, "train")
    expected = dict(zip(found.keys, _dense(found, Mining(top=3, ignore_above=-0.05)), strict=True))
    reader, seen = ShardReader(index, "train", max_open=2), {}
    for number in range(33):
        meta = reader.meta(*reader.place(number))
        seen[meta.key] = list(meta.negatives)
    assert seen == expected and any(seen.values())
    assert index.split("val").num_samples == 8
    assert cli.main(["shard", "verify", str(out), "--workers", "1"]) == 0

    shard = index.split("train").shards[0].path
    before = (out / shard).stat().st_mtime_ns
    assert cli.main(command) == 0 and (out / shard).stat().st_mtime_ns == before  # it is whole
    (out / shard).write_bytes(b"cut")
    assert cli.main(command) == 0 and cli.main(["shard", "verify", str(out), "--workers", "1"]) == 0
    both = ["mine", str(trained), str(again), *command[3:]]
    assert run_distributed(_mine, 2, both) == [0, 0]
    assert (again / "index.json").read_bytes() == (out / "index.json").read_bytes()
    assert json.loads((out / "index.json").read_text())
    assert cli.main(["mine", str(trained), str(trained.parent / "shards")]) == 2
    assert "would be overwritten" in capsys.readouterr().err
