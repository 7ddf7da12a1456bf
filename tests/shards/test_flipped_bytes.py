"""Any byte of a data set may be damaged: `verify` notices, and no other command breaks."""

import json
import random
import shutil
from pathlib import Path

import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.data.index import Index, read_index
from dist_vse.data.samples import Batch
from tests.support.flipped import damage
from tests.support.shards import run_shard, write_pairs
from tests.support.streams import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DAMAGES = 140
ONE = ("--workers", "1")


def _facts(index: Index) -> object:
    return json.dumps({name: repr(split) for name, split in index.splits.items()})


def _first_batch(index: Index) -> Batch:
    (stream,) = start(index, global_batch_size=12, max_bad=1.0)
    return next(stream)


def test_damage_is_noticed_and_breaks_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    pairs = write_pairs(tmp_path / "in", 12)
    assert run_shard("jsonl", pairs, whole, "--split", "train", "--shard-size", "6", *ONE) == 0
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    assert {"index.json", "receipts.jsonl", "commands.jsonl"} <= set(names) and len(names) == 7
    facts = _facts(read_index(whole))
    capsys.readouterr()
    for seed in range(DAMAGES):
        name, copy = names[seed % len(names)], tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        path = copy / name
        path.write_bytes(damage(path.read_bytes(), random.Random(seed)))
        said = {}
        for command in ("verify", "stats"):
            code = cli.main(["shard", command, str(copy), *ONE])
            errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
            said[command] = code
            assert code in (0, 1, 2) and len(errors) <= 1, (seed, name, command, errors)
        try:
            index = read_index(copy)
            _first_batch(index)
        except UserError as error:
            assert "\n" not in str(error)
            assert said["verify"] != 0 or "caption" in str(error), (seed, name, str(error))
            continue
        if said["verify"] == 0 and name not in ("receipts.jsonl", "commands.jsonl"):
            assert _facts(index) == facts, (seed, name)
