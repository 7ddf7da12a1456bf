"""Embeddings in int8 and in bits: what they find, compared with float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_vse.common.errors import UserError
from dist_vse.evaluation.evaluate import Embedded
from dist_vse.evaluation.retrieval import top_k
from dist_vse.evaluation.width import AtWidth, check_width
from dist_vse.tools.search.codes import (
    Bits,
    Int8Codes,
    binary_top_k,
    coded,
    int8_top_k,
    measured_recall,
)
from dist_vse.tools.search.embed import check_suffix, write_embeddings
from dist_vse.tools.search.gallery import read_gallery


def _split(images: int = 600, width: int = 64) -> Embedded:
    """Draw captions near their images, in few directions; the two kinds lie apart, as real ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, images, 24, generator=generator)
    hidden[1] = 0.6 * hidden[1] + hidden[0]
    made = hidden @ torch.randn(24, width, generator=generator) / 5
    made[0, :, 0] += 3
    made[1, :, 1] += 3
    features = normalize(made, dim=2)
    names = [str(number) for number in range(images)]
    numbers = [torch.arange(images) for _ in range(3)]
    return Embedded(names, names, features[0].clone(), features[1].clone(), *numbers)


def _recall(found: Tensor, exact: Tensor) -> float:
    both = zip(found.tolist(), exact.tolist(), strict=True)
    return sum(len({*a} & {*b}) for a, b in both) / exact.numel()


def test_int8_is_off_by_half_a_step() -> None:
    features = _split().image_features
    codes = Int8Codes.of(features)
    error = (codes.rows(slice(None)) - features).abs()
    assert bool((error <= codes.step * 0.5001).all()) and codes.numbers.dtype == torch.int8
    same = Int8Codes.of(features[:1].expand(3, -1))  # a dimension without a range
    torch.testing.assert_close(same.rows(slice(None)), features[:1].expand(3, -1))


def test_bits_count_what_differs() -> None:
    features = _split(width=13).image_features
    bits = Bits.of(features)
    assert bits.packed.shape == (600, 2)
    signs = torch.where(features > features.mean(0), 1.0, -1.0)
    torch.testing.assert_close(bits.signs(slice(5, 90)), signs[5:90])


def test_codes_find_nearly_what_float32_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    split = _split(width=384)
    queries, gallery = split.text_features[:100], split.image_features
    _, exact = top_k(queries, gallery, 10)
    codes, bits = Int8Codes.of(gallery), Bits.of(gallery)
    centers = split.text_features.mean(0).expand_as(queries)
    for tile in (4096, 100):  # the tiles change nothing
        monkeypatch.setattr("dist_vse.tools.search.codes.TILE", tile)
        scores, rows = int8_top_k(queries, codes, 10)
        decoded, best = top_k(queries, codes.rows(slice(None)), 10)
        assert torch.equal(rows, best) and torch.allclose(scores, decoded)
        assert _recall(rows, exact) > 0.98
        scores, rows = binary_top_k(queries, centers, bits, codes, 10)
        assert _recall(rows, exact) > 0.9 and bool((scores.diff() <= 0).all())
    assert measured_recall(split, "int8").startswith(("99.", "98."))
    assert "(600 captions, 600 images)" in measured_recall(split, "binary")


def test_a_search_in_a_file_of_codes(tmp_path: Path) -> None:
    split, origin = _split(width=384), {"weights": "w", "data": "d", "split": "s"}
    for precision, least in (("int8", 0.98), ("binary", 0.9)):
        path = tmp_path / f"{precision}.safetensors"
        write_embeddings(split, path, origin, precision=precision)
        gallery = read_gallery(path, origin)
        assert gallery.width == 384 and gallery.at_width(384) is gallery
        by_text, by_image = split.text_features[:50], split.image_features[:50]
        _, rows = gallery.search_codes(by_text, by_image, 10)
        exact = top_k(torch.cat([by_text, by_image]), split.image_features, 10)[1]
        assert _recall(rows, exact) > least and torch.equal(rows[50:, 0], torch.arange(50))
        with pytest.raises(UserError, match=r"--width \(8\) does not fit the index"):
            gallery.at_width(8)
    whole = (split.image_features.nbytes + split.text_features.nbytes) // 4
    stored = coded(split, "int8")
    assert sum(stored[f"{kind}_features"].nbytes for kind in ("image", "text")) == whole
    with pytest.raises(UserError, match=r"--precision int8 is written as \.safetensors only"):
        check_suffix(tmp_path / "x.npy", "int8")


def test_a_width_cuts_and_normalises() -> None:
    split = _split(4)

    class Model:
        def encode_images(self, images: Tensor) -> Tensor:
            return split.image_features

        encode_texts = encode_images

    cut = AtWidth(Model(), 5).encode_texts(torch.empty(0))  # type: ignore[arg-type]
    torch.testing.assert_close(cut, normalize(split.image_features[:, :5], dim=1))
    assert AtWidth(Model(), None).encode_images(torch.empty(0)) is split.image_features  # type: ignore[arg-type]
    check_width(64, 64)
    for width in (0, 65):
        with pytest.raises(UserError, match="must be from 1 to 64"):
            check_width(width, 64)
