"""A folder goes to a hub and comes back; the hub is a server on this machine."""

from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.tools.export.hub import fetch, push
from dist_vse.tools.export.load import load
from tests.support.hub import COMMIT, serve_hub

pytestmark = pytest.mark.slow


def test_what_is_pushed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # no server here
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "out"
    (out / "image").mkdir(parents=True)
    (out / "README.md").write_text("---\nlibrary_name: dist_vse\n---\n# mine\n")
    (out / "image" / "model.safetensors").write_bytes(bytes(range(256)))
    files: dict[str, bytes] = {}
    asked: list[str] = []
    with serve_hub(files, asked) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert push(out, "me/model") == f"{address}/me/model"
        assert {*files} == {"README.md", "image/model.safetensors"}
        copy = fetch("me/model")
        for name in files:
            assert (copy / name).read_bytes() == (out / name).read_bytes()
        large = [line for line in asked if "/storage/" in line]  # by a redirect, as Git LFS has it
        assert [line.split()[0] for line in large] == ["PUT", "GET"]
        assert not [line for line in large if line.endswith(" as me")]
        assert f"GET /me/model/resolve/{COMMIT}/README.md as me" in asked
        with pytest.raises(UserError, match=r"no exported model \(dist_vse.json is missing"):
            load("hf-hub:me/model")
        with pytest.raises(UserError, match=r"^hf-hub:me/refused: .*403") as caught:
            push(out, "me/refused")
        assert "\n" not in str(caught.value)
        for wrong in ("a/b/c", "me/model--"):
            with pytest.raises(UserError, match=r"^hf-hub:"):
                fetch(wrong)
    with pytest.raises(UserError, match=r"^hf-hub:me/other: "):
        fetch("me/other")
