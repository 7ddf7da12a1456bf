"""`dist-vse zeroshot`: classify images by the captions that name their classes."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.common.log import setup_logging
from dist_vse.common.terminal import plain
from dist_vse.evaluation.class_folder import read_class_folder
from dist_vse.evaluation.retrieval.checks import check_finite
from dist_vse.evaluation.zeroshot import accuracies, class_directions
from dist_vse.tools.export.load import Embedder
from dist_vse.tools.search.embed import open_model


def zeroshot(
    location: Path,
    *,
    data: Path,
    classes: str | Path | None,
    templates: str | Path | None,
    top: list[int] | None,
) -> dict[str, float]:
    """Classify a folder of one folder a class; print and return the accuracies.

    See `read_class_folder` for `classes` and `templates`. `top` are the Ks of top-K accuracy, fewer
    than there are classes. Raises UserError for what can't be read, and for features that are not
    finite.
    """
    setup_logging()
    folder = read_class_folder(data, classes, templates)
    _check_top(top, len(folder.names))
    model = open_model(location)
    weights = class_features(model, folder.names, folder.templates)  # (classes, d)
    features = [model.encode_images(files) for files in folder.files]
    for own in features:
        check_finite(own, weights)
    result = accuracies(features, weights, top=top)
    lines, images = folder.templates, sum(map(len, folder.files))
    how = f"template “{lines[0]}”" if len(lines) == 1 else f"{len(lines)} templates"
    title = f"{images:,} images, {len(folder.names):,} classes, {how}"
    table = Table("", "%", title=plain(title))
    for key, value in result.items():
        table.add_row(key.replace("top", "top-").replace("_", " "), f"{value:.1f}")
    Console().print(table)
    return result


def class_features(model: Embedder, names: list[str], templates: list[str]) -> Tensor:
    """Return each class's direction, (classes, d): the mean over the templates, of unit length."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    return class_directions(model.encode_texts(texts), len(names))


def _check_top(top: list[int] | None, classes: int) -> None:
    """Raise UserError for a K that every image reaches."""
    for k in top or []:
        if k >= classes:
            raise UserError(
                f"--top {k} of {classes} classes is always 100 %: give at most {classes - 1}"
            )
