"""CLIP_benchmark: its data sets, loops and prompts, with our model.

Its own command ends in an error with NumPy 2.4, in the one function that counts right answers of a
classification. So the counts are made here; all else is its own code.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dist_vse.common.errors import UserError, first_line
from dist_vse.tools.export.load import Embedder, read_pixels

Metrics = dict[str, float]
BATCH = 64
RECALLS = (1, 5, 10)
_HUB = "https://huggingface.co/datasets/clip-benchmark/wds_{}/tree/main"


def run(embedder: Embedder, tasks: Sequence[str], out: Path) -> dict[str, Metrics]:
    """Measure on data sets: folders in its WebDataset layout, or names as `wds/cifar10`.

    It downloads those of a name. Raises UserError for a data set that it can't open.
    """
    import clip_benchmark.metrics  # noqa: F401  # that it is missing is said before data sets are

    found = {}
    for task in tasks:
        name = Path(task).name
        found[name] = metrics = _measure(embedder, *_open(embedder, task))
        (out / f"{name}.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return found


def _open(embedder: Embedder, task: str) -> tuple[Any, DataLoader[Any]]:
    """Return a data set, and batches of its pixels and answers."""
    from clip_benchmark.datasets.builder import build_wds_dataset

    folder = Path(task)
    if not folder.is_dir() and not task.startswith("wds/"):
        raise UserError(
            f"--tasks {task}: no such folder; give one in CLIP_benchmark's WebDataset layout, or "
            "a name of its collection, such as wds/cifar10"
        )
    root = task if folder.is_dir() else _HUB.format(task.removeprefix("wds/").replace("/", "-"))
    try:
        data = build_wds_dataset(
            folder.name,
            transform=lambda image: read_pixels([image], embedder.square)[0],
            data_dir=root,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--tasks {task}: can't be opened ({first_line(error)})") from error
    return data, DataLoader(data.batched(BATCH), batch_size=None)


def _measure(embedder: Embedder, data: Any, batches: DataLoader[Any]) -> Metrics:
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, here = _Encoders(embedder), embedder.device.type
    if data.classes is None:
        how = {"device": here, "amp": False, "recall_k_list": list(RECALLS)}
        return dict(zeroshot_retrieval.evaluate(model, batches, embedder.tokenizer, **how))
    weights = zeroshot_classification.zero_shot_classifier(
        model, embedder.tokenizer, data.classes, data.templates, here, amp=False
    )
    logits, right = zeroshot_classification.run_classification(
        model, weights, batches, here, amp=False
    )
    if right.ndim == 2:
        each = zeroshot_classification.average_precision_per_class(logits, right)
        return {"mean_average_precision": each.mean().item()}
    hits = logits.topk(min(5, logits.shape[1])).indices == right[:, None]
    of_class = [hits[right == c, 0].double().mean() for c in right.unique()]
    accuracies = {
        f"acc{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5) if k <= logits.shape[1]
    }
    return accuracies | {"mean_per_class_recall": torch.stack(of_class).mean().item()}


class _Encoders(nn.Module):
    """The model as CLIP_benchmark calls it."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.model = embedder.model

    def encode_image(self, images: Tensor) -> Tensor:
        """Return features (n, d) of pixels."""
        return self.model.encode_images(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return features (n, d) of tokens."""
        return self.model.encode_texts(tokens)
