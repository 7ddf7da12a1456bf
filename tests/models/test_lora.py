"""Adapters: what learns, what is saved and sent, and that the numbers are exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm import create_model
from torch import Tensor

from dist_vse import distributed, load
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, LoraConfig, OptimConfig, TrainConfig, load_config
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.lora import base_names, remove_adapters
from dist_vse.models.tokenizer import AnyWords
from dist_vse.runs import checkpoint
from dist_vse.runs.trained import open_trained
from dist_vse.tools.export.write import export_run
from dist_vse.training.grad_cache import train_step
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import run, settings
from tests.support.tiny import tiny_batch
from tests.support.tiny_clip import build, write_hf, write_open_clip
from tests.support.tiny_models import WORDS, write_tiny_bert

B = 8  # pairs in the global batch
RANK = 4
LORA = f"model.lora.rank={RANK}"


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong, message in (
        ({"rank": -1}, r"model.lora.rank \(-1\)"),
        ({"alpha": 0.0}, r"model.lora.alpha \(0.0\) must be above 0"),
        ({"dropout": 1.0}, r"model.lora.dropout"),
        ({"match": []}, r"model.lora.match must name layers"),
    ):
        with pytest.raises(UserError, match=message):
            LoraConfig(**wrong)  # type: ignore[arg-type]


def _write_parts(folder: Path) -> Path:
    vit = create_model("test_vit", num_classes=0, img_size=32)
    save_file(vit.state_dict(), folder / "vit.safetensors")
    write_tiny_bert(folder / "bert")
    return folder


def _config(folder: Path, *overrides: str) -> TrainConfig:
    parts = [f"model.image.weights={folder / 'vit.safetensors'}", "model.image.name=test_vit"]
    parts += ["model.image.size=32", "model.text.kind=pretrained", "model.text.max_tokens=8"]
    parts += [f"model.text.weights={folder / 'bert'}", "model.embed_dim=16"]
    return load_config(None, [*parts, *overrides])


def _model(folder: Path, *overrides: str) -> DualEncoder:
    """Build timm's ViT and a BERT whose adapters are no longer zero, alike on every rank."""
    config = _config(folder, *overrides)
    model = build_model(config.model, config.loss, AnyWords(len(WORDS)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model


def _batch(step: int) -> tuple[Tensor, Tensor]:
    images, tokens = tiny_batch(B, step)
    return images, tokens % (len(WORDS) - 1) + 1


def _features(model: DualEncoder) -> Tensor:
    images, tokens = _batch(0)
    with torch.no_grad():
        return torch.cat([model.eval().encode_images(images), model.encode_texts(tokens)])


@pytest.mark.slow
def test_adapters_start_as_nothing_and_merge_into_their_layers(tmp_path: Path) -> None:
    folder = _write_parts(tmp_path)
    config = _config(folder, LORA)
    plain = build_model(replace(config.model, lora=LoraConfig()), config.loss, AnyWords(len(WORDS)))
    start = build_model(config.model, config.loss, AnyWords(len(WORDS)))
    assert torch.equal(_features(plain), _features(start))
    learns = {name for name, p in start.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".head." in name or "." not in name for name in learns)
    for tower in ("image", "text"):
        assert any(name.startswith(f"{tower}.trunk") for name in learns)
    assert not any("pooler" in name for name in learns)  # the mean over tokens does not use it
    model = _model(folder, LORA)
    before = _features(model)
    assert (before - _features(plain)).abs().max() > 0.01
    names = {name for name, _ in plain.named_parameters()}
    adapters = remove_adapters(model, merge=True)
    assert len(adapters) > 20 and {name for name, _ in model.named_parameters()} == names
    assert (_features(model) - before).abs().max() < 1e-6
    model = _model(folder, LORA)
    remove_adapters(model, merge=False)
    assert torch.equal(_features(model), _features(plain))
    with pytest.raises(UserError, match=r"model.lora.match \(\*none\) finds no linear layer"):
        _model(folder, LORA, "model.lora.match=['*none']")
    with pytest.raises(UserError, match=r"is for pretrained trunks that learn"):
        _model(folder, LORA, "model.image.frozen=true", "model.text.frozen=true")
    clip = build(write_open_clip(tmp_path / "clip", "clip"), LORA)  # of MultiheadAttention
    adapted = {name for name, _ in clip.named_parameters() if "lora_" in name}
    assert adapted and all(".mlp." in name for name in adapted)
    only = _model(folder, LORA, "model.image.frozen=true", "model.lora.match=['*query','*value']")
    learns = {name for name, p in only.named_parameters() if p.requires_grad and "trunk" in name}
    assert learns and all(".query." in name or ".value." in name for name in learns)


def _gradients(model: DualEncoder) -> dict[str, Tensor]:
    images, tokens = _batch(0)
    model.eval()
    outputs = model(**model.prepare(images=images, tokens=tokens))
    GlobalLoss("info_nce")(*outputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_weights_by_the_chain_rule(tmp_path: Path) -> None:
    folder = _write_parts(tmp_path)
    model = _model(folder, LORA)
    merged = _model(folder, LORA)
    remove_adapters(merged, merge=True)
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    found, whole = _gradients(model), _gradients(merged)
    scale, parameters = LoraConfig().alpha / RANK, dict(model.named_parameters())
    compared = 0
    for name, gradient in found.items():
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            full = whole[name.replace("lora_A.default.", "")]
            expected = scale * parameters[other].detach().T @ full
            assert (gradient - expected).norm() < 1e-4 * expected.norm()
            expected = scale * full @ parameters[name].detach().T
            assert (found[other] - expected).norm() < 1e-4 * expected.norm()
            compared += 1
    assert compared > 10


def _updates(folder: Path, stage: int | None) -> dict[str, Tensor]:
    """Return the change of a step in chunks; without a stage, of the plain engine's whole batch."""
    model = _model(folder, LORA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig("sgd", lr=1.0, weight_decay=0.0))
    world_size, rank = distributed.world_size(), distributed.rank()
    rows = B // world_size
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in _batch(0))
    engine: Any
    if stage is None:
        engine = PlainEngine(model, optimizer)
        chunks = [model.prepare(images=images, tokens=tokens)]
    else:
        engine = ZeroEngine(model, optimizer, EngineConfig(stage), rank_batch_size=rows)
        pairs = zip(images.split(2), tokens.split(2), strict=True)
        chunks = [engine.module.prepare(images=i, tokens=t) for i, t in pairs]
        if engine.reduction is not None:
            sent = {id(item.parameter) for item in engine.reduction._slices}
            assert sent == {id(p) for p in model.parameters() if p.requires_grad}
    train_step(engine, GlobalLoss("info_nce"), chunks)
    if stage is None:
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}
    held = sum(values.numel() for values in engine.dump_optimizer().values())
    assert held == 0  # of SGD without momentum
    with engine.gathered_parameters():
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def _all_updates(folder: Path) -> dict[int, dict[str, Tensor]]:
    return {stage: _updates(folder, stage) for stage in (0, 1, 2, 3)}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_caching_is_exact_under_every_stage(tmp_path: Path) -> None:
    folder = _write_parts(tmp_path)
    (expected,) = run_distributed(_updates, 1, folder, None)
    learned = {name for name, update in expected.items() if update.any()}
    assert any("image.trunk" in name for name in learned)
    for world_size in (1, 2):
        for found in run_distributed(_all_updates, world_size, folder, timeout=150):
            for stage, updates in found.items():
                changed = {name for name, update in updates.items() if update.any()}
                assert changed == learned, (world_size, stage)
                for name in learned:
                    error = (updates[name] - expected[name]).norm() / expected[name].norm()
                    assert error < 1e-4, (world_size, stage, name, error)


def _resumed(whole: list[str], cut: list[str]) -> list[int | str]:
    # The clock writes no checkpoint; the first attempt ends at its own last step.
    return [run(whole), run([*cut, "total_steps=2"]), run(cut)]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_saves_adapters_alone_resumes_to_the_bit_and_exports(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16}, captions=2)
    clip = write_hf(tmp_path / "clip", "clip")
    more = [LORA, "model.lora.dropout=0.1", "total_steps=4", "log_every=1", "engine.zero_stage=3"]
    more += ["ema.samples=64", "model.image.name=resnet18", "model.text.kind=transformer"]
    more += ["model.image.size=224", "model.text.max_tokens=32", "model.embed_dim=256"]
    more += [f"model.pretrained={clip}", "loss.name=info_nce", "optim.schedule=constant"]
    whole, cut = (settings(tmp_path / "shards", tmp_path / name, *more) for name in ("a", "b"))
    assert run_distributed(_resumed, 2, whole, cut, timeout=150) == [[0, 0, 0]] * 2
    paths = [checkpoint.steps(tmp_path / name / "checkpoints")[-1] for name in ("a", "b")]
    files = [load_file(path / checkpoint.WEIGHTS) for path in paths]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    trained = open_trained(tmp_path / "a").model.eval()
    base = base_names(trained)
    assert base and not base & files[0].keys()
    assert {n for n in files[0] if "lora_" in n} == {
        n for n, _ in trained.named_parameters() if "lora_" in n
    }
    apart, merged = (export_run(tmp_path / "a", tmp_path / o, merge=o == "m") for o in "um")
    images, tokens = tiny_batch(4, 0)
    words = tokens % 9 + 1
    expected = trained.encode_images(images)
    for folder, bound in ((apart, 0.0), (merged, 1e-6)):
        model = load(folder).model
        assert (model.encode_images(images) - expected).abs().max() <= bound
        assert (model.encode_texts(words) - trained.encode_texts(words)).abs().max() <= bound
    with pytest.raises(UserError, match="add --merge"):
        export_run(tmp_path / "a", tmp_path / "none", form="transformers")
    weights = load_file(clip / "model.safetensors")
    weights["visual_projection.weight"] += 1  # which the run has trained: not part of its base
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    open_trained(tmp_path / "a")
    weights["vision_model.encoder.layers.0.mlp.fc1.weight"] += 1
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its adapters \(model.lora\) were trained on other"):
        open_trained(tmp_path / "a")
