"""A frozen trunk's outputs on disk: training from them equals live training; no stale ones."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.data.index import read_index
from dist_vse.data.precomputed import open_features, write_manifest, write_part
from dist_vse.tools.features import make_features
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, read_losses, run


def _write_weights(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), path)


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    write_dataset(tmp_path / "shards", {"train": [60, 50, 40], "val": [32]})
    _write_weights(tmp_path / "trunk.safetensors", 0)
    return [
        f"data.index={tmp_path / 'shards'}",
        f"model.image.weights={tmp_path / 'trunk.safetensors'}",
        "model.image.frozen=true",
        "data.crop=center",
        "total_steps=6",
        "log_every=1",
    ]


def _features(overrides: list[str]) -> int | str:
    try:
        make_features(load_config(CONFIG, overrides))
        return 0
    except UserError as error:
        return str(error)


def _blank_the_images(shards: Path) -> None:
    """Overwrite the training images, so that none can be decoded."""
    index = read_index(shards)
    for shard in index.split("train").shards:
        data = bytearray((shards / shard.path).read_bytes())
        for offset, num_bytes, *_ in index.offsets(shard).tolist():
            data[offset : offset + num_bytes] = bytes(num_bytes)
        (shards / shard.path).write_bytes(data)


@pytest.mark.slow
def test_training_from_features_equals_live_training_and_reads_no_image(
    tmp_path: Path, overrides: list[str]
) -> None:
    assert run_distributed(run, 2, [*overrides, f"output_dir={tmp_path / 'live'}"]) == [0, 0]
    cached = [*overrides, f"data.features={tmp_path / 'features'}"]
    assert run_distributed(_features, 2, cached) == [0, 0]
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2
    _blank_the_images(tmp_path / "shards")
    cached += ["data.num_workers=1", f"output_dir={tmp_path / 'cached'}"]
    assert run_distributed(run, 2, cached) == [0, 0]
    live, from_disk = read_losses(tmp_path / "live"), read_losses(tmp_path / "cached")
    assert len(live) == 6 and live[-1] != live[0]
    assert from_disk == pytest.approx(live, abs=1e-5)


@pytest.mark.slow
def test_stale_features_are_refused_and_made_again(tmp_path: Path, overrides: list[str]) -> None:
    folder = tmp_path / "features"
    cached = [*overrides, f"data.features={folder}", f"output_dir={tmp_path / 'run'}"]
    (verdict,) = run_distributed(run, 1, cached)
    assert "no features here" in str(verdict) and "dist-vse features" in str(verdict)
    assert run_distributed(_features, 1, cached) == [0]
    first = (folder / "features-00000.npy").read_bytes()
    _write_weights(tmp_path / "trunk.safetensors", 1)
    (verdict,) = run_distributed(run, 1, cached)
    assert "stale features (weights: " in str(verdict)
    assert run_distributed(_features, 1, cached) == [0]
    assert (folder / "features-00000.npy").read_bytes() != first
    assert run_distributed(run, 1, cached) == [0]


def test_features_need_a_folder(overrides: list[str]) -> None:
    assert "give data.features=DIR" in str(run_distributed(_features, 1, overrides)[0])


def test_features_name_what_made_them(tmp_path: Path) -> None:
    part = write_part(tmp_path, 0, 5, [torch.arange(6.0).view(3, 2), torch.ones(2, 2)])
    other = write_part(tmp_path, 1, 1, [torch.full((1, 2), 7.0)])
    assert part is not None and other is not None
    assert write_part(tmp_path, 2, 0, []) is None
    write_manifest(tmp_path, {"data": "a"}, [part, other])
    features = open_features(tmp_path, {"data": "a"}, 6)
    assert features.rows(torch.tensor([5, 1, 4])).tolist() == [[7, 7], [2, 3], [1, 1]]
    with pytest.raises(UserError, match=r"stale features \(data: a, now b\)"):
        open_features(tmp_path, {"data": "b"}, 6)
    path = tmp_path / part.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"features-00000.npy: is missing or cut"):
        open_features(tmp_path, {"data": "a"}, 6)


@pytest.mark.parametrize(
    "override",
    ["data.crop=random", "data.flip=true", "data.color_jitter=0.1", "model.image.frozen=false"],
)
def test_features_of_images_that_change_are_refused(overrides: list[str], override: str) -> None:
    with pytest.raises(UserError, match=r"data.features needs model.image.frozen=true"):
        load_config(CONFIG, [*overrides, "data.features=somewhere", override])
