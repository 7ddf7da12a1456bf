"""An export in another library's layout gives our features there."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional

import dist_vse
from dist_vse.common.errors import UserError
from dist_vse.config import ModelConfig, load_config
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.tokenizer import Tokenizer, build_tokenizer
from dist_vse.runs.trained import run_tokenizer
from dist_vse.tools.export.card import Card, read_metrics, write_card
from dist_vse.tools.export.formats import FORMATS
from dist_vse.tools.export.to_sentence_transformers import add_sentence_transformers
from dist_vse.tools.export.write import write_folder
from tests.support.runs import CONFIG
from tests.support.tiny_clip import starting_from, write_hf
from tests.support.tiny_models import write_tiny_bert

pytestmark = pytest.mark.slow
WORDS = ["a red square", "blue circle on green", "a"]
LINEAR = ["model.text.kind=pretrained", "model.image.size=160"]
HIDDEN = ["model.text.kind=pretrained", "model.head_hidden=24"]
GRU = ["model.text.kind=gru"]
SOURCE = {"run": "mine", "checkpoint": "step-2", "loss": "convse", "global_batch_size": 32}


@dataclass
class Made:
    """A model with random weights."""

    model: DualEncoder
    shape: ModelConfig
    tokenizer: Tokenizer

    @torch.inference_mode()
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return normalised pixels and tokens, and the features of them."""
        size = self.shape.image.size
        pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        tokens = self.tokenizer(WORDS)
        return pixels, tokens, self.model.encode_images(pixels), self.model.encode_texts(tokens)


Make = Callable[[list[str]], Made]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("weights") / "bert")


@pytest.fixture
def make(bert: Path) -> Make:
    def build(words: list[str]) -> Made:
        weights = [] if words == GRU else [f"model.text.weights={bert}"]
        config = load_config(CONFIG, [*words, *weights, "model.text.max_tokens=12"])
        tokenizer = build_tokenizer(config.model.text, lambda: WORDS * 9, None)
        model = build_model(config.model, config.loss, tokenizer).eval()
        generator = torch.Generator().manual_seed(0)
        for tower in (model.image, model.text):
            for layer in tower.head.modules():
                if isinstance(layer, torch.nn.Linear):
                    torch.nn.init.normal_(layer.bias, generator=generator)
        return Made(model, config.model, tokenizer)

    return build


@torch.inference_mode()
def test_openclip_loads_it(make: Make, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    made, out = make(LINEAR), tmp_path / "out"
    assert FORMATS["openclip"](out, made.model, made.shape, str(out)).library == "open_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    pixels, _, images, texts = made.features()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(WORDS)
    found = model.eval().encode_image(pixels, True), model.encode_text(tokens, True)
    torch.testing.assert_close(found, (images, texts), atol=1e-5, rtol=0)
    assert model.logit_scale.item() == pytest.approx(made.model.log_scale.item())
    assert preprocess(Image.new("RGB", (200, 300))).shape == pixels.shape[1:]


@torch.inference_mode()
@pytest.mark.parametrize("words", [LINEAR, HIDDEN])
def test_transformers_loads_it_without_this_package(
    make: Make, tmp_path: Path, words: list[str]
) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    made, out = make(words), tmp_path / "out"
    FORMATS["transformers"](out, made.model, made.shape, str(out))
    assert "import dist_vse" not in (out / "transformers_modeling.py").read_text()
    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    pixels, _, images, texts = made.features()
    tokens = AutoTokenizer.from_pretrained(out)(WORDS, return_tensors="pt", padding=True)
    found = model.get_image_features(pixels), model.get_text_features(**tokens)
    torch.testing.assert_close(found, (images, texts), atol=1e-5, rtol=0)
    processor = AutoImageProcessor.from_pretrained(out)
    picture = processor(Image.new("RGB", (200, 300)), return_tensors="pt")
    assert picture["pixel_values"].shape[1:] == pixels.shape[1:]


@pytest.mark.parametrize("words", [HIDDEN, LINEAR, ["model.image.squash=true", *LINEAR]])
def test_sentence_transformers_loads_parts_without_trust(
    make: Make, tmp_path: Path, words: list[str]
) -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer  # noqa: N806
    made, out = make(words), tmp_path / "out"
    write_folder(out, made.model, made.tokenizer, made.shape, {})
    card = add_sentence_transformers(out, made.model, made.shape, str(out))
    assert "trust_remote_code" not in card.usage and not [*out.rglob("*.py")]
    assert "dist_vse" not in (out / "modules.json").read_text()
    model = SentenceTransformer(str(out), device="cpu")
    pixels, _, images, texts = made.features()
    given = {"pixel_values": pixels, "modality": "image"}
    with torch.inference_mode():
        found = model[0].sub_modules["image"](given)["sentence_embedding"]
    torch.testing.assert_close(functional.normalize(found), images, atol=1e-5, rtol=0)
    long = [*WORDS, "a red square on blue and green " * 9]  # which max_tokens cuts
    with torch.inference_mode():
        cut = made.model.encode_texts(made.tokenizer(long))
    encoded = model.encode(long, convert_to_tensor=True)
    torch.testing.assert_close(encoded, cut, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded[: len(WORDS)], texts, atol=1e-5, rtol=0)
    embedder = dist_vse.load(str(out))  # the folder is still one of ours
    pictures = [Image.new("RGB", (40, 50), colour) for colour in ("red", "green", "blue")]
    seen = model.encode(pictures, convert_to_tensor=True)
    torch.testing.assert_close(seen, embedder.encode_images(pictures), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedder.encode_texts(WORDS), texts, atol=1e-5, rtol=0)
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    kept = again.encode(long, convert_to_tensor=True)
    torch.testing.assert_close(kept, encoded, atol=1e-6, rtol=0)


def test_without_sentence_transformers_its_modules_are_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = make(LINEAR), tmp_path / "out"
    write_folder(out, made.model, made.tokenizer, made.shape, {})
    monkeypatch.setitem(sys.modules, "sentence_transformers.base", None)
    with pytest.raises(UserError, match=r"; pip install 'sentence-transformers>=6.2'$"):
        add_sentence_transformers(out, made.model, made.shape, "name")


def test_sentence_transformers_loads_any(make: Make, tmp_path: Path) -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer  # noqa: N806
    from dist_vse.tools.export.towers import Towers

    made, out = make(GRU), tmp_path / "out"
    write_folder(out, made.model, made.tokenizer, made.shape, {})
    card = add_sentence_transformers(out, made.model, made.shape, str(out))
    assert card.library == "sentence-transformers" and "trust_remote_code=True" in card.usage
    model = SentenceTransformer(str(out), device="cpu", trust_remote_code=True)
    embedder = dist_vse.load(str(out))
    pictures = [Image.new("RGB", (40, 50), colour) for colour in ("red", "green", "blue")]
    texts, images = (model.encode(x, convert_to_tensor=True) for x in (WORDS, pictures))
    torch.testing.assert_close(texts, embedder.encode_texts(WORDS), atol=1e-5, rtol=0)
    torch.testing.assert_close(images, embedder.encode_images(pictures), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, made.features()[3], atol=1e-5, rtol=0)
    assert model.get_embedding_dimension() == embedder.dim
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(modules=[Towers(tmp_path / "again")], device="cpu")
    assert torch.equal(again.encode(WORDS, convert_to_tensor=True), texts)
    model[0].model.bias.data += 1
    with pytest.raises(NotImplementedError, match="weights that changed are not saved"):
        model.save(str(tmp_path / "changed"))


@pytest.mark.parametrize(
    ("words", "form", "reason"),
    [
        ([*HIDDEN, "model.image.size=160"], "openclip", "no heads with a hidden layer"),
        ([*LINEAR, "model.image.size=32"], "openclip", "for its usual image size, not for 32"),
        ([*LINEAR, "model.embed_dim=40"], "openclip", "narrower than the shared space"),
        (GRU, "openclip", r"needs a text encoder of transformers .*, not gru"),
        (GRU, "transformers", r"needs a text encoder of transformers .*, not gru"),
    ],
)
def test_what_a_library_cannot_express_is_one_line(
    make: Make, tmp_path: Path, words: list[str], form: str, reason: str
) -> None:
    made = make(words)
    with pytest.raises(UserError, match=reason) as caught:
        FORMATS[form](tmp_path / "out", made.model, made.shape, "name")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_a_whole_checkpoint_keeps_its_own_layout(tmp_path: Path) -> None:
    from transformers import AutoModel

    config = starting_from(write_hf(tmp_path / "clip", "clip"))
    tokenizer = run_tokenizer(config, tmp_path, build=False)
    model, out = build_model(config.model, config.loss, tokenizer), tmp_path / "out"
    with pytest.raises(UserError, match="began with a checkpoint of transformers"):
        FORMATS["openclip"](out, model, config.model, str(out))
    assert not out.exists()
    card = FORMATS["transformers"](out, model, config.model, str(out))
    assert type(AutoModel.from_pretrained(out)).__name__ == "CLIPModel"
    assert "trust_remote_code" not in card.usage


@pytest.mark.parametrize(("kind", "native"), [("clip", True), ("siglip", False)])
def test_sentence_transformers_loads_a_whole_clip_without_trust(
    tmp_path: Path, kind: str, native: bool
) -> None:
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer  # noqa: N806
    config, out = starting_from(write_hf(tmp_path / kind, kind)), tmp_path / "out"
    tokenizer = run_tokenizer(config, tmp_path, build=False)
    made = build_model(config.model, config.loss, tokenizer).eval()
    write_folder(out, made, tokenizer, config.model, {})
    card = add_sentence_transformers(out, made, config.model, str(out))
    assert ("trust_remote_code" not in card.usage) == native
    trust = {} if native else {"trust_remote_code": True}
    model = SentenceTransformer(str(out), device="cpu", **trust)
    with torch.inference_mode():
        texts = made.encode_texts(tokenizer(WORDS))
    found = model.encode(WORDS, convert_to_tensor=True)
    torch.testing.assert_close(found, texts, atol=1e-5, rtol=0)
    embedder = dist_vse.load(str(out))
    pictures = [Image.new("RGB", (40, 50), colour) for colour in ("red", "green")]
    seen = model.encode(pictures, convert_to_tensor=True)
    torch.testing.assert_close(seen, embedder.encode_images(pictures), atol=1e-5, rtol=0)


def test_a_card_has_metadata_and_the_metrics_that_were_measured(tmp_path: Path) -> None:
    (tmp_path / "eval-val.json").write_text('{"trained": {"i2t_r1": 12.5}}')
    (tmp_path / "eval-bad.json").write_text("{")
    for metrics in (read_metrics(tmp_path), {}):
        write_card(tmp_path, Card("open_clip", "usage"), {**SOURCE, "metrics": metrics}, 32)
        _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
        assert text.startswith("# mine\n") and text.endswith("\n\nusage\n")
        found = yaml.safe_load(front)
        assert found["library_name"] == "open_clip" and "dist_vse" in found["tags"]
        assert ("model-index" in found) == bool(metrics)
        if metrics:
            (result,) = found["model-index"][0]["results"]
            assert result["dataset"]["name"] == "val"
            assert result["metrics"] == [{"name": "i2t_r1", "type": "i2t_r1", "value": 12.5}]
