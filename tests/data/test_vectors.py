"""Vectors in the place of images: the file's format, the sources' layout, a whole training."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_vse.cli import main
from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, TextConfig, load_config
from dist_vse.data.decode import BadSampleError, Transform, decode_image
from dist_vse.data.vectors import check_vector, vector_file
from dist_vse.models.vectors import CAPTIONS, VECTORS, CaptionTokenizer, build_caption_vectors
from dist_vse.shards.sample_checks import check_image
from dist_vse.shards.sources.precomp import read_precomp
from tests.support.datasets import draw, encode
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, read_losses, run, settings

Array = NDArray[np.float32]


def _draw(rows: int, numbers: int = 6) -> Array:
    return np.random.default_rng(0).standard_normal((rows, numbers)).astype(np.float32)


def _write(folder: Path, name: str, array: Array, captions: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{name}_ims.npy", array)
    (folder / f"{name}_caps.txt").write_text("".join(f"{c}\n" for c in captions))


def test_a_vectors_file_is_numpys_own() -> None:
    for numbers in (1, 6, 2048):
        row = _draw(1, numbers)[0]
        file = vector_file(row.tobytes())
        assert np.array_equal(np.load(io.BytesIO(file)), row)
        saved = io.BytesIO()
        np.save(saved, row)
        for data in (file, saved.getvalue()):
            assert check_image(data) == "npy" and check_vector(data) == numbers
            assert np.array_equal(decode_image(data, Transform(numbers, vector=True)), row)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (vector_file(_draw(1).tobytes())[:-1], "cut"),
        (vector_file(_draw(1).tobytes())[:9], "cut"),
        (vector_file(np.float32([1, np.nan]).tobytes()), "not finite"),
        (vector_file(_draw(1).tobytes()).replace(b"<f4", b"<f8"), "holds <f8"),
        (vector_file(_draw(1).tobytes()).replace(b"(6,)", b"(2,3"), "broken"),
    ],
)
def test_a_broken_vector_is_a_bad_sample(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_vector(data)
    with pytest.raises(BadSampleError, match=reason):
        decode_image(data, Transform(2 if "finite" in reason else 6, vector=True))


def test_images_and_vectors_are_not_mistaken_for_each_other() -> None:
    vector, image = vector_file(_draw(1).tobytes()), encode(draw(0))
    with pytest.raises(BadSampleError, match=r"set model\.image\.kind=vectors"):
        decode_image(vector, Transform(8))
    with pytest.raises(BadSampleError, match="an image and no vector"):
        decode_image(image, Transform(6, vector=True))
    with pytest.raises(BadSampleError, match=r"vector of 6 numbers, and model.image.size is 5"):
        decode_image(vector, Transform(5, vector=True))


def test_precomp_reads_rows_of_images_and_rows_of_captions(tmp_path: Path) -> None:
    array, captions = _draw(2), [f"caption {i}" for i in range(10)]
    _write(tmp_path, "dev", array, captions)
    _write(tmp_path, "test", np.repeat(array, 5, axis=0), captions)  # a row for every caption
    found = [*read_precomp(tmp_path, scratch=tmp_path)]
    assert [record.split for record in found] == ["val", "val", "test", "test"]
    assert [record.captions for record in found] == [(*captions[:5],), (*captions[5:],)] * 2
    assert [record.key for record in found][::2] == ["dev-000000", "test-000000"]


def test_precomp_says_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train_ims\.npy, dev_ims\.npy or test_ims\.npy"):
        next(read_precomp(tmp_path))
    _write(tmp_path, "dev", _draw(2), ["a", "b", "c"])
    with pytest.raises(UserError, match=r"has 2 rows, and dev_caps\.txt 3 captions"):
        next(read_precomp(tmp_path, scratch=tmp_path))
    np.save(tmp_path / "dev_ims.npy", np.zeros((3, 36, 8), np.float32))  # SCAN's regions
    with pytest.raises(UserError, match=r"average the regions"):
        next(read_precomp(tmp_path, scratch=tmp_path))


def test_a_caption_without_a_vector_is_named(tmp_path: Path) -> None:
    (tmp_path / CAPTIONS).write_text("one\ntwo\u2028three\n")
    tokenizer = CaptionTokenizer(tmp_path, 8)
    assert tokenizer(["two\u2028three", "one"]).tolist() == [[1], [0]]
    with pytest.raises(UserError, match="has no caption 'four'"):
        tokenizer(["four"])


def test_vectors_leave_no_encoder_to_set() -> None:
    with pytest.raises(UserError, match="has no encoder: leave out"):
        ImageConfig(kind="vectors", frozen=True)
    with pytest.raises(UserError, match=r"reads no images: leave out data\.flip"):
        load_config(CONFIG, ["model.image.kind=vectors", "data.flip=true"])


@pytest.mark.slow
def test_precomputed_features_train_without_images(tmp_path: Path) -> None:
    """VSE++'s layout, sharded and trained on two ranks with a worker, and evaluated."""
    rows, numbers = {"train": 48, "dev": 10, "test": 10}, 6
    unique: list[str] = []
    for name, count in rows.items():
        captions = [f"{name} picture {i // 5} words {i % 5}" for i in range(5 * count)]
        _write(tmp_path / "precomp", name, _draw(count, numbers), captions)
        unique += captions
    shards, texts = tmp_path / "shards", tmp_path / "texts"
    assert main(["shard", "precomp", str(tmp_path / "precomp"), str(shards)]) == 0
    assert main(["shard", "verify", str(shards)]) == 0
    assert main(["shard", "stats", str(shards)]) == 0
    texts.mkdir()
    (texts / CAPTIONS).write_text("".join(f"{caption}\n" for caption in unique))
    np.save(texts / VECTORS, _draw(len(unique), 12))
    more = ["model.image.kind=vectors", f"model.image.size={numbers}", "log_every=1"]
    more += ["total_steps=4", "global_batch_size=16", "chunk_size=4", "data.captions_per_image=5"]
    stored = [*more, "model.text.kind=vectors", f"model.text.weights={texts}"]
    for name, extra, world_size in (
        ("words", more, 1), ("one", stored, 1), ("two", [*stored, "data.num_workers=1"], 2)
    ):  # fmt: skip
        overrides = settings(shards, tmp_path / name, *extra)
        assert run_distributed(run, world_size, overrides) == [0] * world_size
        assert len(read_losses(tmp_path / name)) == 4
    one, two = (read_losses(tmp_path / name) for name in ("one", "two"))
    assert one[-1] != one[0] and two == pytest.approx(one, abs=1e-5)
    assert torch.isfinite(torch.tensor(one)).all()
    assert main(["eval", str(tmp_path / "two"), "--split", "test"]) == 0
    assert main(["report", str(tmp_path / "two")]) == 0
    assert main(["export", str(tmp_path / "two"), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.array([["a", "b"]] * 3), "holds <U1, no numbers"),
        (np.zeros((3, 2), np.complex64), "holds complex64, no numbers"),
        (np.zeros((3, 0), np.float32), r"an array of shape \(3, 0\)"),
        (np.full((3, 2), 1e300), "rows of finite numbers"),
        (np.zeros(3, np.float32), r"an array of shape \(3,\)"),
    ],
)
def test_vectors_of_captions_are_finite_numbers(
    array: np.ndarray, why: str, tmp_path: Path
) -> None:
    (tmp_path / CAPTIONS).write_text("one\ntwo\n")
    np.save(tmp_path / VECTORS, array)
    config = TextConfig(kind="vectors", weights=str(tmp_path))
    with pytest.raises(UserError, match=why):
        build_caption_vectors(config, CaptionTokenizer(tmp_path, 8), False)


def test_precomp_takes_numbers_alone(tmp_path: Path) -> None:
    _write(tmp_path, "dev", np.array([["a", "b"]] * 2), ["a", "b"])
    with pytest.raises(UserError, match=r"dev_ims\.npy: can't be read \(holds <U1, no numbers"):
        next(read_precomp(tmp_path, scratch=tmp_path))
    (tmp_path / "dev_ims.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"dev_ims\.npy: can't be read"):
        next(read_precomp(tmp_path, scratch=tmp_path))
