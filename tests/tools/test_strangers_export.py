"""An exported folder that somebody else made: loaded, or one line, and nothing outside is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_vse import load
from dist_vse.common.errors import UserError
from dist_vse.config import dump_config, load_config
from dist_vse.models.build import build_model
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.tools.export.write import export_run
from dist_vse.tools.suites.run import take_over

SHAPE = ("model.embed_dim=16", "model.image.name=test_vit", "model.image.size=32")
GRU = ("model.text.kind=gru", "model.text.width=16", "model.text.word_dim=8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a run of random weights."""
    run_dir = tmp_path_factory.mktemp("run")
    config = load_config(None, [*SHAPE, *GRU])
    (run_dir / "config.yaml").write_text(dump_config(config))
    words = WordTokenizer(["red", "blue"], 8, "plain")
    words.save(run_dir / "vocabulary.json")
    path = run_dir / "checkpoints" / "step-000003"
    weights = build_model(config.model, config.loss, words).state_dict()
    digests = checkpoint.write_files(path, {"model.safetensors": weights})
    more: dict[str, Any] = {"world_size": 0, "zero_stage": 0, "score": None}
    checkpoint.write_manifest(path, Progress(3, 96, [[0, 0]]), digests, **more)
    return export_run(run_dir, run_dir / "out", onnx=False)


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_set("model", "text", "width", value="x"), "text.width: .* could not be converted"),
        (_set("model", "text", "width", value=-1), "model.text.width .-1. must be at least 1"),
        (_set("model", "text", "depth", value=3.5), "text.depth: .* could not be converted"),
        (_set("model", "text", "depth", value=10**12), "model.text.depth .* is above 1,000"),
        (_set("model", "text", "width", value=10**9), "this machine has too little memory"),
        (_set("model", "image", "name", value=["a"]), "image.name"),
        (_set("model", "image", "name", value="${oc.env:HOME}"), r"holds \$\{"),
        (_set("model", "image", "size_schedule", value={}), "Cannot merge"),
        (_set("model", "image", "weights", value="/etc/passwd"), "weights outside of the folder"),
        (_set("model", "image", "weights", value="../x"), "weights outside of the folder"),
        (_set("model", "pretrained", value="../clip"), "leave out model.image.name"),
        (_set("model", "odd", value=1), "unknown key 'odd'"),
        (_set("model", value=[]), "must hold keys and values"),
        (_set("vocab_size", value="5"), "vocab_size and pad_id must be numbers"),
        (_set("vocab_size", value=10**12), "vocab_size and pad_id must be numbers"),
        (_set("pad_id", value=-1), "vocab_size and pad_id must be numbers"),
    ],
)
def test_a_forged_description_is_one_line(
    change: Callable[[dict[str, Any]], None], why: str, exported: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "out")
    content = json.loads((folder / "dist_vse.json").read_text())
    change(content)
    (folder / "dist_vse.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=why) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\x10" + bytes(7) + b"{" * 16])
def test_damaged_weights_are_one_line(content: bytes, exported: Path, tmp_path: Path) -> None:
    assert load(exported).dim == 16
    folder = shutil.copytree(exported, tmp_path / "out")
    files = [path for path in folder.rglob("*.safetensors")]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged|does not read as weights"):
            load(folder)
        path.write_bytes(whole)


def test_a_suites_files_follow_no_planted_link(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "run" / "suites" / "mteb"
    mine = tmp_path / "mine.json"
    scratch.mkdir()
    out.mkdir(parents=True)
    (scratch / "Task.json").write_text("{}")
    mine.write_text("mine")
    (out / "Task.json").symlink_to(mine)
    take_over(scratch, out)
    assert (mine.read_text(), (out / "Task.json").read_text()) == ("mine", "{}")
    shutil.rmtree(out)
    out.symlink_to(tmp_path)
    with pytest.raises(OSError, match="it is a link"):
        take_over(scratch, out)
