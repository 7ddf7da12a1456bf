"""Zero-shot classification: the class whose name, in templates, fits an image best.

As CLIP does (https://arxiv.org/abs/2103.00020): every class's name stands in each template, the
unit features of these texts are averaged, and an image is of the class whose mean fits best.
Shapes: n images, t texts, k classes, d embedding.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.data.decode import BadSampleError, Transform, decode_image
from dist_vse.data.eval_stream import BATCHES_AHEAD, eval_share
from dist_vse.data.samples import Placement, Tokenizer
from dist_vse.data.workers import run_workers
from dist_vse.distributed import watchdog
from dist_vse.evaluation.class_folder import ClassFolder
from dist_vse.evaluation.evaluate import Encoders, eval_mode
from dist_vse.evaluation.retrieval.checks import check_finite
from dist_vse.evaluation.retrieval.scoring import TIE
from dist_vse.models.precision import evaluation_autocast

TEXTS = 256  # a batch


def classify(
    model: Encoders,
    folder: ClassFolder,
    tokenizer: Tokenizer,
    transform: Transform,
    *,
    batch_size: int,
    num_workers: int = 0,
    precision: str = "fp32",
) -> dict[str, float]:
    """Return the accuracies of a model, of which each rank encodes a share; see `accuracies`.

    Batches hold the same images and texts for any number of ranks, so the result is the same to
    the bit. Every rank calls this. Raises UserError, on every rank, for an image that can't be
    read and for features that are not finite.
    """
    files = [file for of_class in folder.files for file in of_class]
    here, placement = distributed.device(), Placement(distributed.rank(), distributed.world_size())
    start, stop = eval_share(len(files), batch_size, placement)
    share = _Images(files, start, stop, batch_size, transform)
    first, last = eval_share(len(folder.texts), TEXTS, placement)
    with (
        distributed.raise_on_all_ranks(),
        torch.no_grad(),
        eval_mode(model),
        evaluation_autocast(here, precision),
    ):
        batches = run_workers(share, num_workers=num_workers, prefetch=BATCHES_AHEAD)
        images = [model.encode_images(pixels.to(here)) for pixels in watchdog.each(batches)]
        pieces = (folder.texts[i : min(i + TEXTS, last)] for i in range(first, last, TEXTS))
        texts = [model.encode_texts(tokenizer(piece).to(here)) for piece in pieces]
    features, of_texts = _gathered(images), _gathered(texts)  # (n, d), (t, d)
    found: dict[str, float] = {}
    with distributed.raise_on_all_ranks():
        if distributed.is_main_process():  # the rest on one rank, for ranks may share the cores
            check_finite(features, of_texts)
            weights = class_directions(of_texts, len(folder.names))
            sizes = [len(of_class) for of_class in folder.files]
            found = accuracies(features.split(sizes), weights, top=None)
    found = distributed.broadcast_object(found)
    return found


def class_directions(texts: Tensor, num_classes: int) -> Tensor:
    """Return each class's direction (k, d) of its texts' features (t, d): their mean's."""
    by_class = texts.view(num_classes, -1, texts.shape[1]).double()
    return normalize(by_class.mean(1), dim=1).to(torch.float32)


def accuracies(
    features: Sequence[Tensor], weights: Tensor, *, top: list[int] | None
) -> dict[str, float]:
    """Return percentages: `topK` for each K, `mean_per_class` of the first place, and `chance`.

    `features` are each class's images (n, d). Without `top` K is 1, and 5 where there are more
    classes. Ties count as the mean over their orders.
    """
    ks = top or [k for k in (1, 5) if k < len(weights)]
    reached = {
        k: [_reached(own, weights, right=number, k=k) for number, own in enumerate(features)]
        for k in {1, *ks}
    }
    sizes = [len(own) for own in features]
    result = {f"top{k}": 100 * sum(reached[k]) / sum(sizes) for k in ks}
    per_class = [hits / size for hits, size in zip(reached[1], sizes, strict=True)]
    result["mean_per_class"] = 100 * sum(per_class) / len(per_class)
    return result | {"chance": 100 / len(weights)}


def _reached(features: Tensor, weights: Tensor, *, right: int, k: int) -> float:
    """Return how many of a class's images (n, d) have it among their first k, ties shared."""
    total = 0.0
    for rows in features.double().split(1024):
        over = rows @ weights.double().T  # (n, k)
        over -= over[:, right, None].clone()
        better, tied = (over > TIE).sum(1), (over.abs() <= TIE).sum(1)  # itself is tied
        total += float(((k - better) / tied).clamp(0, 1).sum())
    return total


def _gathered(pieces: list[Tensor]) -> Tensor:
    """Return all ranks' rows on the CPU, in order; a rank may have none."""
    widths = distributed.all_gather_object(pieces[0].shape[1] if pieces else 0)
    none = torch.empty(0, max(widths), device=distributed.device())
    return distributed.all_gather_rows(torch.cat([none, *pieces])).cpu()


@dataclass(frozen=True)
class _Images:
    """Files [start, stop); worker w of n makes the batches w, w + n, ..."""

    files: list[Path]
    start: int
    stop: int
    batch_size: int
    transform: Transform

    def __call__(self, worker: int, num_workers: int) -> Generator[Tensor, None, None]:
        step = self.batch_size * num_workers
        for start in range(self.start + worker * self.batch_size, self.stop, step):
            files = self.files[start : min(start + self.batch_size, self.stop)]
            yield torch.stack([self._pixels(file) for file in files])

    def _pixels(self, file: Path) -> Tensor:
        try:
            return torch.from_numpy(decode_image(file.read_bytes(), self.transform).copy())
        except (BadSampleError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); give an image file") from error
