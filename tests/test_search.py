"""Search, embeddings and zero-shot classification with a small trained run."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dist_vse import cli, train
from dist_vse.config import load_config
from dist_vse.errors import UserError
from dist_vse.index import read_index
from dist_vse.search.embed import embed_split, open_model
from dist_vse.search.run import search
from dist_vse.search.zeroshot import class_features, zeroshot
from dist_vse.stream.reader import ShardReader
from tests.datasets import describe, draw, write_dataset
from tests.distributed import run_distributed

CONFIG = Path(__file__).parent.parent / "configs" / "debug_cpu.yaml"


def learn(folder: Path) -> None:
    steps = ["total_steps=60", "optim.lr=2e-3", f"data.index={folder / 'shards'}"]
    assert train.run(load_config(CONFIG, [*steps, f"output_dir={folder / 'run'}"])) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_dataset(folder / "shards", {"train": [60, 50, 40], "val": [32]})
    run_distributed(learn, 1, folder)
    return folder / "run"


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_search_finds_what_brute_force_finds(trained: Path, tmp_path: Path, suffix: str) -> None:
    index = read_index(trained.parent / "shards")
    reader = ShardReader(index, "val", max_open=1)
    picture = tmp_path / "query.png"
    picture.write_bytes(reader.image(*reader.place(5)))
    sheet = tmp_path / f"sheet{suffix}"
    how = {"data": None, "split": "val", "texts": ["a red square"], "images": [picture]}
    by_text, by_image = search(trained, **how, top=4, sheet=sheet)  # type: ignore[arg-type]

    model = open_model(trained)
    gallery = embed_split(model, index, "val")
    scores = (gallery.image_features @ model.encode_texts(["a red square"])[0]).tolist()
    best = sorted(range(32), key=lambda row: -scores[row])[:4]
    assert by_text.keys == [gallery.keys[row] for row in best]
    assert by_text.scores == pytest.approx([scores[row] for row in best], abs=1e-6)
    assert by_image.keys[0] == "val000005"  # the picture itself
    assert by_image.scores[0] == pytest.approx(1, abs=1e-5)
    if suffix == ".html":
        page = sheet.read_text()
        assert page.count("data:image/") == 8
        assert not re.search(r'(?:src|href)="(?!data:)', page)
    else:
        with Image.open(sheet) as image:
            assert image.width > 4 * 160 and image.height > 2 * 160


def test_embeddings_in_three_formats(trained: Path, tmp_path: Path) -> None:
    model, index = open_model(trained), read_index(trained.parent / "shards")
    want = embed_split(model, index, "val")
    for suffix in (".npy", ".safetensors", ".parquet"):
        command = ["embed", str(trained), str(tmp_path / f"val{suffix}"), "--split", "val"]
        assert cli.main(command) == 0
    assert np.array_equal(np.load(tmp_path / "val.images.npy"), want.image_features.numpy())
    assert np.array_equal(np.load(tmp_path / "val.texts.npy"), want.text_features.numpy())
    names = json.loads((tmp_path / "val.json").read_text())
    assert names["keys"] == want.keys and names["captions"] == want.captions
    with safe_open(tmp_path / "val.safetensors", "pt") as file:
        assert file.get_tensor("image_features").equal(want.image_features)
        assert json.loads(file.metadata()["keys"]) == want.keys
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(tmp_path / "val.parquet").to_pylist()
    assert len(rows) == 32 + 64
    assert rows[0]["kind"] == "image" and rows[-1]["caption"] == want.captions[-1]
    assert rows[40]["features"] == want.text_features[8].tolist()
    assert rows[40]["key"] == want.keys[4]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder a shape, of five pictures each."""
    made = dict.fromkeys(("square", "circle", "triangle", "cross"), 0)
    for number in range(60):
        shape = describe(number)[0]
        if made[shape] < 5:
            (tmp_path / "images" / shape).mkdir(parents=True, exist_ok=True)
            draw(number, seed=9).save(tmp_path / "images" / shape / f"{number}.png")
            made[shape] += 1
    return tmp_path / "images"


def test_zero_shot_is_the_nearest_mean_of_the_prompts(
    trained: Path, classes: Path, tmp_path: Path
) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("a {} on blue\na red {}\n")
    got = zeroshot(trained, data=classes, classes=None, templates=templates, top=[1, 2])
    model = open_model(trained)
    shapes = sorted(folder.name for folder in classes.iterdir())
    files = [(n, f) for n, s in enumerate(shapes) for f in sorted((classes / s).iterdir())]
    images = model.encode_images([file for _, file in files])
    texts = [model.encode_texts([f"a {s} on blue", f"a red {s}"]).mean(0) for s in shapes]
    means = torch.nn.functional.normalize(torch.stack(texts), dim=1)
    order = (images @ means.T).argsort(dim=1, descending=True)
    truth = torch.tensor([n for n, _ in files])
    for k in (1, 2):
        want = 100 * float((order[:, :k] == truth[:, None]).any(1).float().mean())
        assert got[f"top{k}"] == pytest.approx(want)
    assert got["chance"] == 25
    torch.testing.assert_close(class_features(model, shapes, ["a {} on blue", "a red {}"]), means)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "RUN", "--split", "val"], "give --text or --image"),
        (["search", "RUN", "--split", "val", "--text", "a", "--sheet", "x.pdf"], "ends in .html"),
        (["search", "RUN", "--split", "val", "--image", "none.png"], "none.png: cannot be read"),
        (["embed", "RUN", "out.csv"], "ends in .npy, .safetensors, .parquet"),
        (["embed", "nowhere", "out.npy"], "nowhere: no run here"),
        (["zeroshot", "RUN", "--data", "nowhere"], "nowhere: no such folder"),
        (["zeroshot", "RUN", "--data", "IMAGES", "--templates", "BARE"], "has no {}"),
        (["zeroshot", "RUN", "--data", "IMAGES", "--classes", "BARE"], "line 1 is not FOLDER<TAB>"),
    ],
)
def test_slips_are_one_line(
    trained: Path,
    classes: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bare.txt").write_text("a photo\n")
    places = {"RUN": trained, "IMAGES": classes, "BARE": tmp_path / "bare.txt"}
    assert cli.main([str(places.get(argument, argument)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1


def test_faiss_finds_the_same(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="needs the extra `faiss`")
    how = {"data": None, "split": "val", "texts": ["a red square", "circle"], "images": []}
    exact = search(trained, **how, top=40, sheet=None)  # type: ignore[arg-type]
    found = search(trained, **how, top=40, sheet=None, faiss=True)  # type: ignore[arg-type]
    for one, other in zip(exact, found, strict=True):
        assert len(one.keys) == 32 and other.keys == one.keys
        assert other.scores == pytest.approx(one.scores, abs=1e-6)
        assert one.scores == sorted(one.scores, reverse=True)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'dist_vse\[faiss\]'"):
        search(trained, **how, top=4, sheet=None, faiss=True)  # type: ignore[arg-type]
