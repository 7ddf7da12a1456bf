"""MTEB, with its benchmarks of images (MIEB): our model as one of its encoders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from dist_vse.common.errors import UserError
from dist_vse.tools.export.load import Embedder

Metrics = dict[str, float]


def run(embedder: Embedder, tasks: Sequence[str], out: Path) -> dict[str, Metrics]:
    """Run tasks by name, whose data mteb downloads; return each one's main score.

    Raises UserError for a task of an unknown name.
    """
    import mteb

    try:
        found = mteb.get_tasks(tasks=list(tasks))
    except KeyError as error:
        raise UserError(
            f"--tasks: mteb knows no {error}; `mteb available-tasks` lists them"
        ) from error
    return evaluate(embedder, found, out)


def evaluate(embedder: Embedder, tasks: Iterable[Any], out: Path) -> dict[str, Metrics]:
    """Evaluate mteb's task objects; a JSON file a task lies in `out` then."""
    import mteb

    result = mteb.evaluate(_encoder(embedder), list(tasks), cache=None, show_progress_bar=False)
    found = {}
    for task in result.task_results:
        task.to_disk(out / f"{task.task_name}.json")
        found[task.task_name] = {"main_score": float(task.get_score())}
    return found


def _encoder(embedder: Embedder) -> Any:
    """Return the model as an encoder of mteb."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    class Encoder(AbsEncoder):  # type: ignore[misc]  # mteb is not looked at
        mteb_model_meta = ModelMeta.create_empty(
            {
                "name": "dist_vse/run",
                "embed_dim": embedder.dim,
                "modalities": ["image", "text"],
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

        def encode(self, inputs: Iterable[dict[str, Any]], **_: Any) -> Any:
            """Return features (n, d); of an item with both image and text, the mean's direction."""
            parts = []
            for batch in inputs:
                sides = []
                if "image" in batch:
                    sides.append(embedder.encode_images(batch["image"]))
                if "text" in batch:
                    sides.append(embedder.encode_texts(batch["text"]))
                parts.append(normalize(torch.stack(sides).sum(0), dim=1))
            return torch.cat(parts).numpy()

    return Encoder()
