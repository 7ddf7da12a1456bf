"""The whole model: outputs, frozen trunks, temperature, seeds, running statistics."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_vse.config import ImageConfig, LossConfig, ModelConfig, TextConfig, load_config
from dist_vse.models.build import build_head, build_model
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics
from dist_vse.models.tokenizer import AnyWords
from tests.support.paths import ROOT
from tests.support.tiny_models import write_tiny_bert

torch.set_num_threads(1)
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator())
TOKENS = torch.tensor([[2, 4, 5, 6, 3], [2, 7, 3, 0, 0], [2, 8, 9, 3, 0], [2, 10, 3, 0, 0]])
TINY = ModelConfig(
    image=ImageConfig(name="test_resnet", size=32),
    text=TextConfig(kind="gru", width=32, word_dim=16, depth=1, max_tokens=16),
    embed_dim=24,
    head_hidden=40,
)


def build(
    config: ModelConfig = TINY,
    *,
    temperature: float = 0.1,
    learn_temperature: bool = False,
    learn_bias: bool = False,
    seed: int = 0,
) -> DualEncoder:
    loss = LossConfig(
        name="siglip" if learn_bias else "convse",
        temperature=temperature,
        learn_temperature=learn_temperature,
    )
    return build_model(config, loss, AnyWords(11), seed=seed)


def frozen(tmp_path: Path) -> ModelConfig:
    """Freeze both trunks of a model whose text trunk is a BERT."""
    bert = TextConfig(
        kind="pretrained", weights=str(write_tiny_bert(tmp_path)), max_tokens=16, frozen=True
    )
    return replace(TINY, image=replace(TINY.image, frozen=True), text=bert)


def with_grad(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["gru", "transformer"])
@pytest.mark.parametrize("hidden", [0, 40])
@pytest.mark.parametrize("image", ["test_resnet", "test_vit"])
def test_outputs(kind: str, hidden: int, image: str) -> None:
    config = replace(
        TINY,
        image=ImageConfig(name=image, size=32),
        text=TextConfig(kind=kind, width=64),
        head_hidden=hidden,
    )
    model = build(config)
    *features, log_scale, bias = model(IMAGES, TOKENS)
    for x in features:
        assert x.shape == (4, 24) and x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(log_scale, torch.tensor([math.log(10)]))
    torch.testing.assert_close(bias, torch.tensor([-10.0]))
    assert all(p.ndim and p.is_contiguous() for p in model.parameters())


def test_every_trainable_parameter_gets_a_gradient(tmp_path: Path) -> None:
    bert = TextConfig(kind="pretrained", weights=str(write_tiny_bert(tmp_path)), max_tokens=16)
    for text in (TINY.text, TextConfig(kind="transformer", width=64), bert):
        model = build(replace(TINY, text=text), learn_temperature=True, learn_bias=True)
        sum(output.cumsum(-1).square().sum() for output in model(IMAGES, TOKENS)).backward()
        assert with_grad(model) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_encode_equals_forward() -> None:
    model = build().eval()
    image_features, text_features, *_ = model(IMAGES, TOKENS)
    assert torch.equal(model.encode_images(IMAGES), image_features)
    assert torch.equal(model.encode_texts(TOKENS), text_features)


def test_features_are_float32_under_autocast() -> None:
    model = build(learn_temperature=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(IMAGES, TOKENS)
        hidden = model.image.hidden(IMAGES)
    assert [x.dtype for x in (*outputs, hidden)] == [torch.float32] * 5
    torch.testing.assert_close(outputs[0].norm(dim=1), torch.ones(4))


def test_prepare_leaves_raw_input_to_trunks_that_learn() -> None:
    inputs = build().prepare(images=IMAGES, tokens=TOKENS)
    assert inputs.keys() == {"images", "tokens"}
    assert inputs["images"] is IMAGES and inputs["tokens"] is TOKENS


def test_frozen_trunks_run_once_and_change_no_bit(tmp_path: Path) -> None:
    model = build(frozen(tmp_path))
    inputs = model.prepare(images=IMAGES, tokens=TOKENS)
    assert {name: x.shape for name, x in inputs.items()} == {
        "image_hidden": (4, 96),
        "text_hidden": (4, 32),
    }
    assert not any(x.requires_grad for x in inputs.values())
    assert all(x.dtype == torch.float32 for x in inputs.values())

    results: list[list[Tensor]] = []
    for kwargs in ({"images": IMAGES, "tokens": TOKENS}, inputs):
        model.zero_grad()
        outputs = model(**kwargs)
        sum(x.cumsum(-1).square().sum() for x in outputs[:2]).backward()
        results.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert {name.split(".")[1] for name in with_grad(model)} == {"head"}


def test_one_frozen_trunk(tmp_path: Path) -> None:
    model = build(replace(frozen(tmp_path), text=TINY.text))
    inputs = model.prepare(images=IMAGES, tokens=TOKENS)
    assert inputs.keys() == {"image_hidden", "tokens"}
    model(**inputs)[1].sum().backward()
    assert "text.trunk.words.weight" in with_grad(model)


def test_frozen_trunks_stay_in_eval_mode(tmp_path: Path) -> None:
    model = build(frozen(tmp_path))
    statistics = [b.clone() for b in model.image.trunk.buffers()]
    for _ in range(2):
        model.train()
        assert not any(m.training for m in model.image.trunk.modules())
        assert not any(m.training for m in model.text.trunk.modules())
        assert model.image.head.training and model.training
        model(IMAGES, TOKENS)
    assert all(
        torch.equal(a, b) for a, b in zip(statistics, model.image.trunk.buffers(), strict=True)
    )


def test_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build(seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = build(seed=1).state_dict(), build(seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key in ("image.trunk.backbone.bn1.weight", "text.head.0.bias"):
        assert torch.equal(first[key], other[key])  # constants
    for key in ("image.head.0.weight", "text.head.3.weight", "text.trunk.words.weight"):
        assert not torch.equal(first[key], other[key])


def test_fixed_temperature_is_used_as_it_is() -> None:
    log_scale = build(temperature=0.005)(IMAGES, TOKENS)[2]
    torch.testing.assert_close(log_scale.exp(), torch.tensor([200.0]))
    assert not log_scale.requires_grad


@pytest.mark.parametrize(("value", "used"), [(math.log(50), 50.0), (math.log(130), 100.0)])
def test_learned_temperature_is_bounded_and_can_come_back(value: float, used: float) -> None:
    model = build(learn_temperature=True)
    with torch.no_grad():
        model.log_scale.fill_(value)
    log_scale = model(IMAGES, TOKENS)[2]
    torch.testing.assert_close(log_scale.exp(), torch.tensor([used]))
    (3 * log_scale).sum().backward()
    assert model.log_scale.grad is not None
    assert model.log_scale.grad.tolist() == [3.0]


def test_heads() -> None:
    shapes = [tuple(p.shape) for p in build_head(6, 4, 0, 0.0).parameters()]
    assert shapes == [(4, 6), (4,)]
    head = build_head(6, 4, 8, 0.5).eval()
    x = torch.randn(3, 6)
    first, last = head[0], head[3]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    torch.testing.assert_close(head(x), last(first(x).clamp(min=0)))
    assert not torch.equal(head.train()(x), head(x))
    bound = math.sqrt(6 / (6 + 8))
    assert 0.5 * bound < first.weight.abs().max() <= bound
    assert first.bias.abs().max() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("image", ["test_resnet", "test_efficientnet"])
def test_statistics_update_once_in_two_passes(image: str, checkpointing: bool) -> None:
    config = replace(TINY, image=ImageConfig(name=image, size=32), grad_checkpointing=checkpointing)
    once, twice = build(config), build(config)
    expected = once.encode_images(IMAGES)

    with torch.no_grad():
        first = twice.encode_images(IMAGES)
    with frozen_statistics(twice):
        second = twice.encode_images(IMAGES)
        second.sum().backward()
    assert torch.equal(first, expected) and torch.equal(second, expected)
    for (name, a), b in zip(once.named_buffers(), twice.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert dict(twice.named_buffers())["image.trunk.backbone.bn1.num_batches_tracked"] == 1

    twice.encode_images(IMAGES)  # and after the context they go on
    assert dict(twice.named_buffers())["image.trunk.backbone.bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize(
    "name",
    ["coco_paper", "coco_paper_plus_plus", "flickr30k_paper", "flickr30k_paper_plus_plus"],
)
def test_paper_configs_build(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    for world_size in (1, 2, 4, 8):
        config.check_world_size(world_size, on_gpu=False)
    # The published model with a small stand-in for ResNet-152, whose weights are not here.
    image = replace(config.model.image, name="resnet18", weights=None, size=32)
    model = build(replace(config.model, image=image))
    learned = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert learned["text.trunk.gru.weight_hh_l0"] == (3 * 1024, 1024)
    assert learned["image.head.1.weight"] == (1024, 512)  # behind the normalisation
    assert learned["image.head.2.weight"] == (2048, 1024)
    assert "image.head.2.bias" not in learned and "text.head.0.bias" not in learned
    assert learned["image.head.5.weight"] == (1024, 2048)
    assert learned["text.head.0.weight"] == (2048, 1024)
    assert learned["text.head.3.weight"] == (1024, 2048)
    assert not any(n.startswith("image.trunk") for n in learned)
