"""CLIP and SigLIP checkpoints at other sizes of images and captions than their own."""

from pathlib import Path

import open_clip
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from transformers import CLIPModel

from dist_vse import load
from dist_vse.common.errors import UserError
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.layers import is_position
from dist_vse.tools.export.write import export_run
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import run, settings
from tests.support.tiny_clip import KINDS, LENGTH, SIDE, build, write_all

SIZE, LONGER = 48, 16
OTHER = (f"model.image.size={SIZE}", f"model.text.max_tokens={LONGER}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("checkpoints"))


def _features(model: DualEncoder, size: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(4, 11, (3, length), generator=generator)
    tokens[:, -1] = 2
    with torch.no_grad():
        return model.encode_images(images), model.encode_texts(tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "kind"), KINDS)
def test_positions_are_resampled_and_all_else_stays(folders: Path, library: str, kind: str) -> None:
    folder = folders / f"{library}-{kind}"
    own = build(folder)
    named = build(folder, f"model.image.size={SIDE}", f"model.text.max_tokens={LENGTH}")
    for one, other in zip(
        _features(own, SIDE, LENGTH), _features(named, SIDE, LENGTH), strict=True
    ):
        assert torch.equal(one, other)
    fitted = build(folder, *OTHER)
    assert all(x.isfinite().all() for x in _features(fitted, SIZE, LONGER))
    before, resampled = dict(own.named_parameters()), set()
    for name, parameter in fitted.named_parameters():
        if parameter.shape == before[name].shape:
            assert torch.equal(parameter, before[name]), name
            continue
        resampled.add(name.split(".")[0])
        assert is_position(name)
        theirs = before[name]
        if name.startswith("image"):
            prefix = parameter.shape[-2] - (SIZE // 8) ** 2
            grid = resample_abs_pos_embed(theirs[None], [6, 6], num_prefix_tokens=prefix)
            assert torch.equal(parameter, grid[0])
            if library == "open_clip":  # which resamples on its own
                whole = open_clip.create_model(f"local-dir:{folder}", force_image_size=SIZE)
                torch.testing.assert_close(whole.visual.positional_embedding, parameter)
        else:
            torch.testing.assert_close(parameter[[0, -1]], theirs[[0, -1]])
    assert resampled == {"image", "text"}


@pytest.mark.slow
def test_a_side_that_is_no_number_of_patches_is_refused(folders: Path) -> None:
    with pytest.raises(UserError, match=r"model.image.size \(44\) must be .*nearest: 40, 48"):
        build(folders / "hf-clip", "model.image.size=44")


def _train(runs: list[list[str]]) -> list[int | str]:
    return [run(overrides) for overrides in runs]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_run_at_another_size_is_exported_at_that_size(folders: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16}, captions=2)
    names = ("hf-clip", "hf-siglip", "open_clip-siglip")
    defaults = ["model.image.name=resnet18", "model.text.kind=transformer", "model.embed_dim=256"]
    more = [*defaults, "total_steps=1", "loss.name=info_nce", *OTHER]
    runs = [
        settings(tmp_path / "shards", tmp_path / name, f"model.pretrained={folders / name}", *more)
        for name in names
    ]
    assert run_distributed(_train, 1, runs, timeout=100) == [[0] * len(names)]
    for name in names:
        out = export_run(tmp_path / name, tmp_path / f"{name}-out")
        exported = load(out)
        assert exported.shape.image.size == SIZE
        assert exported.tokenizer(["a red square on a " * 8]).shape[1] == LONGER
        images, texts = _features(exported.model, SIZE, LONGER)
        if name == "hf-clip":
            whole = CLIPModel.from_pretrained(out / "model", local_files_only=True)
            assert whole.config.vision_config.image_size == SIZE
            assert whole.config.text_config.max_position_embeddings == LONGER
        assert images.isfinite().all() and texts.isfinite().all()
