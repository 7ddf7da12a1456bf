"""The examples of an evaluation: best answers, extremes, ties and galleries, by the seed alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_vse.evaluation.evaluate import Embedded, Evaluation, score
from dist_vse.evaluation.examples import save_examples
from dist_vse.evaluation.retrieval import PROTOCOLS, chance, own_pairs

CPU = torch.device("cpu")


@pytest.fixture
def ranked() -> Evaluation:
    """Four images on a circle; image i's texts 2i and 2i + 1, the last image's placed badly."""
    angles = torch.tensor([0.0, 90.0, 180.0, 270.0]).deg2rad()
    images = torch.stack([angles.cos(), angles.sin()], 1)
    of_text = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    turned = torch.tensor([0, 10, 90, 100, 180, 190, 5, 15]).deg2rad()
    texts = torch.stack([turned.cos(), turned.sin()], 1)
    return score_of(images, texts, of_text)


def score_of(images: Tensor, texts: Tensor, of_text: Tensor) -> Evaluation:
    """Score features under names of their rows."""
    keys, captions = [f"k{i}" for i in range(len(images))], [f"text {j}" for j in range(len(texts))]
    ids = torch.arange(len(images)), torch.arange(len(texts))
    return score(Embedded(keys, captions, images, texts, of_text, *ids), CPU)


def test_examples_hold_the_best_answers_and_the_right_one(
    tmp_path: Path, ranked: Evaluation
) -> None:
    save_examples(ranked, tmp_path / "examples.json", split="val", num_queries=9, k=2)
    content = json.loads((tmp_path / "examples.json").read_text())
    assert content["split"] == "val"
    assert content["metrics"] == ranked.metrics
    assert content["chance"] == chance(own_pairs(ranked.split.image_of_text), 4, 8)
    by_key = {query["key"]: query for query in content["text_to_image"]}
    assert sorted(by_key) == ["k0", "k1", "k2", "k3"]
    assert by_key["k1"]["rank"] == 1
    assert by_key["k1"]["answers"][0] == {
        "key": "k1",
        "score": pytest.approx(1, abs=0.02),
        "right": True,
    }
    assert by_key["k3"]["rank"] == 3  # its text lies by image 0
    assert [answer["right"] for answer in by_key["k3"]["answers"]] == [False, False]
    near = content["neighbours"]  # on a circle: two at 90 degrees, then the one behind
    assert [other["key"] for other in near["k1"]] == ["k0", "k2", "k3"]
    assert [other["score"] for other in near["k1"]] == pytest.approx([0, 0, -1], abs=1e-4)
    pictures = {query["key"]: query for query in content["image_to_text"]}
    assert pictures["k2"]["rank"] == 1
    assert {answer["caption"] for answer in pictures["k2"]["answers"]} == {"text 4", "text 5"}
    assert pictures["k0"]["answers"][1] == {
        "caption": "text 6",
        "score": pytest.approx(0.9962),
        "right": False,
    }


def test_examples_of_the_best_and_the_worst(tmp_path: Path, ranked: Evaluation) -> None:
    save_examples(ranked, tmp_path / "examples.json", split="val", num_extremes=2)
    content = json.loads((tmp_path / "examples.json").read_text())
    ranks = {query["caption"]: query["rank"] for query in content["text_to_image_worst"]}
    assert ranks == {"text 6": 3, "text 7": 3}
    assert [query["rank"] for query in content["text_to_image_best"]] == [1, 1]
    assert [query["key"] for query in content["image_to_text_worst"]] == ["k3"]


def test_examples_give_the_ranks_of_the_evaluation_ties_included(tmp_path: Path) -> None:
    images = torch.eye(4)
    images[1] = images[0]  # the captions of both images tie
    got = score_of(images, images.clone(), torch.arange(4))
    save_examples(got, tmp_path / "examples.json", split="val", num_queries=4)
    content = json.loads((tmp_path / "examples.json").read_text())
    for way in ("text_to_image", "image_to_text"):
        ranks = {query["key"]: query["rank"] for query in content[way]}
        assert ranks == {"k0": 1.5, "k1": 1.5, "k2": 1, "k3": 1}
        assert {query["key"] for query in content[f"{way}_worst"]} == {"k0", "k1"}


def test_examples_are_of_the_protocols_galleries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folds of three images; of six captions an image the last is left out."""
    monkeypatch.setitem(PROTOCOLS, "coco-1k", (6, 2))
    images, rows = torch.eye(6), torch.arange(6).repeat_interleave(6)
    texts = nn.functional.normalize(images[rows] + 0.5 * images[(rows + 3) % 6])
    texts[0] = images[1]  # the caption of another image in its fold
    names = [f"k{i}" for i in range(6)], [f"text {j}" for j in range(36)]
    equal = torch.zeros(36, dtype=torch.int64)  # by content all captions would be right
    split = Embedded(*names, images, texts, rows, torch.arange(6), equal)
    got = score(split, CPU, protocol="coco-1k")
    for seed in range(3):
        save_examples(got, tmp_path / "examples.json", split="test", k=9, seed=seed)
        content = json.loads((tmp_path / "examples.json").read_text())
        for query in content["text_to_image"] + content["text_to_image_worst"]:
            text = int(query["caption"].removeprefix("text "))
            assert text % 6 != 5
            assert query["rank"] == got.text_ranks[text] == (2.5 if text == 0 else 1)
            fold = ["k0", "k1", "k2"] if text < 18 else ["k3", "k4", "k5"]
            assert sorted(answer["key"] for answer in query["answers"]) == fold
            assert [a["key"] == query["key"] for a in query["answers"]] == [
                a["right"] for a in query["answers"]
            ]
        for query in content["image_to_text"]:
            image = int(query["key"].removeprefix("k"))
            asked = {int(a["caption"].removeprefix("text ")): a["right"] for a in query["answers"]}
            assert len(asked) == 9 and all((t // 6 == image) == asked[t] for t in asked)
            assert all(t // 18 == image // 3 and t % 6 != 5 for t in asked)


def test_examples_depend_on_the_seed_alone(tmp_path: Path, ranked: Evaluation) -> None:
    def saved(seed: int) -> bytes:
        path = tmp_path / "examples.json"
        save_examples(dataclasses.replace(ranked), path, split="val", num_queries=2, seed=seed)
        return path.read_bytes()

    assert saved(0) == saved(0) != saved(1)
    content = json.loads(saved(0))
    asked = [query["key"] for query in content["text_to_image"] + content["image_to_text"]]
    assert sorted(asked) == ["k0", "k1", "k2", "k3"]  # no image twice where there are enough
