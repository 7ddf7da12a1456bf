"""Our model, loss and step compared with the authors' and with an oracle of our own.

Theirs runs where their code is: DIST_VSE_AUTHORS_CODE names a folder with their model.py
(https://github.com/anuragjain96/ConVsepp). The oracle writes the published model and losses down
once more, in float64, and always runs.
"""

import importlib.util
import math
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision import models

from dist_vse.config import LossConfig, OptimConfig
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.options import LossOptions
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.tokenizer import AnyWords
from dist_vse.tools.convse.names import model_shape, renamed
from dist_vse.training.grad_cache import train_step

CODE = os.environ.get("DIST_VSE_AUTHORS_CODE", "")
LOSSES = {"convse": "ConVSE", "convse++": "ConVSE++"}
WORDS, ROWS, STEPS = 50, 12, 10
RATE, CLIP, TEMPERATURE, MARGIN = 2e-4, 2.0, 0.1, 0.2


@dataclass(frozen=True)
class Pairs:
    """A batch in which one image stands twice, its captions sorted by length."""

    images: Tensor  # (b, 3, h, w), normalised
    tokens: Tensor  # (b, l), padded with 0
    lengths: list[int]

    @staticmethod
    def draw(step: int, dtype: torch.dtype) -> "Pairs":
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(ROWS, 3, 32, 32, generator=generator, dtype=torch.float64)
        images[7] = images[2]
        lengths = sorted((3 + (5 * i + step) % 7 for i in range(ROWS)), reverse=True)
        tokens = torch.randint(1, WORDS, (ROWS, lengths[0]), generator=generator)
        tokens[torch.arange(lengths[0]) >= torch.tensor(lengths).view(-1, 1)] = 0
        return Pairs(images.to(dtype), tokens, lengths)


class Oracle(nn.Module):
    """The published model and losses in small, written again, with the authors' names."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = loss
        self.image = nn.Module()
        trunk = models.resnet18(weights=None)
        trunk.fc = nn.Identity()
        self.image.cnn = nn.Module()
        self.image.cnn.module = trunk.requires_grad_(False).eval()
        self.image.fc = nn.Linear(512, 40)
        self.image.g_I = _mlp()
        self.text = nn.Module()
        self.text.embed = nn.Embedding(WORDS, 20)
        self.text.rnn = nn.GRU(20, 40, batch_first=True)
        self.text.g_T = _mlp()
        self.double()
        learned = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=RATE)

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.image.state_dict(), self.text.state_dict()

    def modules_of(self) -> tuple[nn.Module, nn.Module]:
        return self.image, self.text

    def features(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        hidden = self.image.cnn.module(pairs.images)
        image = self.image.g_I(self.image.fc(hidden / hidden.norm(dim=1, keepdim=True)))
        words = pack_padded_sequence(self.text.embed(pairs.tokens), pairs.lengths, batch_first=True)
        text = self.text.g_T(self.text.rnn(words)[1][0])
        return image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        s = image @ text.T
        own = s.diag()
        if self.name == "convse":
            both = [(z / TEMPERATURE).logsumexp(1) - own / TEMPERATURE for z in (s, s.T)]
        else:
            others = s - 2 * torch.eye(len(s), dtype=s.dtype)
            both = [
                (z.amax(1) + MARGIN - own).clamp(min=0) / TEMPERATURE for z in (others, others.T)
            ]
        return both[0].mean() + both[1].mean()

    def step(self, pairs: Pairs) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.features(pairs)).backward()
        learned = [p for p in self.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(learned, CLIP)
        self.optimizer.step()


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 64, bias=False), nn.ReLU(), nn.Linear(64, 24))


class Authors:
    """Their VSE, on the CPU and with a small trunk of random weights."""

    def __init__(self, loss: str, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        small = models.resnet18
        patch.setattr(models, "resnet18", lambda pretrained: small(weights=None))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(nn.Module, "cuda", lambda module: module)
        patch.setattr(Tensor, "cuda", lambda tensor: tensor)
        spec = importlib.util.spec_from_file_location("authors_model", Path(CODE) / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        options = types.SimpleNamespace(
            data_name="coco", img_dim=512, embed_size=1024, finetune=False, cnn_type="resnet18",
            use_abs=False, no_imgnorm=False, loss_fn=LOSSES[loss], temp=TEMPERATURE,
            margin=MARGIN, vocab_size=WORDS, word_dim=300, num_layers=1, measure="cosine",
            max_violation=False, learning_rate=RATE, grad_clip=CLIP,
        )  # fmt: skip
        self.vse = module.VSE(options)
        self.vse.logger = types.SimpleNamespace(update=lambda *args: None)
        for encoder in self.modules_of():
            encoder.to(dtype)
        self.vse.train_start()
        self.vse.img_enc.cnn.eval()

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        image, text = self.vse.state_dict()
        return image, text

    def modules_of(self) -> tuple[nn.Module, nn.Module]:
        return self.vse.img_enc, self.vse.txt_enc

    def features(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        image, text = self.vse.forward_emb(pairs.images, pairs.tokens, pairs.lengths)
        return image, text

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        loss: Tensor = self.vse.criterion(image, text)
        return loss

    def step(self, pairs: Pairs) -> None:
        self.vse.train_emb(pairs.images, pairs.tokens, pairs.lengths)


def _ours(
    states: tuple[dict[str, Tensor], dict[str, Tensor]], dtype: torch.dtype, *, drifts: bool = False
) -> DualEncoder:
    """Build our model with the authors' weights, and nothing but them."""
    config = model_shape(*states, "resnet18.tv_in1k")
    image = replace(config.image, frozen=True, size=32, drifting_statistics=drifts)
    loss = LossConfig(temperature=TEMPERATURE)
    model = build_model(replace(config, image=image), loss, AnyWords(WORDS))
    given = model.load_state_dict(renamed(*states), strict=False)
    assert not given.unexpected_keys
    assert {*given.missing_keys} == {"log_scale", "bias", "image.trunk.mean", "image.trunk.std"}
    model.to(dtype).log_scale.data.fill_(-math.log(TEMPERATURE))  # it was rounded to float32
    return model


def _loss(name: str) -> GlobalLoss:
    ids = torch.arange(ROWS)
    ids[7] = ids[2]
    return GlobalLoss(name, LossOptions(margin=MARGIN, duplicates="keep"), image_ids=ids)


def _gradients(theirs: "Oracle | Authors", loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all that they train, by our names."""
    named = [dict(module.named_parameters()) for module in theirs.modules_of()]
    learned = [p for part in named for p in part.values() if p.requires_grad]
    found = dict(zip(learned, torch.autograd.grad(loss, learned), strict=True))
    # A frozen trunk stays in: without one, the names are those of precomputed features.
    image, text = ({n: found.get(p, p) for n, p in part.items()} for part in named)
    kept = {id(gradient) for gradient in found.values()}
    return {n: value for n, value in renamed(image, text).items() if id(value) in kept}


def _compare(theirs: "Oracle | Authors", name: str, dtype: torch.dtype) -> dict[str, float]:
    """Train both from equal weights; return the largest differences."""
    ours = _ours(theirs.states(), dtype).train()
    optimizer = build_optimizer(ours, OptimConfig(name="adam", lr=RATE, weight_decay=0.0))
    engine = PlainEngine(ours, optimizer, CLIP)
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    pairs = Pairs.draw(0, dtype)
    outputs = ours(**ours.prepare(images=pairs.images, tokens=pairs.tokens))
    their_features = theirs.features(pairs)
    errors = {"features": _largest(zip(outputs[:2], their_features, strict=True))}
    our_loss, their_loss = _loss(name)(*outputs).loss, theirs.loss(*their_features)
    errors["loss"] = _largest([(our_loss, their_loss)])
    learned = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    our_grads = dict(
        zip(learned, torch.autograd.grad(our_loss, list(learned.values())), strict=True)
    )
    grads = _gradients(theirs, their_loss)
    assert grads.keys() == learned.keys()
    # Relative to each tensor's largest number.
    errors["gradients"] = max(
        ((our_grads[n] - g).abs().max() / g.abs().max()).item() for n, g in grads.items()
    )
    for step in range(STEPS):
        pairs = Pairs.draw(step, dtype)
        theirs.step(pairs)
        halves = zip(pairs.images.split(ROWS // 2), pairs.tokens.split(ROWS // 2), strict=True)
        chunks = [ours.prepare(images=i, tokens=t) for i, t in halves]
        train_step(engine, _loss(name), chunks)
    after = renamed(*theirs.states())
    errors["steps"] = max((learned[n] - after[n]).abs().max().item() for n in learned)
    differ = torch.stack([(learned[n] - after[n]).norm() for n in learned]).norm()
    way = torch.stack([(learned[n] - before[n]).norm() for n in learned]).norm()
    errors["course"] = (differ / way).item()
    errors["weights"] = (differ / torch.stack([after[n].norm() for n in learned]).norm()).item()
    unseen = Pairs.draw(STEPS, dtype)
    outputs = ours(**ours.prepare(images=unseen.images, tokens=unseen.tokens))
    errors["trained features"] = _largest(zip(outputs[:2], theirs.features(unseen), strict=True))
    moved = min((learned[n] - before[n]).abs().max().item() for n in learned)
    assert moved > RATE, "nothing was trained"
    return errors


def _largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convse++", pytest.param("convse", marks=pytest.mark.slow)])
def test_ten_steps_equal_the_oracle(name: str) -> None:
    errors = _compare(Oracle(name), name, torch.float64)
    assert max(errors.values()) < 1e-9, errors


needs_their_code = pytest.mark.skipif(
    not CODE, reason="set DIST_VSE_AUTHORS_CODE to a folder with the authors' model.py"
)


@needs_their_code
@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_ten_steps_equal_the_authors_code(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = _compare(Authors(name, dtype, monkeypatch), name, dtype)
    if dtype == torch.float64:
        assert max(errors.values()) < 1e-9, errors
    assert errors["features"] < 1e-6 and errors["loss"] < 1e-5, errors
    # Adam divides by the gradient's own size: where that is rounding alone, so is the step, and a
    # few single parameters differ. All of them together agree to 1e-5.
    assert errors["weights"] < 1e-5 and errors["trained features"] < 2e-5, errors
    assert errors["gradients"] < 1e-4 and errors["course"] < 1e-3, errors


@needs_their_code
def test_drifting_statistics_equal_the_authors_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Authors("convse", torch.float64, monkeypatch)
    ours = _ours(theirs.states(), torch.float64, drifts=True).train()
    theirs.vse.train_start()  # their frozen trunk trains along: its statistics move
    pairs = Pairs.draw(0, torch.float64)
    outputs = ours(**ours.prepare(images=pairs.images, tokens=pairs.tokens))
    assert _largest(zip(outputs[:2], theirs.features(pairs), strict=True)) < 1e-10
    for mode in (ours, theirs.vse.img_enc, theirs.vse.txt_enc):
        mode.eval()  # which now uses the moved statistics
    outputs = ours(**ours.prepare(images=pairs.images, tokens=pairs.tokens))
    assert _largest(zip(outputs[:2], theirs.features(pairs), strict=True)) < 1e-10


def test_a_drifting_trunk_depends_on_its_chunk_and_a_frozen_one_does_not() -> None:
    pairs = Pairs.draw(0, torch.float64)
    for drifts in (False, True):
        model = _ours(Oracle("convse").states(), torch.float64, drifts=drifts).train()
        before = model.image.trunk.backbone.bn1.running_mean.clone()
        whole = model.prepare(images=pairs.images, tokens=pairs.tokens)["image_hidden"]
        half = model.prepare(images=pairs.images[:6], tokens=pairs.tokens[:6])["image_hidden"]
        moved = not torch.equal(model.image.trunk.backbone.bn1.running_mean, before)
        assert moved == drifts
        assert torch.allclose(whole[:6], half, rtol=1e-9) != drifts
