"""Parameter groups: rates, decay and frozen layers, the same for every stage and world size."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import (
    ImageConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
)
from dist_vse.config.optimizers import GroupConfig
from dist_vse.engine import RunEngine
from dist_vse.engine.optimizer import build_optimizer, parameter_groups
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.layers import layer_numbers
from dist_vse.models.tokenizer import AnyWords
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.engines import FSDP2
from tests.support.engines import build as build_engine
from tests.support.savers import open_saver
from tests.support.tiny import tiny_batch, tiny_model
from tests.support.tiny_clip import build, write_hf, write_open_clip

B = 8  # pairs in the global batch
STAGES = (0, 1, 2, 3, FSDP2 + 2, FSDP2 + 3)
GROUPS = [
    GroupConfig("image", lr_scale=0.5),
    GroupConfig("text.head", lr_scale=3.0, weight_decay=0.25),
    GroupConfig("*.norm*", lr_scale=2.0),
]
OPTIM = OptimConfig(
    "sgd", lr=1000.0, weight_decay=0.125, groups=GROUPS, layer_decay=0.5, decay_positions=False
)


def _groups(model: nn.Module, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    """Return each parameter's factor on the rate, and its weight decay."""
    found = parameter_groups(model, optim)
    assert len({(g.lr_scale, g.weight_decay) for g in found}) >= len(found) - 1
    return {name: (group.lr_scale, group.weight_decay) for group in found for name in group.names}


def _engine(optim: OptimConfig, stage: int) -> RunEngine:
    model = tiny_model()
    optimizer = build_optimizer(model, optim)
    return build_engine(model, optimizer, stage, batch_size=B, clip_norm=optim.clip_norm)


def _step(engine: RunEngine, number: int, rate: float) -> None:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, number))
    engine.set_learning_rate(rate)
    chunk = engine.module.prepare(images=images, tokens=tokens)
    train_step(engine, GlobalLoss("info_nce"), [chunk])


def _weights(engine: RunEngine) -> dict[str, Tensor]:
    with engine.gathered_parameters() as model:
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def _updates(optim: OptimConfig, stage: int) -> dict[str, Tensor]:
    engine = _engine(optim, stage)
    before = _weights(engine)
    engine.norms.start()
    _step(engine, 0, optim.lr)
    updates = {name: p - before[name] for name, p in _weights(engine).items()}
    learned = [n for n, p in engine.module.named_parameters() if p.requires_grad]
    update, weight = (
        torch.cat([x[n].double().flatten() for n in learned]).norm() for x in (updates, before)
    )
    norms = engine.step_norms()
    ratio = (update / weight).item()
    if stage == 3 and distributed.world_size() > 1:
        assert "update_ratio" not in norms
    else:
        assert norms["update_ratio"] == pytest.approx(ratio, rel=1e-5), (stage, norms, ratio)
    if optim.weight_decay == 0:
        assert norms["grad_norm"] == pytest.approx(update.item() / optim.lr, rel=1e-5)
    return updates


def _norm_when_clipped(optim: OptimConfig, stage: int) -> float:
    engine = _engine(optim, stage)
    engine.norms.start()
    _step(engine, 0, optim.lr)
    return engine.step_norms()["grad_norm"]


def _worst_ratio() -> dict[int, float]:
    """Return by stage how far the updates are from the plain ones times their factors."""
    worst = {}
    expected = _groups(tiny_model(), OPTIM)
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    sgd = OptimConfig("sgd", lr=OPTIM.lr, weight_decay=0.0)
    plain = _updates(sgd, 0)
    norm = torch.cat([u.double().flatten() for u in plain.values()]).norm().item() / sgd.lr
    for stage in STAGES:
        assert _norm_when_clipped(replace(sgd, clip_norm=norm / 3), stage) == pytest.approx(
            norm, rel=1e-4
        )
        found = _updates(OPTIM, stage)
        errors = []
        for name, (scale, decay) in expected.items():
            wanted = scale * (plain[name] - OPTIM.lr * decay * start[name])
            errors.append(((found[name] - wanted).norm() / wanted.norm()).item())
        worst[stage] = max(errors)
    return worst


def _continue_elsewhere(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the weights after two steps with momentum: at one stage, and with changes of it."""
    optim = replace(OPTIM, lr=0.1, momentum=0.9)
    engine = _engine(optim, 1)
    _step(engine, 0, optim.lr)
    saver = open_saver(folder)
    saver.start(engine, Progress(1, B, [[0, 0]]), score=None)
    saver.finish()
    _step(engine, 1, optim.lr / 2)
    others = []
    for stage in (3, FSDP2 + 3):
        other = _engine(optim, stage)
        checkpoint.load_latest(folder, other)
        _step(other, 1, optim.lr / 2)
        others.append(_weights(other))
    return _weights(engine), others


def _both(folder: Path) -> tuple[dict[int, float], dict[str, Tensor], list[dict[str, Tensor]]]:
    return _worst_ratio(), *_continue_elsewhere(folder)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_are_in_the_ratio_of_the_rates_also_after_a_resume_at_another_stage(
    world_size: int, tmp_path: Path
) -> None:
    for worst, same, others in run_distributed(_both, world_size, tmp_path, timeout=120):
        assert len(worst) == len(STAGES) and max(worst.values()) < 1e-6, worst
        for other, (name, value) in itertools.product(others, same.items()):
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_the_default_has_the_two_groups_that_it_always_had() -> None:
    model = tiny_model()
    matrices = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim < 2]
    for weight_decay in (0.01, 0.0):
        groups = parameter_groups(model, OptimConfig(weight_decay=weight_decay))
        assert [group.names for group in groups] == [matrices, vectors]
        assert [group.weight_decay for group in groups] == [weight_decay, 0.0]


def test_layers_and_exemptions_are_those_of_timm() -> None:
    model = tiny_model()
    alone = timm.create_model("test_vit", num_classes=3, img_size=32)  # whose classifier is a head
    theirs = {}
    exempt = alone.no_weight_decay()
    for group in param_groups_layer_decay(alone, 0.1, exempt, layer_decay=0.7):
        for parameter in group["params"]:
            theirs[id(parameter)] = group["lr_scale"], group["weight_decay"]
    optim = OptimConfig(weight_decay=0.1, layer_decay=0.7, decay_positions=False)
    ours = _groups(model, optim)
    for name, parameter in alone.named_parameters():
        if not name.startswith("head"):
            lr_scale, weight_decay = ours[f"image.trunk.backbone.{name}"]
            assert (lr_scale, weight_decay) == (
                pytest.approx(theirs[id(parameter)][0]),
                theirs[id(parameter)][1],
            )
    assert ours["image.head.0.weight"] == (1.0, 0.1)
    assert ours["text.trunk.positions.weight"] == (pytest.approx(0.7**2), 0.0)
    assert ours["text.trunk.norm.weight"] == (pytest.approx(0.7), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_hf, write_open_clip])
def test_checkpoints_of_both_libraries_have_layers_and_exemptions(tmp_path: Path, write) -> None:
    model = build(write(tmp_path / "clip", "clip"))
    for trunk in (model.image.trunk, model.text.trunk):
        layers = layer_numbers(trunk)
        assert set(layers.values()) == {0, 1, 2}  # a stem and two blocks
        for name, layer in layers.items():
            at_the_end = ("ln_final", "ln_post", "post_layernorm", "final_layer_norm", "proj")
            if "position" in name or "class_embedding" in name:
                assert layer == 0
            elif name.split(".")[-1] in at_the_end or name.split(".")[-2] in at_the_end[:4]:
                assert layer == 2, name
    optim = OptimConfig(weight_decay=0.1, decay_positions=False)
    exempt = {name for name, (_, decay) in _groups(model, optim).items() if decay == 0.0}
    assert {n for n, p in model.named_parameters() if "position" in n or "class_emb" in n} <= exempt


def _build(image: ImageConfig, text: TextConfig) -> DualEncoder:
    return build_model(ModelConfig(image=image, text=text), LossConfig(), AnyWords(50))


def test_the_last_layers_of_a_frozen_trunk_learn() -> None:
    text = TextConfig(kind="gru", width=64, depth=3)
    config = ModelConfig(
        pretrained=None,
        from_run="somewhere",
        image=ImageConfig(name="test_resnet", size=32, frozen=True, unlocked=2),
        text=TextConfig(kind="gru", width=64, depth=3, frozen=True, unlocked=1),
    )
    model = build_model(config, LossConfig(), AnyWords(50)).train()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name.split(".")[3] for name in learning if name.startswith("image.trunk")}
    assert inside == {"layer3", "layer4"}
    assert {name for name in learning if name.startswith("text.trunk")} == {
        f"text.trunk.gru.{kind}_l2" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    still = model.image.trunk.get_submodule("backbone.layer2")
    moving = model.image.trunk.get_submodule("backbone.layer3")
    assert not any(m.training for m in still.modules()) and moving.training
    assert {"images", "tokens"} == set(
        model.prepare(images=torch.zeros(1, 3, 32, 32), tokens=torch.ones(1, 4).long())
    )
    with pytest.raises(UserError, match=r"model.image.unlocked \(5\).*number of layers \(5\)"):
        image = ImageConfig(name="test_resnet", size=32, frozen=True, unlocked=5)
        build_model(ModelConfig(from_run="x", image=image, text=text), LossConfig(), AnyWords(50))
    with pytest.raises(UserError, match=r"set model.text.frozen=true"):
        TextConfig(unlocked=1)


def test_a_group_that_matches_nothing_is_named() -> None:
    optim = OptimConfig(groups=[GroupConfig("image.trnk")])
    with pytest.raises(UserError, match=r"'image.trnk' matches no parameter.*image.trunk"):
        build_optimizer(tiny_model(), optim)
