"""CLIP and SigLIP checkpoints as starting points, against the libraries that they come from."""

import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import dist_vse
from dist_vse import train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.data.decode import Transform, decode_image
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.pretrained import pretrained_tokenizer, read_start, save_pretrained
from dist_vse.runs.resolve import with_start
from dist_vse.runs.trained import open_trained
from dist_vse.tools.export.write import export_run
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, read_losses
from tests.support.tiny_clip import KINDS, LENGTH, SIDE, build, starting_from, write_all

CAPTIONS = ["a red square on green", "circle", "a blue cross on a yellow square " * 4]
IDS = ["-".join(kind) for kind in KINDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("checkpoints"))


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def original(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the library's own unit features of the pixels and the captions."""
    images = pixels()
    if (folder / "config.json").is_file():
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(folder).eval()
        processor, tokenizer = (
            c.from_pretrained(folder) for c in (AutoImageProcessor, AutoTokenizer)
        )
        padding = "max_length" if model.config.model_type == "siglip" else True
        tokens = tokenizer(CAPTIONS, padding=padding, truncation=True, return_tensors="pt")
        if model.config.model_type == "siglip":  # made without a mask
            tokens = {"input_ids": tokens["input_ids"]}
        tokens.pop("token_type_ids", None)
        found = (
            model.get_image_features(**processor(list(images), return_tensors="pt")),
            model.get_text_features(**tokens),
        )
        features = [getattr(x, "pooler_output", x) for x in found]
    else:
        import open_clip

        name = f"local-dir:{folder}"
        model, _, transform = open_clip.create_model_and_transforms(name)
        model.eval()
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
        features = [
            model.encode_image(torch.stack([transform(picture) for picture in pictures])),
            model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS)),
        ]
    return normalize(features[0], dim=1), normalize(features[1], dim=1)


def ours(model: DualEncoder, folder: Path) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        tokens = pretrained_tokenizer(str(folder))(CAPTIONS)
        return model.encode_images(pixels()), model.encode_texts(tokens)


@pytest.mark.parametrize(("library", "kind"), KINDS, ids=IDS)
def test_features_are_those_of_the_library(folders: Path, library: str, kind: str) -> None:
    folder = folders / f"{library}-{kind}"
    model = build(folder)
    for got, want in zip(ours(model, folder), original(folder), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert (want @ want.T)[0, 1] < 0.99  # or anything would be equal
    assert model.log_scale.item() == 3.25
    assert model.bias.item() == (-7.5 if kind == "siglip" else -10.0)


@pytest.mark.parametrize(("library", "kind"), KINDS, ids=IDS)
def test_a_checkpoint_decides_the_shape(folders: Path, library: str, kind: str) -> None:
    config = starting_from(folders / f"{library}-{kind}")
    assert config.model.image.size == SIDE and config.model.text.max_tokens == LENGTH
    assert config.model.embed_dim == (32 if (library, kind) == ("hf", "siglip") else 16)
    assert config.model.image.squash == (kind == "siglip")
    bilinear = (library, kind) == ("open_clip", "siglip")
    assert config.model.image.resampling == ("bilinear" if bilinear else "bicubic")
    assert config.loss.temperature == pytest.approx(math.exp(-3.25))
    assert with_start(config) == config
    assert starting_from(folders / f"{library}-{kind}").model.image.frozen is False


def test_a_learned_temperature_starts_within_its_bound(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "open_clip-clip", tmp_path / "steep")
    state = torch.load(folder / "open_clip_pytorch_model.bin")
    torch.save(state | {"logit_scale": torch.tensor(5.0)}, folder / "open_clip_pytorch_model.bin")
    assert read_start(str(folder)).temperature == pytest.approx(math.exp(-5))
    assert starting_from(folder, "loss.learn_temperature=true").loss.temperature == 0.01


@pytest.mark.parametrize(("library", "kind"), KINDS, ids=IDS)
def test_workers_get_the_tokenizer(folders: Path, library: str, kind: str) -> None:
    tokenizer = pretrained_tokenizer(str(folders / f"{library}-{kind}"))
    again = pickle.loads(pickle.dumps(tokenizer))
    tokens = again(CAPTIONS)
    assert torch.equal(tokens, tokenizer(CAPTIONS)) and tokens.dtype == torch.int64
    assert tokens.shape == (3, LENGTH) and int(tokens.max()) < tokenizer.vocab_size
    short = tokenizer(["circle"]).shape[1]
    assert short == (3 if (library, kind) == ("hf", "clip") else LENGTH)  # padded or not
    with pytest.raises(UserError, match="is empty"):
        tokenizer(["a", " "])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_preprocessing_is_the_libraries(folders: Path, kind: str) -> None:
    import open_clip

    folder = folders / f"open_clip-{kind}"
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    picture = Image.fromarray(noise).resize((54, 36), Image.Resampling.BICUBIC)
    want = transform(picture).mul(0.4).add(0.5).mul(255)
    start = read_start(str(folder))
    path = folder / "picture.png"
    picture.save(path)
    square = Transform(start.image_size, squash=start.squash, resampling=start.resampling)
    got = torch.from_numpy(decode_image(path.read_bytes(), square).astype(np.float32))
    # OpenCLIP resizes to whole pixels and cuts then; we cut fractions of a pixel.
    assert (got - want).abs().mean() < 1.5
    other = Transform(SIDE, squash=not start.squash, resampling=start.resampling)
    wrong = torch.from_numpy(decode_image(path.read_bytes(), other).astype(np.float32))
    assert (wrong - want).abs().mean() > 10


def learn(folder: Path, start: str, *overrides: str) -> None:
    config = load_config(CONFIG)
    given = [
        f"model.pretrained={folder / start}",
        f"data.index={folder / 'shards'}",
        f"output_dir={folder / 'run'}",
        *("global_batch_size=16", "chunk_size=4", "total_steps=3", "engine.zero_stage=3"),
        *("optim.lr=1e-4", "loss.name=siglip", "loss.learn_temperature=true", "log_every=1"),
        f"data.num_streams={config.data.num_streams}",
        *overrides,
    ]
    assert train.run(load_config(None, given)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("start", ["hf-clip", "open_clip-siglip"])
def test_trains_under_zero_3_and_exports(folders: Path, tmp_path: Path, start: str) -> None:
    """Two ranks with two chunks each, and an unequal share of the evaluation."""
    shutil.copytree(folders / start, tmp_path / start)
    write_dataset(tmp_path / "shards", {"train": [40, 24], "val": [12]})
    run_distributed(learn, 2, tmp_path, start)
    run = tmp_path / "run"
    losses = read_losses(run)
    assert len(losses) == 3 and losses[-1] < losses[0]

    trained = open_trained(run).model
    begun = dict(build(tmp_path / start).named_parameters())
    changed = [not torch.equal(x, begun[name]) for name, x in trained.named_parameters()]
    assert sum(changed) > 0.9 * len(changed)  # both towers learn

    out = export_run(run, tmp_path / "out", onnx=False)
    (tmp_path / start).rename(tmp_path / "gone")  # the export needs nothing else
    loaded = dist_vse.load(out)
    found = ours(loaded.model, out / "model")
    assert all(map(torch.equal, found, ours(trained.eval(), out / "model")))
    assert torch.equal(loaded.encode_texts(CAPTIONS), found[1])


@pytest.mark.parametrize(("library", "kind"), KINDS, ids=IDS)
def test_what_is_saved_loads_with_the_library_alone(
    folders: Path, tmp_path: Path, library: str, kind: str
) -> None:
    start, out = folders / f"{library}-{kind}", tmp_path / "out"
    model = build(start)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert save_pretrained(model, str(start), out) == {"hf": "transformers"}.get(
        library, "OpenCLIP"
    )
    for got, want in zip(original(out), ours(model, start), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    again = build(out)
    assert all(map(torch.equal, ours(again, out), ours(model, start)))
    assert not torch.equal(ours(again, out)[0], ours(build(start), start)[0])
    assert again.log_scale.item() == pytest.approx(model.log_scale.item(), rel=1e-6)
    if kind == "siglip":
        assert torch.equal(again.bias, model.bias)
