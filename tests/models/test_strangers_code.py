"""A model's folder that somebody else made: none of its code runs, whoever answers what."""

import builtins
import json
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.models.encoder import load_encoder
from dist_vse.models.pretrained import read_start
from tests.support.tiny_models import write_tiny_bert


def _with_code(folder: Path, target: Path) -> Path:
    """Make transformers load the folder's own classes, which leave a mark when imported."""
    (folder / "own.py").write_text(f"open({str(target)!r}, 'w')\nclass Own: pass\n")
    content = json.loads((folder / "config.json").read_text())
    content["model_type"] = "own"
    content["auto_map"] = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_code_of_a_checkpoints_folder_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # transformers asks on a terminal
    target = tmp_path / "PWNED"
    folder = _with_code(write_tiny_bert(tmp_path / "bert"), target)
    with pytest.raises(UserError, match="does not load as a transformers model"):
        load_encoder(str(folder), 0.0)
    with pytest.raises(UserError):
        read_start(str(folder))
    assert not target.exists()
