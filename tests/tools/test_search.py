"""Search, embeddings and zero-shot classification with a small trained run."""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.data.reader import ShardReader
from dist_vse.evaluation.class_folder import _read_folder
from dist_vse.evaluation.evaluate import Embedded
from dist_vse.evaluation.retrieval import top_k
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.tools.search.embed import embed_split, open_model
from dist_vse.tools.search.found import Found, Queries
from dist_vse.tools.search.picture import draw_sheet, wrap
from dist_vse.tools.search.run import search
from dist_vse.tools.search.sheet import write_sheet
from dist_vse.tools.search.zeroshot import class_features, zeroshot
from tests.support.datasets import describe, draw, write_dataset
from tests.support.runs import trained_run

QUERY = ["--split", "val", "--text", "a red square"]


pytestmark = pytest.mark.slow  # a training comes first


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [60, 50, 40], "val": [32]}
    return trained_run(tmp_path_factory.mktemp("run"), splits, "total_steps=60", "optim.lr=2e-3")


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_search_finds_what_brute_force_finds(trained: Path, tmp_path: Path, suffix: str) -> None:
    index = read_index(trained.parent / "shards")
    reader = ShardReader(index, "val", max_open=1)
    picture = tmp_path / "query.png"
    picture.write_bytes(reader.image(*reader.place(5)))
    sheet = tmp_path / f"sheet{suffix}"
    how = {"data": None, "split": "val", "queries": Queries(["a red square"], [picture])}
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
        near = {other for key in {*by_text.keys, *by_image.keys} for other in _near(gallery, key)}
        shown = len(by_text.keys) + len(by_image.keys)
        assert page.count("data:image/") == shown + len(near - {*by_text.keys, *by_image.keys})
        assert not re.search(r'(?:src|href)="(?!data:)', page)
    else:
        with Image.open(sheet) as image:
            assert image.width > 4 * 160 and image.height > 2 * 160


def _near(gallery: Embedded, key: str) -> list[str]:
    """Return an image's four nearest others."""
    row = gallery.keys.index(key)
    scores = (gallery.image_features @ gallery.image_features[row]).tolist()
    others = sorted((j for j in range(len(scores)) if j != row), key=lambda j: -scores[j])
    return [gallery.keys[j] for j in others[:4]]


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
        assert json.loads(bytes(file.get_tensor("keys").numpy())) == want.keys
        assert json.loads(bytes(file.get_tensor("captions").numpy())) == want.captions
        assert {*file.metadata()} == {"weights", "data", "split"}  # a header has room for 100 MB
        assert file.metadata()["data"] == names["data"] == index.fingerprint()
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
        (["embed", "RUN", "DIR/file/x.npy", "--split", "val"], "x.npy: can't be written ("),
        (["search", "RUN", *QUERY, "--sheet", "DIR/file/x.png"], "x.png: can't be written ("),
        (
            ["search", "RUN", *QUERY, "--index", "none.safetensors"],
            "none.safetensors: no such file",
        ),
        (["search", "RUN", *QUERY, "--index", "DIR/file"], "file: no file of `dist-vse embed`"),
        (["zeroshot", "RUN", "--data", "IMAGES", "--top", "4"], "--top 4 of 4 classes is always"),
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("run", "embed"):  # all is reported before the long work
        monkeypatch.setattr(f"dist_vse.tools.search.{module}.embed_split", None)
    (tmp_path / "bare.txt").write_text("a photo\n")
    (tmp_path / "file").touch()
    places = {"RUN": trained, "IMAGES": classes, "BARE": tmp_path / "bare.txt"}
    given = [a.replace("DIR", str(tmp_path)) for a in arguments]
    assert cli.main([str(places.get(argument, argument)) for argument in given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1


def changed(trained: Path, folder: Path, value: float) -> Path:
    """Return the checkpoint of a copy of the run, written with one of its weights at `value`."""
    shutil.copytree(trained, folder)
    (path,) = (folder / "checkpoints").glob("step-*")
    weights = load_file(path / "model.safetensors")
    name = next(name for name in sorted(weights) if name.startswith("image.head"))
    weights[name].view(-1)[0] = value
    manifest = checkpoint.read_manifest(path)
    digests = manifest.pop("files") | checkpoint.write_files(path, {"model.safetensors": weights})
    progress = Progress(*(manifest.pop(field.name) for field in fields(Progress)))
    checkpoint.write_manifest(path, progress, digests, **manifest)
    return path


def test_searches_in_written_features_and_refuses_stale_ones(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "val.safetensors"
    assert cli.main(["embed", str(trained), str(file), "--split", "val"]) == 0
    how = {"data": None, "queries": Queries(["a red square", "circle"]), "top": 40}
    at_once = search(trained, **how, split="val", sheet=None)  # type: ignore[arg-type]
    other = tmp_path / "other"
    write_dataset(other, {"val": [31]})
    stale = [
        ("another model", changed(trained, tmp_path / "run", 0.5), {**how, "split": "val"}),
        ("another data set", trained, {**how, "split": "val", "data": str(other)}),
        (r"another split \(val\)", trained, {**how, "split": "train"}),
    ]
    monkeypatch.setattr("dist_vse.tools.search.run.embed_split", None)  # nothing is embedded again
    asked_of: list[int] = []

    def counted(queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        asked_of.append(len(queries))
        return top_k(queries, *rest)

    monkeypatch.setattr("dist_vse.tools.search.run.top_k", counted)
    written = search(trained, **how, split="val", sheet=None, index_file=file)  # type: ignore[arg-type]
    assert written == at_once and asked_of == [2]  # one search for both queries
    for message, model, asked in stale:
        with pytest.raises(UserError, match=f"stale, it is of {message}; write it with"):
            search(model, **asked, sheet=None, index_file=file)  # type: ignore[arg-type]


def test_features_that_are_not_finite_are_one_line(
    trained: Path,
    classes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(changed(trained, tmp_path / "run", float("nan")))
    for command in (
        ["search", model, *QUERY],
        ["embed", model, str(tmp_path / "out.npy"), "--split", "val"],
        ["zeroshot", model, "--data", str(classes)],
    ):
        assert cli.main(command) == 2, command
        error = capsys.readouterr().err
        assert "image features are not finite" in error and error.count("error:") == 1
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(
        "dist_vse.tools.search.run.embed_split", None
    )  # a query is looked at before
    picture = next(classes.glob("*/*.png"))
    assert cli.main(["search", model, "--split", "val", "--image", str(picture)]) == 2
    assert "1 of 1 rows" in capsys.readouterr().err


def test_zero_shot_shares_ties_and_takes_the_usual_template(
    trained: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("".join(f"{folder.name}\tthing\n" for folder in classes.iterdir()))
    got = zeroshot(trained, data=classes, classes=names, templates=None, top=None)
    assert list(got) == ["top1", "mean_per_class", "chance"]  # four classes: no top-5
    assert got["top1"] == got["mean_per_class"] == pytest.approx(25)  # all classes look the same
    assert "a photo of a {}." in " ".join(capsys.readouterr().out.split())
    own = tmp_path / "own.txt"
    own.write_text("a photo of a {}.\n")
    how = {"data": classes, "classes": None, "top": [1, 3]}
    by_default, by_hand = (zeroshot(trained, templates=t, **how) for t in (None, own))  # type: ignore[arg-type]
    assert by_default == by_hand


def test_a_picture_has_scores_and_wrapped_texts(caplog: pytest.LogCaptureFixture) -> None:
    font = ImageFont.load_default(14)
    text = "a rather long caption with " + "x" * 90
    lines = wrap(text, font, 160)
    assert len(lines) > 3 and all(font.getlength(line) <= 160 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrap(text, font, 160, 2)
    assert len(cut) == 2 and cut[1].endswith("…") and font.getlength(cut[1]) <= 160

    buffer = io.BytesIO()
    draw(0, size=160).save(buffer, "PNG")
    pictures = {"a": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}
    short, long = (
        draw_sheet([Found(query, ["a"], [0.5], [caption])], pictures, "x.png")
        for query, caption in (("cat", "short"), ("cat " * 60, "a caption that needs lines"))
    )
    assert long.width == short.width and long.height > short.height + 60
    below = np.asarray(short)[-70:, :200]
    assert (below < 128).any()  # a score and a caption stand under the picture
    assert caplog.text == ""
    draw_sheet([Found("猫 and 犬", ["a"], [0.5], ["猫"])], pictures, "x.png")
    assert caplog.text.count("x.png: the font has no 犬猫 (2 in all); use .html") == 1


def test_faiss_finds_the_same(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="needs the extra `faiss`")
    how = {"data": None, "split": "val", "queries": Queries(["a red square", "circle"])}
    exact = search(trained, **how, top=40, sheet=None)  # type: ignore[arg-type]
    found = search(trained, **how, top=40, sheet=None, faiss=True)  # type: ignore[arg-type]
    for one, other in zip(exact, found, strict=True):
        assert len(one.keys) == 32 and other.keys == one.keys
        assert other.scores == pytest.approx(one.scores, abs=1e-6)
        assert one.scores == sorted(one.scores, reverse=True)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'dist_vse\[faiss\]'"):
        search(trained, **how, top=4, sheet=None, faiss=True)  # type: ignore[arg-type]


def test_what_a_system_leaves_is_no_class(tmp_path: Path) -> None:
    for name in (
        "cat/a.jpg",
        "cat/._a.jpg",
        "cat/.Trash-0/b.jpg",
        "__MACOSX/c.jpg",
        ".hidden/d.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert _read_folder(tmp_path) == {"cat": [tmp_path / "cat/a.jpg"]}


def test_a_sheet_shows_texts_as_they_are(tmp_path: Path) -> None:
    found = [Found("a <b>query</b>, caf\udce9", ["k"], [0.5], ["<script>alert(1)</script>"])]
    names = {"k": found[0].captions[0]}
    write_sheet(tmp_path / "x.html", found, {"k": "data:,"}, set(), {}, names)
    page = (tmp_path / "x.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "a &lt;b&gt;query" in page


def test_widths_and_codes_by_command(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run_dir = str(tmp_path / "val.safetensors"), str(trained)
    embed = ["embed", run_dir, file, "--split", "val", "--width", "16", "--precision", "binary"]
    assert cli.main(embed) == 0
    assert "% of the first 10 images in float32 are found (64 captions" in capsys.readouterr().out
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("image_features").shape == (32, 16)
        assert opened.get_tensor("image_bits").shape == (32, 2)
    assert cli.main(["search", run_dir, *QUERY, "--index", file]) == 0
    assert cli.main(["search", run_dir, *QUERY, "--width", "16"]) == 0
    assert cli.main(["search", run_dir, *QUERY, "--index", file, "--width", "8"]) == 2
    assert "--width (8) does not fit the index" in capsys.readouterr().err
    assert cli.main(["eval", run_dir, "--split", "val", "--width", "16"]) == 0
    result = json.loads((trained / "eval-val-width16.json").read_text())
    assert result["protocol"] == "plain, width 16" and 0 <= result["trained"]["t2i_r1"] <= 100
    assert cli.main(["eval", run_dir, "--split", "val", "--width", "9999"]) == 2
    assert "--width (9999) must be from 1 to" in capsys.readouterr().err
