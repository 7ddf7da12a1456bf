"""Folders that are no checkpoint, and settings that a checkpoint contradicts: one line each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.data.decode import Transform
from tests.support.tiny_clip import build, starting_from, write_all


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("checkpoints"))


def broken(folders: Path, folder: Path, how: str) -> Path:
    """Copy a checkpoint, and break it."""
    library = "open_clip" if how.startswith("open_clip") else "hf"
    shutil.copytree(folders / f"{library}-clip", folder)
    config = folder / ("open_clip_config.json" if library == "open_clip" else "config.json")
    content: dict[str, Any] = json.loads(config.read_text())
    if how.endswith("no config"):
        config.unlink()
    elif how.endswith("no weights"):
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            path.unlink()
    elif how == "other model":
        config.write_text(json.dumps(content | {"model_type": "bert"}))
    elif how == "open_clip coca":
        content["model_cfg"]["multimodal_cfg"] = {}
        config.write_text(json.dumps(content))
    elif how == "open_clip hub":
        content["model_cfg"]["vision_cfg"]["timm_model_name"] = "hf-hub:somebody/model"
        config.write_text(json.dumps(content))
    elif how == "open_clip other shape":
        content["model_cfg"]["vision_cfg"]["layers"] = 3
        config.write_text(json.dumps(content))
    elif how == "open_clip pickle":
        torch.save({"logit_scale": Transform(3)}, folder / "open_clip_pytorch_model.bin")
    elif how == "deeper":
        content["text_config"]["num_hidden_layers"] = 3
        config.write_text(json.dumps(content))
    elif how == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()
    elif how == "cropped":
        path = folder / "preprocessor_config.json"
        pixels = json.loads(path.read_text()) | {"size": {"shortest_edge": 40}}
        path.write_text(json.dumps(pixels))
    elif how == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "neither config.json"),
        ("open_clip no config", "neither config.json"),
        ("no weights", r"model\.safetensors: the weights are missing"),
        ("open_clip no weights", r"the weights are missing; one of open_clip_model\.safetensors"),
        ("other model", "model_type 'bert' is no CLIP"),
        ("open_clip coca", "describes CoCa"),
        ("open_clip hub", "is not here but on a hub"),
        ("open_clip other shape", r"does not load \(Error\(s\) in loading state_dict"),
        ("open_clip pickle", r"does not read as weights \(.*it must hold tensors only"),
        ("deeper", "its weights lack 16 tensors"),
        ("no preprocessing", "its image preprocessing does not load"),
        ("cropped", "only the whole crop of its own size"),
        ("cut", r"model\.safetensors: is damaged"),
    ],
)
def test_what_is_no_checkpoint(folders: Path, tmp_path: Path, how: str, message: str) -> None:
    folder = broken(folders, tmp_path / "broken", how)
    with pytest.raises(UserError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.image.name=resnet50"], r"brings both encoders .* leave out model\.image\.name"),
        (["model.head_hidden=64"], r"leave out model\.head_hidden \(64\)"),
        (["model.text.kind=gru"], r"leave out model\.text\.kind \(gru\)"),
        (
            ["data.features=x", "data.crop=center", "model.image.frozen=true"],
            "with model.image.we",
        ),
    ],
)
def test_settings_that_would_be_ignored(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["model.pretrained=somewhere", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.embed_dim=512", r"leave out model\.embed_dim"),
        ("loss.temperature=0.05", r"loss\.temperature \(0\.05\) is 0\.03877 in"),
    ],
)
def test_settings_that_the_checkpoint_contradicts(
    folders: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        starting_from(folders / "hf-clip", override)


def test_weights_in_several_files_and_in_a_pickle(folders: Path, tmp_path: Path) -> None:
    whole = folders / "hf-clip"
    parts = shutil.copytree(whole, tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    CLIPModel.from_pretrained(whole, local_files_only=True).save_pretrained(
        parts, max_shard_size="20KB"
    )
    assert not (parts / "model.safetensors").exists()
    for one, other in zip(build(whole).parameters(), build(parts).parameters(), strict=True):
        assert torch.equal(one, other)
    index = parts / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match="which is not in the folder"):
        build(parts)
    index.rename(parts / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is a pickle"):
        build(parts)


def test_a_training_checkpoint_of_openclip(folders: Path, tmp_path: Path) -> None:
    whole = folders / "open_clip-clip"
    folder = shutil.copytree(whole, tmp_path / "trained")
    path = folder / "open_clip_pytorch_model.bin"
    state = {f"module.{name}": x for name, x in torch.load(path).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, path)
    for one, other in zip(build(whole).parameters(), build(folder).parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_left_to_learn(folders: Path) -> None:
    frozen = ["model.image.frozen=true", "model.text.frozen=true"]
    with pytest.raises(UserError, match="nothing is left to learn"):
        build(folders / "hf-siglip", *frozen)
    assert build(folders / "hf-clip", *frozen).image.head.weight.requires_grad
