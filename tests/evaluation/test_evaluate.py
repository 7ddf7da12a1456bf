"""Evaluation with a small real model over real shards, on one rank and on several."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_vse import cli, distributed
from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig
from dist_vse.data.eval_stream import EvalBatch, captions, eval_batches
from dist_vse.data.index import read_index
from dist_vse.data.samples import Placement
from dist_vse.evaluation.evaluate import Embedded, Evaluation, embed, evaluate, score
from dist_vse.evaluation.retrieval import PROTOCOLS, retrieval_metrics, tasks_of
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary
from tests.support.datasets import draw, write_dataset
from tests.support.distributed import run_distributed

CPU = torch.device("cpu")


class TinyEncoders(nn.Module):
    """Two linear towers with all that differs between training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 16))
        self.norm = nn.BatchNorm1d(16).eval()  # stays in eval mode, as a frozen trunk does
        self.words = nn.EmbeddingBag(100, 16, mode="sum", padding_idx=0)
        self.dropout = nn.Dropout(0.5)
        self.most_texts = 0

    def encode_images(self, images: Tensor) -> Tensor:
        features = self.norm(self.image(images.float() / 255))
        return nn.functional.normalize(self.dropout(features), dim=1)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        self.most_texts = max(self.most_texts, len(tokens))
        return nn.functional.normalize(self.dropout(self.words(tokens)), dim=1)


def run_evaluation(root: Path, model: TinyEncoders, batch_size: int = 4) -> Evaluation:
    index = read_index(root)
    tokenizer = WordTokenizer(build_vocabulary(captions(index, "val"), 1), 16)
    batches = eval_batches(
        index,
        "val",
        tokenizer,
        ImageConfig(size=32),
        batch_size=batch_size,
        placement=Placement(distributed.rank(), distributed.world_size()),
    )
    return evaluate(model, batches, CPU)


def evaluate_root(root: Path) -> Evaluation:
    return run_evaluation(root, TinyEncoders())


def evaluate_diverged(root: Path) -> str:
    model = TinyEncoders()
    nn.init.constant_(model.words.weight, float("nan"))
    with pytest.raises(UserError) as caught:
        run_evaluation(root, model)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "world_size"), [(22, 2), (22, 3), (2, 3)])
def test_ranks_agree_with_one_process(tmp_path: Path, num_images: int, world_size: int) -> None:
    write_dataset(tmp_path, {"val": num_images}, captions=3)  # 2 images: a rank has none
    alone = evaluate_root(tmp_path)
    assert alone.metrics["num_images"] == len(alone.split.keys) == num_images
    for got in run_distributed(evaluate_root, world_size, tmp_path):
        assert got.metrics == alone.metrics
        assert got.split.keys == alone.split.keys
        assert got.split.captions == alone.split.captions
        assert got.split.image_of_text.equal(alone.split.image_of_text)
        torch.testing.assert_close(got.split.image_features, alone.split.image_features)
        torch.testing.assert_close(got.split.text_features, alone.split.text_features)


def test_scores_the_features_of_eval_mode(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"val": [5, 6]}, captions=3)
    model = TinyEncoders().train()
    model.norm.eval()
    model.most_texts = 0
    got = run_evaluation(tmp_path, model)

    assert model.training and model.dropout.training and not model.norm.training
    assert model.most_texts == 4  # never more texts at once than a batch has images
    assert not got.split.text_features.requires_grad
    assert got.split.image_of_text.tolist() == [row for row in range(11) for _ in range(3)]
    assert got.split.keys[5] == "val000005"
    tokenizer = WordTokenizer(build_vocabulary(captions(read_index(tmp_path), "val"), 1), 16)
    whole = model.eval().encode_texts(tokenizer(got.split.captions))
    torch.testing.assert_close(got.split.text_features, whole.detach())
    found = got.split
    direct = retrieval_metrics(found.image_features, found.text_features, found.image_of_text)
    assert got.metrics == direct | {"num_images": 11, "num_texts": 33}


def test_features_that_are_not_finite_end_every_rank_alike(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"val": 6})
    first, second = run_distributed(evaluate_diverged, 2, tmp_path)
    assert first == second
    assert "text features are not finite: 12 of 12 rows" in first


def test_warns_of_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path, {"val": 6})
    model = TinyEncoders()
    nn.init.zeros_(model.image[-1].get_parameter("weight"))
    got = run_evaluation(tmp_path, model)
    assert "image features are all alike" in caplog.text
    assert got.metrics["t2i_r1"] == pytest.approx(100 / 6)


def score_collapsed() -> str:
    images = nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    names = [f"k{i}" for i in range(6)], [f"text {i}" for i in range(6)]
    split = Embedded(*names, images, images[:1].repeat(6, 1), *[torch.arange(6)] * 3)
    assert score(split, CPU).metrics["t2i_r1"] == pytest.approx(100 / 6)  # allowed
    with pytest.raises(UserError) as caught:
        score(split, CPU, allow_collapse=False)
    return str(caught.value)


def test_collapse_can_be_an_error_on_every_rank_alike() -> None:
    first, second = run_distributed(score_collapsed, 2)
    assert first == second
    assert "the text features are all alike" in first and "\n" not in first


def test_coco_1k_takes_consecutive_images_of_karpathys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the shards that we make of it; with 20 images where COCO has 5,000."""
    monkeypatch.setitem(PROTOCOLS, "coco-1k", (20, 5))
    draw(0).save(tmp_path / "image.png")
    images = []
    for number in range(60):
        name = f"{number * 7919 % 61:02}.png"  # in no order of names
        os.link(tmp_path / "image.png", tmp_path / name)
        sentences = [{"raw": f"a red square {number} {caption}"} for caption in range(5)]
        split = ("train", "restval", "test")[number % 3]
        images.append({"filename": name, "split": split, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    source = ["karpathy", str(tmp_path / "dataset_coco.json"), str(tmp_path / "out")]
    assert cli.main(["shard", *source, "--shard-size", "7", "--seed", "3"]) == 0

    index = read_index(tmp_path / "out")
    tokenizer = WordTokenizer(build_vocabulary(captions(index, "train"), 1), 16)
    batches = eval_batches(index, "test", tokenizer, ImageConfig(size=32), batch_size=4)
    found = embed(TinyEncoders(), batches, CPU)
    folds = tasks_of("coco-1k", found.image_of_text, found.image_ids, found.text_ids)
    of_file = [image["filename"].removesuffix(".png") for image in images[2::3]]
    assert [found.keys[fold.images] for fold in folds] == [
        of_file[start : start + 4] for start in range(0, 20, 4)
    ]
    for fold in folds:
        texts = {found.captions[row] for row in fold.texts.tolist()}
        own = images[2::3][fold.images]
        assert texts == {sentence["raw"] for image in own for sentence in image["sentences"]}


def test_nothing_to_evaluate() -> None:
    none: list[EvalBatch] = []
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(TinyEncoders(), none, CPU)


def score_many() -> Evaluation:
    """Score 2,500 images of two captions, some of them equal, with a few ties."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(5000) // 2
    images = nn.functional.normalize(torch.randn(2500, 32, generator=generator))
    texts = images[rows] + 0.15 * torch.randn(5000, 32, generator=generator)
    images[40], texts[99] = images[7], texts[3]
    texts = nn.functional.normalize(texts)
    names = [f"k{i}" for i in range(2500)], [f"text {j}" for j in range(5000)]
    ids = torch.arange(2500) % 2400, torch.arange(5000) % 4990
    return score(Embedded(*names, images, texts, rows, *ids), CPU, recalls=(1, 3), bootstrap=50)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_are_equal_to_the_bit_on_any_number_of_ranks(world_size: int) -> None:
    alone = score_many()
    assert alone.metrics["i2t_r3"] > alone.metrics["i2t_r1"] > 50
    assert alone.metrics["tied"] > 0
    for got in run_distributed(score_many, world_size):
        assert got.metrics == alone.metrics
        assert got.chance == alone.chance
        assert got.intervals == alone.intervals
        assert got.image_ranks.equal(alone.image_ranks)
        assert got.text_ranks.equal(alone.text_ranks)
