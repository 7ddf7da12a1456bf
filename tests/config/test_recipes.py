"""Every recipe in configs/ is loaded, built with small encoders, and takes two steps."""

from pathlib import Path

import pytest
from safetensors.torch import save_file
from timm import create_model

from dist_vse import train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.runs import CONFIG, read_losses, settings
from tests.support.tiny_clip import write_hf

RECIPES = ("clip_vitb32", "siglip_vitb16", "lit", "finetune_clip", "coco_finetune")
LORA = ["model.lora.rank=4", "model.lora.alpha=8", "optim.lr=3e-4", "optim.layer_decay=1"]
OVERLAYS = {"finetune_clip with adapters": ("finetune_clip", LORA)}
SMALL = [
    "global_batch_size=32", "chunk_size=8", "epochs=0", "total_samples=64", "log_every=1",
    "data.num_streams=8", "data.num_workers=0", "eval_every=0", "checkpoint_every=0", "keep_best=0",
]  # fmt: skip
IMAGE = ["model.image.name=test_vit", "model.image.size=32"]
TEXT = ["model.text.width=64", "model.text.depth=1", "model.text.max_tokens=12"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    for world_size in (1, 2, 4, 8):
        config.check_world_size(world_size, on_gpu=False)


def _step_all(folder: Path) -> dict[str, int | str]:
    """Train each recipe for two steps; return the exit codes, or what the user is told."""
    stand_ins = {
        "clip_vitb32": [*IMAGE, *TEXT, "data.crop=random"],
        "siglip_vitb16": [*IMAGE, *TEXT, "model.image.size_schedule=[[0,16],[0.5,32]]"],
        "lit": [*IMAGE, *TEXT, f"model.image.weights={folder / 'vit.safetensors'}"],
        "finetune_clip": [f"model.pretrained={folder / 'clip'}"],
        "finetune_clip with adapters": [f"model.pretrained={folder / 'clip'}"],
        "coco_finetune": [
            f"model.from_run={folder / 'heads'}", "model.image.size=32", "model.text.max_tokens=12"
        ],
    }  # fmt: skip
    first = settings(folder / "shards", folder / "heads", "total_steps=1")
    found: dict[str, int | str] = {"heads": train.run(load_config(CONFIG, first))}
    for name, more in stand_ins.items():
        recipe, overlay = OVERLAYS.get(name, (name, []))
        more = [*SMALL, "data.eval_split=val", *overlay, *more]
        overrides = settings(folder / "shards", folder / name, *more)
        try:
            found[name] = train.run(load_config(ROOT / "configs" / f"{recipe}.yaml", overrides))
        except UserError as error:
            found[name] = str(error)
    return found


@pytest.mark.slow
def test_every_recipe_takes_two_steps_with_small_encoders(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16}, captions=2)
    write_hf(tmp_path / "clip", "clip")
    vit = create_model("test_vit", num_classes=0, img_size=32)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    (found,) = run_distributed(_step_all, 1, tmp_path, timeout=110)
    assert found == dict.fromkeys(["heads", *RECIPES, *OVERLAYS], 0)
    for name in (*RECIPES, *OVERLAYS):
        assert len(read_losses(tmp_path / name)) == 2
