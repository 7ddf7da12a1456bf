"""A new encoder is one entry in a table: it trains, is exported, and is loaded again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dist_vse
from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, TextConfig
from dist_vse.config.encoders import IMAGE_ENCODERS, TEXT_ENCODERS, EncoderSpec
from dist_vse.models.build import build_head
from dist_vse.models.image import ImageTrunk
from dist_vse.models.text import TextTrunk
from dist_vse.models.tokenizer import Vocabulary
from dist_vse.runs.trained import open_trained
from dist_vse.tools.export.write import export_run
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import read_losses, run, settings

ENTRY = "tests.models.test_build:{}"


def build_colours(config: ImageConfig, grad_checkpointing: bool) -> ImageTrunk:
    """The image's mean colour, and a layer on it."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    return ImageTrunk(pool, dim=8, mean=(0.5,) * 3, std=(0.5,) * 3)


class BagOfWords(TextTrunk):
    """The mean of the words' vectors."""

    def __init__(self, vocabulary: Vocabulary, dim: int) -> None:
        super().__init__()
        self.dim, self.pad_id = dim, vocabulary.pad_id
        self.words = nn.EmbeddingBag(vocabulary.vocab_size, dim, padding_idx=self.pad_id)

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.words(tokens)
        return features


def build_bag(config: TextConfig, vocabulary: Vocabulary, grad_checkpointing: bool) -> BagOfWords:
    return BagOfWords(vocabulary, config.width)


def learn(shards: Path, run_dir: Path) -> int | str:
    """Train two steps with both, in a process that knows their entries."""
    IMAGE_ENCODERS["colours"] = EncoderSpec(ENTRY.format("build_colours"))
    TEXT_ENCODERS["bag"] = EncoderSpec(ENTRY.format("build_bag"))
    kinds = ["model.image.kind=colours", "model.text.kind=bag", "total_steps=2", "log_every=1"]
    return run(settings(shards, run_dir, *kinds))


def test_a_new_image_encoder_and_a_new_text_encoder_are_an_entry_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "shards", {"train": [40, 24], "val": [8]})
    assert run_distributed(learn, 1, tmp_path / "shards", tmp_path / "run") == [0]
    assert len(read_losses(tmp_path / "run")) == 2
    monkeypatch.setitem(IMAGE_ENCODERS, "colours", EncoderSpec(ENTRY.format("build_colours")))
    monkeypatch.setitem(TEXT_ENCODERS, "bag", EncoderSpec(ENTRY.format("build_bag")))
    trained = open_trained(tmp_path / "run").model.eval()
    assert isinstance(trained.text.trunk, BagOfWords)
    loaded = dist_vse.load(export_run(tmp_path / "run", tmp_path / "out", onnx=False)).model
    tokens = torch.tensor([[1, 4, 5, 2]])
    assert torch.equal(loaded.encode_texts(tokens), trained.encode_texts(tokens))
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    assert torch.equal(loaded.encode_images(images), trained.encode_images(images))


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model\.image\.kind='tim' is unknown; .*'timm'"):
        ImageConfig(kind="tim")
    with pytest.raises(UserError, match=r"model\.text\.kind='grru' is unknown; .*'gru'"):
        replace(TextConfig(), kind="grru")


def test_a_seed_gives_an_mlp_head_the_weights_that_it_always_gave() -> None:
    torch.manual_seed(3)
    head = build_head(6, 4, 5, 0.1)
    torch.manual_seed(3)
    hidden, last = nn.Linear(6, 5), nn.Linear(5, 4)  # both draw before either is drawn again
    for layer in (hidden, last):
        nn.init.xavier_uniform_(layer.weight)
    drawn = [p for p in head.parameters() if p.ndim == 2]
    assert torch.equal(drawn[0], hidden.weight) and torch.equal(drawn[1], last.weight)
    assert not any(p.any() for p in head.parameters() if p.ndim == 1)
