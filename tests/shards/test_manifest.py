"""The notes in a data set's folder, which may be a stranger's."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.shards import manifest


@pytest.mark.parametrize("name", ["../victim", "/etc/victim", "a/b", "..", 5])
def test_names_in_a_folders_notes_stay_inside(name: object, tmp_path: Path) -> None:
    """Files of unfinished runs are removed by these names, and the folder may be a stranger's."""
    (tmp_path / manifest.PLANNED_NAME).write_text(json.dumps({"train": ["a.tar", name]}))
    with pytest.raises(UserError, match="must hold lists of file names"):
        manifest.read_planned(tmp_path)
    entry = {"name": "train-0.tar", "split": "train", "num_samples": 0, "num_captions": 0}
    entry["num_bytes"] = 0
    entry |= {f.name: "" for f in fields(manifest.ShardEntry) if f.name not in entry}
    lines = [entry | {"skipped": []}, entry | {"skipped": [], "name": name}]
    lines.append(entry | {"skipped": [], "name": "b.tar", "side": f"../{name}"})
    path = tmp_path / manifest.MANIFEST_NAME
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [*manifest.read_manifest(tmp_path)] == ["train-0.tar"]
