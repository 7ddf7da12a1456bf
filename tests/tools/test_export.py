"""An exported model is the run's to the bit, and its parts load without this package."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file
from torch import Tensor, nn

import dist_vse
from dist_vse import cli, train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.data.index import read_index
from dist_vse.data.reader import ShardReader
from dist_vse.evaluation.batches import build_eval_batches
from dist_vse.evaluation.evaluate import embed
from dist_vse.models.build import build_model
from dist_vse.runs.trained import Trained, open_trained, run_tokenizer
from dist_vse.tools.export.load import Embedder
from dist_vse.tools.export.onnx import write_tower
from dist_vse.tools.export.write import export_run
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG
from tests.support.tiny_clip import starting_from, write_hf
from tests.support.tiny_models import write_tiny_bert

pytestmark = pytest.mark.slow  # three trainings come first
KINDS = ("transformer", "gru", "pretrained")


def make_run(folder: Path, kind: str) -> None:
    more = ["model.text.max_tokens=12", "model.head_hidden=24"]
    if kind == "pretrained":
        more += [f"model.text.weights={write_tiny_bert(folder / 'bert')}"]
    steps = ["total_steps=2", f"data.index={folder / 'shards'}", f"output_dir={folder / kind}"]
    assert train.run(load_config(CONFIG, [f"model.text.kind={kind}", *more, *steps])) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "shards", {"train": [60, 50, 40], "val": [32]}, captions=1)
    for kind in KINDS:
        run_distributed(make_run, 1, folder, kind)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def exported(runs: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    out = runs / f"{request.param}-out"
    return runs / request.param, export_run(runs / request.param, out, onnx=False)


def test_equal_to_the_bit_after_loading(exported: tuple[Path, Path]) -> None:
    run_dir, out = exported
    trained = open_trained(run_dir)
    index = read_index(trained.config.data.index)
    batches = build_eval_batches(trained.config, index, trained.tokenizer, "val")
    found = embed(trained.model, batches, torch.device("cpu"))

    reader = ShardReader(index, "val", max_open=1)
    files = [reader.image(*reader.place(number)) for number in range(len(found.keys))]
    loaded = dist_vse.load(str(out))
    images = loaded.encode_images(files, batch_size=trained.config.fixed_chunk_size)
    texts = loaded.encode_texts(found.captions, batch_size=trained.config.fixed_chunk_size)
    assert images.equal(found.image_features)
    assert texts.equal(found.text_features)
    path = run_dir / "picture.png"
    path.write_bytes(files[0])
    pictures = [str(path), path, Image.open(io.BytesIO(files[0]))]
    assert (loaded.encode_images(pictures) - images[:1]).abs().max() < 1e-6
    assert loaded.encode_images([]).shape == (0, images.shape[1])


def test_parts_load_without_this_package(runs: Path, exported: tuple[Path, Path]) -> None:
    run_dir, out = exported
    code = (
        "import sys, timm, torch\nfrom safetensors.torch import load_file\n"
        f"out = {str(out)!r}\n"
        "trunk = timm.create_model(f'local-dir:{out}/image', pretrained=True, num_classes=0)\n"
        "torch.manual_seed(0)\n"
        "image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)\n"
        "c = trunk.pretrained_cfg\n"
        "mean, std = (255 * torch.tensor(c[n]).view(1, 3, 1, 1) for n in ('mean', 'std'))\n"
        "x = trunk.eval()((image.float() - mean) / std)\n"
        "heads = load_file(f'{out}/heads.safetensors')\n"
        "keys = [k for k in heads if k.startswith('image.') and k.endswith('weight')]\n"
        "for n, k in enumerate(sorted(keys)):\n"
        "    x = torch.relu(x) if n else x\n"
        "    x = x @ heads[k].T + heads[k.replace('weight', 'bias')]\n"
        "assert 'dist_vse' not in sys.modules\n"
        "torch.save(torch.nn.functional.normalize(x), sys.argv[1])\n"
    )
    path = run_dir / "features.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=runs
    )
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ours = dist_vse.load(str(out)).model.encode_images(image)
    torch.testing.assert_close(torch.load(path), ours.detach(), atol=1e-5, rtol=0)


def test_transformers_reads_the_text_part(runs: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    out = runs / "again"
    assert cli.main(["export", str(runs / "pretrained"), str(out)]) == 0
    model, tokenizer = (c.from_pretrained(out / "text") for c in (AutoModel, AutoTokenizer))
    words = tokenizer(["a red square"], return_tensors="pt")
    states = model.eval()(**words).last_hidden_state
    trunk = dist_vse.load(str(out)).model.text.trunk
    torch.testing.assert_close(states.mean(1), trunk(words["input_ids"]), atol=1e-5, rtol=0)


def clip(folder: Path) -> Embedder:
    """A random CLIP of transformers."""
    config = starting_from(write_hf(folder / "clip", "clip"))
    tokenizer = run_tokenizer(config, folder, build=False)
    model = build_model(config.model, config.loss, tokenizer)
    return Embedder(model, tokenizer, shape=config.model, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "towers"),
    [
        ("transformer", ["image", "text"]),
        ("pretrained", ["text"]),  # its image tower is the transformer's
        ("clip", ["image", "text"]),
    ],
)
def test_onnx_computes_the_same(runs: Path, kind: str, towers: list[str], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = tmp_path / "out"
    if kind == "transformer":
        loaded = dist_vse.load(export_run(runs / kind, folder, onnx=True))
    else:
        folder.mkdir()
        plain = tmp_path / "plain"
        loaded = (
            clip(tmp_path)
            if kind == "clip"
            else dist_vse.load(export_run(runs / kind, plain, onnx=False))
        )
        for tower in towers:
            write_tower(loaded, tower, folder)
    size = loaded.square.size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    tokens = loaded.tokenizer(["a red square on blue", "a circle", "green"])
    for name in towers:
        raw = images if name == "image" else tokens
        encode = loaded.model.encode_images if name == "image" else loaded.model.encode_texts
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        given = {"images" if name == "image" else "tokens": raw.numpy()}
        (theirs,) = session.run(["features"], given)
        torch.testing.assert_close(
            torch.from_numpy(theirs), encode(raw).detach(), atol=1e-5, rtol=0
        )


def test_a_gru_is_refused_since_its_graph_would_be_of_one_shape(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    loaded = dist_vse.load(export_run(runs / "gru", tmp_path / "out", onnx=False))
    with pytest.raises(UserError, match=r"the text tower cannot be written as ONNX .* one shape"):
        write_tower(loaded, "text", tmp_path)


class Branching(nn.Module):
    """A tower that no graph can express."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float() if images.sum() > 0 else images.double()


def test_what_no_onnx_graph_expresses_is_one_line(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    loaded = dist_vse.load(export_run(runs / "gru", tmp_path / "out", onnx=False))
    loaded.model.image = Branching()  # type: ignore[assignment]
    with pytest.raises(UserError, match="the image tower cannot be written as ONNX") as caught:
        write_tower(loaded, "image", tmp_path)
    assert "\n" not in str(caught.value)


def test_features_of_a_list_alone(runs: Path, tmp_path: Path) -> None:
    loaded = dist_vse.load(export_run(runs / "gru", tmp_path / "out", onnx=False))
    picture = Image.new("RGB", (40, 40))
    for given in ("photo.jpg", Path("photo.jpg"), b"bytes", picture):
        with pytest.raises(UserError, match=r"encode_images takes a list, not .*; give \[...\]"):
            loaded.encode_images(given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="encode_texts takes a list, not str"):
        loaded.encode_texts("apple")
    assert loaded.encode_texts(("apple", "pear")).shape == (2, loaded.dim)
    for text, named in ((None, "None"), (float("nan"), "of type float"), (b"x", "of type bytes")):
        with pytest.raises(UserError, match=rf"texts\[1\] is {named}; give a string"):
            loaded.encode_texts(["a", text])  # type: ignore[list-item]
    for image, named in ((None, "None"), (torch.zeros(3, 8, 8), "of type Tensor")):
        with pytest.raises(UserError, match=rf"images\[1\] is {named}; give a path"):
            loaded.encode_images([picture, image])  # type: ignore[list-item]
    grey = Image.new("F", (40, 40), 0.5)
    same = Image.new("L", (40, 40), 128)
    assert (loaded.encode_images([grey]) - loaded.encode_images([same])).abs().max() < 1e-6


def test_an_opened_image_is_turned_as_its_file_is(runs: Path, tmp_path: Path) -> None:
    loaded = dist_vse.load(export_run(runs / "gru", tmp_path / "out", onnx=False))
    pixels = torch.randint(0, 256, (6, 4, 3), generator=torch.Generator().manual_seed(0))
    picture, exif = Image.fromarray(pixels.byte().numpy()).resize((400, 600)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "turned.jpg"
    picture.save(path, quality=95, exif=exif)
    upright = picture.rotate(-90, expand=True)
    by_file, by_image, want, lying = loaded.encode_images(
        [path, Image.open(path), upright, picture]
    )
    assert (by_image - by_file).abs().max() < 2e-3  # the crop is taken before or after the turn
    assert (by_image - want).abs().max() < 2e-3
    assert (by_image - lying).abs().max() > 2e-2


def test_a_diverged_run_is_no_model(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_diverged(location: Path) -> Trained:
        trained = open_trained(location)
        trained.model.image.head[0].weight.data[0, 0] = float("nan")  # type: ignore[index]
        return trained

    monkeypatch.setattr("dist_vse.tools.export.write.open_trained", open_diverged)
    message = r"gru at step-0*2: 1 weights are not finite, such as image\.head\.0\.weight"
    with pytest.raises(UserError, match=message):
        export_run(runs / "gru", tmp_path / "out", onnx=False)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"out: can't be written .*; give a path that can be written"
    ):
        export_run(runs / "gru", tmp_path / "file" / "out", onnx=False)


def test_the_description_says_where_the_model_came_from(exported: tuple[Path, Path]) -> None:
    run_dir, out = exported
    source = json.loads((out / "dist_vse.json").read_text())["source"]
    place = load_config(run_dir / "config.yaml").data.index
    assert source["run"] == run_dir.name and source["checkpoint"].endswith("2")
    assert source["data"] == {place: read_index(place).fingerprint()}


def test_the_command_writes_another_librarys_layout(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", str(runs / "pretrained"), str(out), "--format"]
    assert cli.main([*words, "transformers", "--onnx"]) == 2
    assert "--onnx goes with --format dist_vse or sentence-tr" in capsys.readouterr().err
    assert cli.main([*words, "transformers"]) == 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert 'library_name: "transformers"' in (out / "README.md").read_text()
    other = tmp_path / "other"
    assert cli.main([*words[:2], str(other), "--format", "sentence-transformers"]) == 0
    assert (other / "modules.json").is_file() and dist_vse.load(str(other)).dim


def test_what_is_no_export_or_damaged(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported model"):
        dist_vse.load(str(tmp_path))
    with pytest.raises(UserError, match="already exists"):
        export_run(runs / "gru", tmp_path, onnx=False)
    out = export_run(runs / "gru", tmp_path / "out", onnx=False)
    with pytest.raises(UserError, match=r"x\.png: cannot be read"):
        dist_vse.load(str(out)).encode_images([tmp_path / "x.png"])
    (out / "heads.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged"):
        dist_vse.load(str(out))
    content = json.loads((out / "dist_vse.json").read_text())
    (out / "dist_vse.json").write_text(json.dumps(content | {"format": 9}))
    with pytest.raises(UserError, match="format 9"):
        dist_vse.load(str(out))


def test_the_weights_are_plain_safetensors(exported: tuple[Path, Path]) -> None:
    _, out = exported
    assert {"image.0.weight", "log_scale", "bias"} <= load_file(out / "heads.safetensors").keys()
    assert not list(out.rglob("*.bin"))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, dist_vse; dist_vse.load; assert not {'torch', 'numpy'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
