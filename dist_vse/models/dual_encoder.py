"""The model: two towers into one space.

Shape letters: b pairs, h w pixels, l tokens, d the shared space.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dist_vse.distributed import all_reduce_mean
from dist_vse.losses.temperature import bounded
from dist_vse.models.precision import at_least_float32
from dist_vse.models.vectors import StoredVectors

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Tower(nn.Module):
    """One modality: a trunk, and the head that maps its output onto the unit sphere."""

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        frozen: bool,
        drifting_statistics: bool = False,
    ) -> None:
        """Join trunk and head; a frozen trunk gets no gradient and stays in eval mode.

        So do those modules of a trunk that learns of which all parameters are frozen already.
        With `drifting_statistics` their mode changes with the tower's, as in the authors' code.
        """
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval() if frozen else trunk
        self.head = head
        self.frozen = frozen
        self.replays = False
        """Whether the trunk is a recorded CUDA graph, each of whose replays writes where the one
        before wrote; see `use_cuda_graphs`."""
        self.drifting_statistics = drifting_statistics
        self._keep_frozen()

    def train(self, mode: bool = True) -> "Tower":
        """Set the mode of all but what is frozen."""
        super().train(mode)
        self._keep_frozen()
        return self

    def _keep_frozen(self) -> None:
        """Put a frozen trunk into eval mode, or the modules of it that are."""
        if self.drifting_statistics:
            return
        for module in self.trunk.modules():
            parameters = list(module.parameters())
            if self.frozen or (parameters and not any(p.requires_grad for p in parameters)):
                module.eval()

    def hidden(self, raw: Tensor) -> Tensor:
        """Return the trunk's output, float32, for images or tokens."""
        # The trunk is called as a module: under ZeRO-3 that call fetches its parameters.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output: Tensor = self.trunk(raw)
        if self.replays:
            output = output.clone()
        return at_least_float32(output)

    def forward(self, raw: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Return unit-length float32 features (b, d) of raw input or of the trunk's output."""
        assert (raw is None) != (hidden is None), "give the raw input or the trunk's output"
        hidden = self.hidden(cast(Tensor, raw)) if hidden is None else hidden
        return functional.normalize(at_least_float32(self.head(hidden)), dim=-1)


class DualEncoder(nn.Module):
    """An image tower and a text tower, with the temperature and the bias of the loss.

    A frozen trunk is run once a step: `prepare` puts its output where the raw input was, and
    `forward` takes either. To the train step all models are the same:

        inputs = model.prepare(images=images, tokens=tokens)   # split these by rows
        outputs = model(**inputs)
    """

    def __init__(
        self,
        image: Tower,
        text: Tower,
        *,
        temperature: float,
        learn_temperature: bool,
        bias: float,
        learn_bias: bool,
    ) -> None:
        """Join the towers; `log_scale` starts at log(1 / temperature)."""
        super().__init__()
        self.image = image
        self.text = text
        self.has_adapters = False
        self.base_digest: str | None = None
        """Of the weights that adapters leave as they are, and a checkpoint leaves out."""
        # Of shape (1,): DeepSpeed cannot send parameters without a dimension.
        self.log_scale = nn.Parameter(
            torch.tensor([-math.log(temperature)]), requires_grad=learn_temperature
        )
        self.bias = nn.Parameter(torch.tensor([bias]), requires_grad=learn_bias)

    def prepare(
        self,
        *,
        images: Tensor | None = None,
        tokens: Tensor,
        image_hidden: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what `forward` needs, by keyword: all of it has b rows, negatives (m, l) have m.

        Raw input (b, 3, h, w) and (b, l) for a trunk that learns; for a frozen one its output,
        which is computed unless it is given.
        """
        self._begin()
        if negatives is None:
            texts = _prepare(self.text, "tokens", "text_hidden", tokens)
        elif self.text.frozen:
            (both,) = _prepare(
                self.text, "tokens", "text_hidden", _joined(tokens, negatives)
            ).values()
            texts = {"text_hidden": both[: len(tokens)], "negatives": both[len(tokens) :]}
        else:  # where they lie: a GPU copies from pinned memory
            texts = {"tokens": tokens, "negatives": negatives}
        if image_hidden is not None:
            assert self.image.frozen, "the outputs of a trunk that learns change"
            return {"image_hidden": image_hidden, **texts}
        assert images is not None
        return {**_prepare(self.image, "images", "image_hidden", images), **texts}

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        image_hidden: Tensor | None = None,
        text_hidden: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return features (b, d) of images and captions, log_scale (1,) and bias (1,).

        Images are uint8 (b, 3, h, w), or float if already normalised; tokens int64 (b, l). Either
        may be replaced by its trunk's output. The features are float32 and of unit length.
        Negatives (m, l), or their trunk's output, add features (m, d) at the end: they are encoded
        together with the captions, since there may be none.
        """
        self._begin()
        image_features = self.image(images, image_hidden)  # (b, d)
        if text_hidden is None:
            assert tokens is not None
            text_features = self.text(_joined(tokens, negatives))  # (b + m, d)
        else:
            text_features = self.text(None, _joined(text_hidden, negatives))
        # Copies: under ZeRO-3 the parameters themselves are gone when forward returns.
        scalars = bounded(self.log_scale), self.bias.clone()
        if negatives is None:
            return image_features, text_features, *scalars
        rows = len(image_features)
        return image_features, text_features[:rows], *scalars, text_features[rows:]

    def encode_images(self, images: Tensor) -> Tensor:
        """Return unit-length float32 features (b, d) of images (b, 3, h, w)."""
        self._begin()
        features: Tensor = self.image(images)
        return features

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Return unit-length float32 features (b, d) of tokens (b, l)."""
        self._begin()
        features: Tensor = self.text(tokens)
        return features

    def use_cuda_graphs(self) -> None:
        """Make it safe that the trunks are CUDA graphs: compiled with mode="reduce-overhead".

        Nothing outside of a trunk may hold what the next replay writes over. So a trunk's output
        and its parameters' gradients are copied, and a chunk's activations last until the next
        forward: its backward must come before.
        """
        for tower in (self.image, self.text):
            tower.replays = True
            for parameter in tower.trunk.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(torch.clone)

    def _begin(self) -> None:
        """Let the trunks' replays write over those of the chunk before."""
        if self.image.replays:
            torch.compiler.cudagraph_mark_step_begin()


def _joined(texts: Tensor, negatives: Tensor | None) -> Tensor:
    return texts if negatives is None else torch.cat([texts, negatives])


def _prepare(tower: Tower, raw_name: str, hidden_name: str, raw: Tensor) -> dict[str, Tensor]:
    if not tower.frozen:
        return {raw_name: raw}
    here = next(tower.parameters()).device
    return {hidden_name: tower.hidden(raw.to(here, non_blocking=True))}


def made_up_pairs(
    model: DualEncoder, rows: int, *, image_size: int, num_tokens: int, negatives: int = 0
) -> dict[str, Tensor]:
    """Return black images and captions without padding, on the host, as `prepare` takes them.

    With so many `negatives` a pair.
    """
    word = 1 if getattr(model.text.trunk, "pad_id", 0) == 0 else 0
    made_up = {
        "images": made_up_images(model.image.trunk, rows, image_size),
        "tokens": torch.full((rows, num_tokens), word),
    }
    if negatives:
        made_up["negatives"] = torch.full((rows * negatives, num_tokens), word)
    return made_up


def made_up_images(trunk: nn.Module, rows: int, size: int) -> Tensor:
    """Return black images uint8 (rows, 3, size, size), or vectors (rows, size) of zeros."""
    if isinstance(trunk, StoredVectors):
        return torch.zeros(rows, size)
    return torch.zeros(rows, 3, size, size, dtype=torch.uint8)


def average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over the ranks, each of which saw its own rows."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            all_reduce_mean(module.running_mean)
            all_reduce_mean(module.running_var)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are; outputs do not change.

    Gradient caching runs every chunk twice, and gradient checkpointing runs it again in backward:
    with all but one of these in this context (backward included) the statistics move once a step.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    kept = [{name: getattr(layer, name) for name in _STATISTICS} for layer in layers]
    for layer, own in zip(layers, kept, strict=True):
        # Copies move instead. With track_running_stats=False, nothing would; but then a forward
        # saves two tensors fewer, and gradient checkpointing compares it with the first one.
        for name, value in own.items():
            setattr(layer, name, None if value is None else value.clone())
    try:
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            for name, value in own.items():
                setattr(layer, name, value)
