"""The peers, each in a few lines: what their users write."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.version import __version__
from dist_vse.losses.module import GlobalContrastiveLoss
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.tools.verify.conformance.case import CHUNK, LOG_SCALE, Pairs, Step, Towers, Wrapper
from dist_vse.tools.verify.peer import Loss, peer_losses
from dist_vse.training.cached_step import cached_step

OURS = "dist_vse"
PACKAGES = {
    OURS: OURS,
    "open_clip": "open_clip_torch",
    "sentence_transformers": "sentence-transformers",
    "grad_cache": "gradcache",
}
"""The peers by the names of their packages."""
EXACT_FLAGS = "local_loss=True, gather_with_grad=True"  # OpenCLIP's


@dataclass(frozen=True)
class Setting:
    """A peer with some of its settings."""

    peer: str
    label: str
    step: Step
    symmetric: bool = True
    """Both directions (CLIP's InfoNCE), or texts of images alone."""
    learns_temperature: bool = True
    cached: bool = False
    shared: bool = False
    """Whether one encoder serves both sides."""
    own_loop: bool = False
    """Whether it is a library's whole loop, which knows no DeepSpeed."""


def version(peer: str) -> str:
    """Return a peer's version. Raises UserError where it is not installed."""
    if peer == OURS:
        return __version__
    try:
        return metadata.version(PACKAGES[peer])
    except metadata.PackageNotFoundError:
        raise UserError(
            f"--peer {peer}: it is not installed; pip install {PACKAGES[peer]}"
        ) from None


def settings(peer: str) -> Sequence[Setting]:
    """Return what is measured of a peer."""
    return {
        OURS: _ours,
        "open_clip": _open_clip,
        "sentence_transformers": _sentence_transformers,
        "grad_cache": _grad_cache,
    }[peer]()


def _ours() -> list[Setting]:
    return [
        Setting(OURS, "GlobalContrastiveLoss", _our_loss),
        Setting(OURS, "cached_step", _our_cached_step, cached=True),
    ]


def _our_loss(towers: Towers, pairs: Pairs, wrapper: Wrapper) -> None:
    features = wrapper.wrap(towers)(*pairs)
    wrapper.backward(GlobalContrastiveLoss("info_nce", learned=False)(*features))


def _our_cached_step(towers: Towers, pairs: Pairs, wrapper: Wrapper) -> None:
    loss = GlobalContrastiveLoss("info_nce", learned=False)
    cached_step(wrapper.wrap(towers), loss, tuple(pairs), chunk_size=CHUNK)


def _open_clip() -> list[Setting]:
    found = [
        Setting("open_clip", flags, partial(_open_clip_loss, loss))
        for flags, loss in peer_losses().items()
    ]
    label = f"{EXACT_FLAGS}, accum_freq=3"
    return [
        *found,
        Setting("open_clip", label, _open_clip_accumulation, cached=True, own_loop=True),
    ]


def _open_clip_loss(loss: Loss, towers: Towers, pairs: Pairs, wrapper: Wrapper) -> None:
    images, texts, scale = wrapper.wrap(towers)(*pairs)
    wrapper.backward(loss(images, texts, scale.log()))


class AsOpenClip(nn.Module):
    """Two towers with the outputs and the attribute that OpenCLIP's loop works with.

    `towers` returns features of images and captions first, and has log(1/t) as `log_scale`.
    """

    def __init__(self, towers: Towers | DualEncoder) -> None:
        super().__init__()
        self.towers = towers

    @property
    def logit_scale(self) -> nn.Parameter:
        """OpenCLIP's name of log(1/t), which its loop bounds after the step."""
        return self.towers.log_scale

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return features (b, d) and 1/t (1,), by OpenCLIP's names."""
        image_features, text_features, *_ = self.towers(images, texts)
        return {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": self.logit_scale.exp(),
        }


def _open_clip_accumulation(towers: Towers, pairs: Pairs, wrapper: Wrapper) -> None:
    """Run one step of OpenCLIP's own `train_one_epoch` that changes no weight."""
    from open_clip_train.train import train_one_epoch

    parts = list(zip(*(x.split(CHUNK) for x in pairs), strict=True))
    loader = _Loader(parts, num_samples=len(pairs.images) * distributed.world_size())
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    loss = peer_losses()[EXACT_FLAGS]
    args = SimpleNamespace(
        accum_freq=len(parts),
        batch_size=CHUNK,
        device="cpu",
        distill=False,
        grad_clip_norm=None,
        horovod=False,
        local_rank=distributed.rank(),
        log_every_n_steps=1,
        log_local=False,
        precision="fp32",
        rank=distributed.rank(),
        skip_scheduler=True,
        wandb=False,
        world_size=distributed.world_size(),
    )
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.0)

    def as_module(image_features: Tensor, text_features: Tensor, **others: Any) -> Any:
        total = loss(image_features, text_features, others["logit_scale"].log())
        return {"contrastive_loss": total} if others.get("output_dict") else total

    model = wrapper.wrap(AsOpenClip(towers))
    train_one_epoch(model, data, as_module, 0, optimizer, None, None, None, args)


class _Loader:
    """A data loader of the parts of one step."""

    def __init__(self, parts: list[tuple[Tensor, ...]], *, num_samples: int) -> None:
        self.parts, self.num_batches, self.num_samples = parts, len(parts), num_samples

    def __iter__(self) -> Any:
        return iter(self.parts)


def _sentence_transformers() -> list[Setting]:
    found = []
    for name, cached in (
        ("MultipleNegativesRankingLoss", False),
        ("CachedMultipleNegativesRankingLoss", True),
    ):
        for gather in (False, True):
            found.append(
                Setting(
                    "sentence_transformers",
                    f"{name}, gather_across_devices={gather}",
                    partial(_ranking_loss, name, gather),
                    symmetric=False,
                    learns_temperature=False,
                    cached=cached,
                    shared=True,
                )
            )
    return found


class _Encoder(nn.Module):
    """The one encoder of both sides, as a module of sentences."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.tower(features["input_ids"])}


def _ranking_loss(name: str, gather: bool, towers: Towers, pairs: Pairs, wrapper: Wrapper) -> None:
    losses = import_module("sentence_transformers.sentence_transformer.losses")
    # It calls collectives that PyTorch has renamed: nothing that a user can mend.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.\w+ is deprecated")
    model = nn.Sequential(_Encoder(towers.image))
    options: dict[str, Any] = {"mini_batch_size": CHUNK} if name.startswith("Cached") else {}
    scale = float(torch.tensor(LOG_SCALE).exp())
    loss = getattr(losses, name)(model, scale=scale, gather_across_devices=gather, **options)
    loss.model = wrapper.wrap(model)  # as their trainer does
    wrapper.backward(loss([{"input_ids": x} for x in pairs], None))


def _grad_cache() -> list[Setting]:
    found = []
    for name in ("SimpleContrastiveLoss", "DistributedContrastiveLoss"):
        found.append(
            Setting(
                "grad_cache",
                name,
                partial(_grad_cache_step, name),
                symmetric=False,
                learns_temperature=False,
                cached=True,
            )
        )
    return found


def _grad_cache_step(name: str, towers: Towers, pairs: Pairs, wrapper: Wrapper) -> None:
    # Its package (0.0.1) imports its own modules as grad_cache, but installs them as gradcache.
    for module in ("", ".context_managers", ".loss"):
        sys.modules[f"grad_cache{module}"] = import_module(f"gradcache{module}")
    losses, library = (import_module(f"gradcache.{part}") for part in ("loss", "grad_cache"))
    loss: Callable[..., Tensor] = getattr(losses, name)()
    scale = float(torch.tensor(LOG_SCALE).exp())
    cache = library.GradCache(
        models=[wrapper.wrap(towers.image), wrapper.wrap(towers.text)],
        chunk_sizes=CHUNK,
        loss_fn=lambda x, y: loss(x * scale, y),
    )
    cache(*pairs, no_sync_except_last=wrapper.has_no_sync)
