"""Every recipe in configs/ is loaded, built with small encoders, and takes two steps."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from timm import create_model

from dist_vse import cli, train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.models.vectors import CAPTIONS, VECTORS
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.runs import CONFIG, read_losses, settings
from tests.support.tiny_clip import write_hf
from tests.support.tiny_models import write_tiny_bert

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PAPERS = [name for name in RECIPES if "_paper" in name]
LORA = ["model.lora.rank=4", "model.lora.alpha=8", "optim.lr=3e-4", "optim.layer_decay=1"]
OVERLAYS = {"finetune_clip with adapters": ("finetune_clip", LORA)}
SMALL = [
    "global_batch_size=32", "chunk_size=8", "epochs=0", "total_samples=64", "log_every=1",
    "data.num_streams=8", "data.num_workers=0", "eval_every=0", "checkpoint_every=0", "keep_best=0",
]  # fmt: skip
IMAGE = ["model.image.name=test_vit", "model.image.size=32"]
NARROW = ["model.text.width=64", "model.text.word_dim=32", "model.embed_dim=64"]
NARROW += ["model.head_hidden=64", "model.image.projection=64"]
TEXT = ["model.text.width=64", "model.text.depth=1", "model.text.max_tokens=12"]


def _step_all(folder: Path) -> dict[str, int | str]:
    """Train each recipe for two steps; return the exit codes, or what the user is told."""
    vit = [f"model.image.weights={folder / 'vit.safetensors'}", *IMAGE]
    resnet = [f"model.image.weights={folder / 'resnet.safetensors'}", "model.image.size=32"]
    paper = [*resnet, "model.image.name=test_resnet", "model.text.min_count=1", *NARROW]
    paper += ["data.num_workers=0", "data.captions_per_image=2"]
    stand_ins = {
        **dict.fromkeys(PAPERS, paper),
        "debug_cpu": [],
        "demo": [*vit, f"model.text.weights={folder / 'bert'}", "model.text.max_tokens=12"],
        "sweep_batch": [
            f"data.index={folder / 'vectors'}", "model.image.size=6", "engine.zero_stage=0",
            f"model.text.weights={folder / 'texts'}",
        ],
        "clip_vitb32": [*IMAGE, *TEXT, "data.crop=random"],
        "siglip_vitb16": [*IMAGE, *TEXT, "model.image.size_schedule=[[0,16],[0.5,32]]"],
        "lit": [*vit, *TEXT],
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


def _write_vectors(folder: Path) -> None:
    """Write stored vectors of images, as shards, and of captions."""
    rows, draw = 64, np.random.default_rng(0).standard_normal
    captions = [f"caption {number}" for number in range(2 * rows)]
    (folder / "data").mkdir()
    for split in ("train", "dev"):
        np.save(folder / "data" / f"{split}_ims.npy", draw((rows, 6)).astype(np.float32))
        (folder / "data" / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
    assert cli.main(["shard", "precomp", str(folder / "data"), str(folder / "vectors")]) == 0
    (folder / "texts").mkdir()
    (folder / "texts" / CAPTIONS).write_text("\n".join(captions) + "\n")
    np.save(folder / "texts" / VECTORS, draw((len(captions), 5)).astype(np.float32))


@pytest.mark.slow
def test_every_recipe_takes_two_steps_with_small_encoders(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16}, captions=2)
    write_hf(tmp_path / "clip", "clip")
    write_tiny_bert(tmp_path / "bert")
    _write_vectors(tmp_path)
    for name, more in (("vit", {"img_size": 32}), ("resnet", {})):
        trunk = create_model(f"test_{name}", num_classes=0, **more)
        save_file(trunk.state_dict(), tmp_path / f"{name}.safetensors")
    (found,) = run_distributed(_step_all, 1, tmp_path, timeout=110)
    assert found == dict.fromkeys(["heads", *RECIPES, *OVERLAYS], 0)
    for name in (*RECIPES, *OVERLAYS):
        assert len(read_losses(tmp_path / name)) == 2
