"""Every odd image has its fate: kept as it is, shrunk to the same picture, or left out by name."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from dist_vse.data.decode import Transform, decode_image
from dist_vse.data.index import read_index
from dist_vse.shards.build.recode import Recode, recode_image
from dist_vse.shards.sample_checks import check_image
from tests.support.datasets import draw, encode
from tests.support.shards import run_shard

SIDE = 96
BOMB = encode(Image.new("1", (10_000, 9_000)))  # 90 million pixels in 11 kB
PHOTO = draw(3, size=SIDE)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _rotated() -> bytes:
    """Store the photo on its side, with the note that says so."""
    lying = PHOTO.transpose(Image.Transpose.ROTATE_90)
    return encode(lying, "JPEG", quality=95, exif=_exif(6))


def _rotated_by_xmp() -> bytes:
    """The same, where only XMP says so."""
    note = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
        'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    lying = PHOTO.transpose(Image.Transpose.ROTATE_90)
    return encode(lying, "JPEG", quality=95, xmp=note.encode())


def _transparent() -> Image.Image:
    image = PHOTO.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((SIDE, SIDE)))
    return image


def _deep() -> Image.Image:
    grey = np.asarray(PHOTO.convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 257)


GOOD = {
    "jpeg": (encode(PHOTO, "JPEG", quality=95), "jpg"),
    "progressive": (encode(PHOTO, "JPEG", quality=95, progressive=True), "jpg"),
    "cmyk": (encode(PHOTO.convert("CMYK"), "JPEG", quality=95), "jpg"),
    "grey": (encode(PHOTO.convert("L"), "JPEG", quality=95), "jpg"),
    "palette": (encode(PHOTO.quantize(64)), "png"),
    "16-bit": (encode(_deep()), "png"),
    "transparent": (encode(_transparent()), "png"),
    "animated": (encode(PHOTO, "GIF", save_all=True, append_images=[draw(9, size=SIDE)]), "gif"),
    "exif-rotated": (_rotated(), "jpg"),
    "xmp-rotated": (_rotated_by_xmp(), "jpg"),
    "mislabelled": (encode(PHOTO, "WEBP", quality=95), "webp"),  # its file is called .jpg
    "trailing": (encode(PHOTO, "JPEG", quality=95) + b"\0\0", "jpg"),
}
BAD = {
    "bomb": (BOMB, "decompression bomb"),
    "truncated-jpeg": (encode(PHOTO, "JPEG")[:-300], "does not decode .*truncated"),
    "truncated-head": (encode(PHOTO, "JPEG")[:100], "does not decode|known format"),
    "truncated-png": (encode(PHOTO)[:-60], "does not decode"),
    "zero-byte": (b"", "empty"),
    "html": (b"<html>404</html>", "known format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "known format"),
}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = []
    for name, (data, _) in {**GOOD, **BAD}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)  # whatever is in it
        lines.append(json.dumps({"image": f"{name}.jpg", "caption": name}) + "\n")
    lines.append(json.dumps({"image": "missing.jpg", "caption": "missing"}) + "\n")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(lines))
    return path


def _stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return extension and bytes of every image by its caption."""
    import webdataset

    tars = [str(folder / shard.path) for shard in read_index(folder).split("train").shards]
    stored = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        (extension,) = {"jpg", "png", "webp", "gif"} & sample.keys()
        stored[sample["txt"].decode()] = extension, sample[extension]
    return stored


def _pixels(data: bytes) -> NDArray[np.int16]:
    return decode_image(data, Transform(32)).astype(np.int16)  # what training sees


@pytest.mark.parametrize("options", [(), ("--decode",)])
def test_untouched_images_keep_their_bytes(pairs: Path, options: tuple[str, ...]) -> None:
    out = pairs.parent / "out"
    run_shard("jsonl", pairs, out, "--max-bad", "8", "--workers", "1", *options)
    assert _stored(out) == {name: (extension, data) for name, (data, extension) in GOOD.items()}
    skipped_log = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    reasons = {entry["key"]: entry["reason"] for entry in skipped_log}
    assert reasons.keys() == {*BAD, "missing"}
    for name, (_, reason) in BAD.items():
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(reasons[name])
    reference = _pixels(GOOD["jpeg"][0])
    for name in ("progressive", "cmyk", "palette", "animated", "exif-rotated", "mislabelled"):
        assert np.abs(_pixels(GOOD[name][0]) - reference).mean() < 6, name


@pytest.mark.parametrize("format", ["", "jpeg", "png", "webp"])
def test_shrunk_images_show_the_same(pairs: Path, format: str) -> None:
    """One and two processes: the same bytes, and what training sees hardly differs."""
    options = ["--max-side", "48", "--max-bad", "8", "--shard-size", "3"]
    options += ["--quality", "95"] if format != "png" else []
    options += ["--format", format] if format else []
    folders = [pairs.parent / name for name in ("one", "two")]
    for workers, folder in enumerate(folders, 1):
        run_shard("jsonl", pairs, folder, *options, "--workers", str(workers))
    one, two = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert one == two
    stored = _stored(folders[0])
    assert stored.keys() == GOOD.keys()
    own = {"jpeg": "jpg", "gif": "png"}  # formats that we do not write become PNG
    for name, (extension, data) in stored.items():
        wanted = format or GOOD[name][1]
        assert extension == own.get(wanted, wanted), name
        image = Image.open(io.BytesIO(data))
        assert image.size == (48, 48)
        assert image.mode in ("L", "RGB") or (image.mode == "RGBA" and extension != "jpg")
        assert not image.getexif()
        difference = np.abs(_pixels(data) - _pixels(GOOD[name][0])).mean()
        assert difference < 5, (name, difference)


def test_what_fits_already_keeps_its_bytes() -> None:
    for name, (data, extension) in GOOD.items():
        assert recode_image(data, Recode(max_side=SIDE)) == (data, extension), name
    data = GOOD["jpeg"][0]
    assert recode_image(data, Recode(max_side=SIDE, format="jpeg")) == (data, "jpg")
    assert recode_image(data, Recode(format="png"))[1] == "png"
    small, _ = recode_image(data, Recode(max_side=48, quality=20))
    large, _ = recode_image(data, Recode(max_side=48, quality=95))
    assert len(small) < 0.75 * len(large)


def test_the_longer_side_counts_and_the_aspect_stays() -> None:
    wide = encode(draw(1, size=64).resize((640, 480)), "JPEG")
    for side in (560, 256):  # the shorter side is 480
        image = Image.open(io.BytesIO(recode_image(wide, Recode(max_side=side))[0]))
        assert (image.size, image.format) == ((side, side * 3 // 4), "JPEG")


@pytest.mark.parametrize("side", [96, 180, 256, 330, 500])
@pytest.mark.parametrize("mode", ["RGB", "L", "exif"])
def test_a_shrunk_photograph_is_near_a_fair_resampling(side: int, mode: str) -> None:
    """Decoded at 1/4, 1/2 and in full; compared with Pillow's Lanczos filter of the full decode."""
    pixels = np.asarray(PHOTO.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = np.random.default_rng(0).normal(0, 6, pixels.shape)  # grain: the hard part
    photo = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
    options = {"exif": _exif(3)} if mode == "exif" else {}
    data = encode(photo.convert("L" if mode == "L" else "RGB"), "JPEG", quality=93, **options)
    shrunk = Image.open(io.BytesIO(recode_image(data, Recode(side, quality=100))[0]))
    fair = Image.open(io.BytesIO(data)).resize((side, round(side * 0.75)), Image.Resampling.LANCZOS)
    fair = fair.transpose(Image.Transpose.ROTATE_180) if mode == "exif" else fair
    assert (shrunk.size, shrunk.mode) == (fair.size, fair.mode)
    difference = np.abs(np.asarray(shrunk).astype(float) - np.asarray(fair)).mean() / 2.55
    assert difference < 2, difference


def test_a_quick_look_trusts_only_what_is_framed() -> None:
    """A damaged inside passes the quick look of a JPEG (as most decoders would let it)."""
    data = bytearray(GOOD["jpeg"][0])
    data[-40:-2] = b"\xff\xd8" * 19
    assert check_image(bytes(data), decode=False) == "jpg"
    for name in ("jpeg", "palette", "16-bit"):
        data = bytearray(GOOD[name][0])
        assert check_image(bytes(data), decode=False) == GOOD[name][1]
    png = bytearray(encode(PHOTO))
    png[len(png) // 2] ^= 1
    with pytest.raises(Exception, match="does not decode"):
        check_image(bytes(png), decode=False)
