"""Image trunks: normalisation, weights from files, sizes, errors."""

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig
from dist_vse.models.image import ImageTrunk, build_image_trunk

torch.set_num_threads(1)


def build(name: str = "test_resnet", *, size: int = 32, weights: Path | None = None) -> ImageTrunk:
    config = ImageConfig(name=name, size=size, weights=str(weights) if weights else None)
    return build_image_trunk(config, grad_checkpointing=False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator()).to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "dim"), [("test_resnet", 96), ("test_vit", 64), ("test_mambaout", 256)]
)
def test_features_have_the_announced_size(name: str, dim: int, images: torch.Tensor) -> None:
    trunk = build(name)
    assert all(module.training for module in trunk.modules())
    assert trunk.dim == dim
    assert trunk(images).shape == (3, dim)
    assert all(p.ndim and p.is_contiguous() for p in trunk.parameters())


def test_uint8_is_normalised_as_timm_says(images: torch.Tensor) -> None:
    trunk = build("test_mambaout").eval()  # mean and std of ImageNet
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalised = (images / 255 - mean) / std
    before = images.clone()
    torch.testing.assert_close(trunk(images), trunk(normalised), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trunk(normalised), trunk.backbone(normalised), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_with_classifier_load(tmp_path: Path, suffix: str, images: torch.Tensor) -> None:
    source = timm.create_model("test_resnet", num_classes=10).eval()
    path = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    if suffix == ".pth":  # the nested form of training scripts
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    trunk = build(weights=path).eval()
    normalised = torch.randn(2, 3, 32, 32)
    expected = source.forward_head(source.forward_features(normalised), pre_logits=True)
    torch.testing.assert_close(trunk(normalised), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_resampled_to_another_size(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=0, img_size=64)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    trunk = build("test_vit", size=32, weights=tmp_path / "vit.pth")
    own, loaded = source.state_dict(), trunk.backbone.state_dict()
    assert own["pos_embed"].shape != loaded["pos_embed"].shape
    assert all(torch.equal(own[key], loaded[key]) for key in own if key != "pos_embed")


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        build(weights=tmp_path / "none.pth")
    path = tmp_path / "weights.pth"
    torch.save(
        {k: v for k, v in state.items() if k != "bn1.weight"} | {"extra": state["fc.bias"]}, path
    )
    with pytest.raises(UserError, match=r"test_resnet \(missing: bn1\.weight; unexpected: extra\)"):
        build(weights=path)
    torch.save(state | {"bn1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"of another shape: bn1\.weight"):
        build(weights=path)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    with pytest.raises(UserError, match=r"missing: .* and \d+ more"):
        build(weights=path)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02]."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unreadable_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not read as weights of test_resnet"):
        build(weights=path)


class MakesAFolder:
    """A pickle of this runs code when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": MakesAFolder(tmp_path / "mark")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds tensors only"):
        build(weights=tmp_path / "weights.pth")
    assert not (tmp_path / "mark").exists()


def test_name_and_size_errors() -> None:
    with pytest.raises(UserError, match=r"'resnet19' is no timm model; did you mean .*resnet18"):
        build("resnet19")
    with pytest.raises(UserError, match=r"'resnet18\.nonsense'.*Invalid pretrained tag"):
        build("resnet18.nonsense")
    with pytest.raises(UserError, match=r"'test_vit'.*model\.image\.size=20: .*divisible by patch"):
        build("test_vit", size=20)
    with pytest.raises(UserError, match=r"'test_coatnet'.*model\.image\.size=40"):
        build("test_coatnet", size=40)


def test_checkpointing_changes_no_gradient() -> None:
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = ImageConfig(name="test_vit", size=32)
        trunk = build_image_trunk(config, grad_checkpointing=checkpointing)
        trunk(images).square().sum().backward()
        grads.append([p.grad for p in trunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
