"""Image sizes and patches that change along a run, and positions fitted to another size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional

from dist_vse.common.errors import UserError
from dist_vse.config import (
    DataConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
)
from dist_vse.data.streams import open_train_sets
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.image import set_training_input
from dist_vse.models.positions import fit_positions
from dist_vse.models.tokenizer import AnyWords, WordTokenizer
from dist_vse.runs.checkpoint import Progress
from dist_vse.training.batches import build_train_batches
from dist_vse.training.grad_cache import train_step
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import read_losses, run, settings
from tests.support.tiny import tiny_batch

SCHEDULE = [[0.0, 16.0], [0.5, 32.0]]


def _model(image: ImageConfig, max_tokens: int = 8) -> DualEncoder:
    text = TextConfig(width=64, depth=1, max_tokens=max_tokens)
    return build_model(
        ModelConfig(image=image, text=text, embed_dim=16), LossConfig(), AnyWords(50)
    )


def test_the_schedule_is_read_by_the_share_of_the_run() -> None:
    image = ImageConfig(
        size=224, size_schedule=[[0, 112], [0.7, 160], [0.95, 224]], patch_drop=0.5,
        patch_drop_until=0.9,
    )  # fmt: skip
    found = [image.input_at(progress) for progress in (0, 0.69, 0.7, 0.9, 0.95, 1.0)]
    assert found == [(112, 0.5), (112, 0.5), (160, 0.5), (160, 0), (224, 0), (224, 0)]
    assert ImageConfig(size=64).input_at(0.5) == (64, 0.0)
    for schedule in ([[0.1, 112]], [[0, 112], [0, 160]], [[0, 4]], [[0, 112], [1.5, 160]]):
        with pytest.raises(UserError, match=r"model.image.size_schedule"):
            ImageConfig(size_schedule=schedule)
    with pytest.raises(UserError, match=r"does not take images of model.image.size_schedule=20"):
        _model(ImageConfig(name="test_vit", size=32, size_schedule=[[0, 20]]))
    with pytest.raises(UserError, match=r"'test_resnet' has no patches"):
        _model(ImageConfig(name="test_resnet", size=32, patch_drop=0.5))
    with pytest.raises(UserError, match=r"are for timm models"):
        model = ModelConfig(pretrained="clip", image=ImageConfig(patch_drop=0.5))
        TrainConfig(model=model)


def test_features_at_the_full_size_are_unchanged_and_training_shrinks() -> None:
    images, _ = tiny_batch(4, 0)
    plain = _model(ImageConfig(name="test_vit", size=32)).eval()
    image = ImageConfig(name="test_vit", size=32, size_schedule=SCHEDULE, patch_drop=0.5)
    scheduled = _model(image).eval()
    assert torch.equal(plain.encode_images(images), scheduled.encode_images(images))
    set_training_input(scheduled, 16, 0.0)
    assert torch.equal(plain.encode_images(images), scheduled.encode_images(images))
    scheduled.train()
    small = functional.interpolate(images.float(), size=16, mode="bilinear", antialias=True)
    found = scheduled.encode_images(images)
    trunk = scheduled.image.trunk
    expected = scheduled.eval().encode_images((small - trunk.mean) / trunk.std)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    set_training_input(scheduled.train(), 32, 0.0)
    torch.testing.assert_close(scheduled.encode_images(images), plain.encode_images(images))
    set_training_input(scheduled, 32, 0.5)
    assert not torch.allclose(scheduled.encode_images(images), plain.encode_images(images))


def _update(keep_graphs: int) -> Tensor:
    model = _model(ImageConfig(name="test_vit", size=32, size_schedule=SCHEDULE, patch_drop=0.5))
    set_training_input(model, 16, 0.5)
    engine = PlainEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    images, tokens = tiny_batch(8, 0)
    pairs = zip(images.split(2), tokens.split(2), strict=True)
    torch.manual_seed(0)
    chunks = [model.prepare(images=i, tokens=t) for i, t in pairs]
    train_step(engine, GlobalLoss("info_nce"), chunks, keep_graphs=keep_graphs)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_caching_is_exact_with_dropped_patches() -> None:
    assert torch.equal(_update(keep_graphs=0), _update(keep_graphs=4))


def test_positions_are_fitted_to_another_size_and_kept_at_their_own() -> None:
    image = ImageConfig(name="test_vit", size=32)
    before = _model(image).state_dict()
    same = fit_positions(before, _model(image))
    assert all(same[name] is before[name] for name in before)
    other = _model(replace(image, size=48), max_tokens=12)
    fitted = fit_positions(before, other)
    other.load_state_dict(fitted)
    name = "image.trunk.backbone.pos_embed"
    grid = other.state_dict()[name].shape[1]
    prefix = 1 if int(grid**0.5) ** 2 != grid else 0
    expected = resample_abs_pos_embed(before[name], [3, 3], num_prefix_tokens=prefix)
    assert torch.equal(fitted[name], expected)
    rows = fitted["text.trunk.positions.weight"]
    old = before["text.trunk.positions.weight"]
    assert rows.shape == (12, 64)
    torch.testing.assert_close(rows[[0, -1]], old[[0, -1]])
    shorter = fit_positions(before, _model(image, max_tokens=5))
    assert torch.equal(shorter["text.trunk.positions.weight"], old[:5])


def test_the_batches_are_those_of_a_run_without_a_schedule(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": 32}, captions=1)
    image = ImageConfig(name="test_vit", size=32)
    found = []
    for trunk in (image, replace(image, size_schedule=SCHEDULE, patch_drop=0.5)):
        data = DataConfig(index=str(tmp_path), num_workers=0)
        config = TrainConfig(global_batch_size=16, data=data, model=ModelConfig(image=trunk))
        words, sets = WordTokenizer(["a"], 8), open_train_sets(data)
        batches = build_train_batches(config, sets, words, Progress(0, 0, []))
        found.append([next(batches) for _ in range(2)])
    for plain, scheduled in zip(*found, strict=True):
        assert torch.equal(plain.image_ids, scheduled.image_ids)
        assert torch.equal(plain.images, scheduled.images)


@pytest.mark.slow
def test_a_run_goes_through_its_sizes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16})
    more = ["model.image.size_schedule=[[0,16],[0.5,32]]", "model.image.patch_drop=0.25"]
    more += ["total_samples=128", "log_every=1", "model.image.patch_drop_until=0.5"]
    overrides = settings(tmp_path / "shards", tmp_path / "run", *more)
    assert run_distributed(run, 1, overrides) == [0]
    assert len(read_losses(tmp_path / "run")) == 4
