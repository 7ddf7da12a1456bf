"""`dist-vse zeroshot`: classify images by the captions that name their classes.

As CLIP does (https://arxiv.org/abs/2103.00020): every class's name stands in each template, the
unit features of these texts are averaged, and an image is of the class whose mean fits best.
Shapes: n images, d embedding.
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from dist_vse.common.errors import UserError
from dist_vse.common.files import is_leftover
from dist_vse.common.log import setup_logging
from dist_vse.common.reading import BadFileError, read_text
from dist_vse.common.terminal import plain
from dist_vse.data.image_names import is_image_name
from dist_vse.evaluation.retrieval.checks import check_finite
from dist_vse.evaluation.retrieval.scoring import TIE
from dist_vse.tools.export.load import Embedder
from dist_vse.tools.search.embed import open_model

TEMPLATE = "a photo of a {}."
"""What CLIP's users expect where they give no templates."""


def zeroshot(
    location: Path,
    *,
    data: Path,
    classes: Path | None,
    templates: Path | None,
    top: list[int] | None,
) -> dict[str, float]:
    """Classify a folder of one folder a class; print and return the accuracies.

    `classes` names the classes in words, a line `FOLDER<TAB>NAME` each; without it the folders'
    names are the words. `templates` is a file of lines with a `{}`; without it `TEMPLATE` alone.
    `top` are the Ks of top-K accuracy, fewer than there are classes; without it 1, and 5 where
    there are more classes. Ties count as the mean over their orders.
    Raises UserError for a folder without images, a class without a name, a broken image, and
    features that are not finite.
    """
    setup_logging()
    found = _read_folder(data)
    ks = _check_top(top, len(found), data)
    names = _read_names(classes, list(found))
    lines = _read_templates(templates)
    model = open_model(location)
    weights = class_features(model, list(names.values()), lines)  # (classes, d)
    reached: dict[int, list[float]] = {k: [] for k in {1, *ks}}  # sums over a class's images
    for number, files in enumerate(found.values()):
        features = model.encode_images(files)
        check_finite(features, weights)
        for k, values in reached.items():
            values.append(_reached(features, weights, right=number, k=k))
    sizes = [len(files) for files in found.values()]
    result = {f"top{k}": 100 * sum(reached[k]) / sum(sizes) for k in ks}
    per_class = [hits / size for hits, size in zip(reached[1], sizes, strict=True)]
    result["mean_per_class"] = 100 * sum(per_class) / len(per_class)
    result["chance"] = 100 / len(found)
    how = f"template “{lines[0]}”" if len(lines) == 1 else f"{len(lines)} templates"
    table = Table("", "%", title=plain(f"{sum(sizes):,} images, {len(found):,} classes, {how}"))
    for key, value in result.items():
        table.add_row(key.replace("top", "top-").replace("_", " "), f"{value:.1f}")
    Console().print(table)
    return result


def _reached(features: Tensor, weights: Tensor, *, right: int, k: int) -> float:
    """Return how many of a class's images (n, d) have it among their first k, ties shared."""
    total = 0.0
    for rows in features.double().split(1024):
        over = rows @ weights.double().T  # (n, classes)
        over -= over[:, right, None].clone()
        better, tied = (over > TIE).sum(1), (over.abs() <= TIE).sum(1)  # itself is tied
        total += float(((k - better) / tied).clamp(0, 1).sum())
    return total


def _check_top(top: list[int] | None, classes: int, data: Path) -> list[int]:
    """Return the Ks. Raises UserError for one that every image reaches."""
    if classes < 2:
        raise UserError(f"{data}: holds one class, which every image is of; give two or more")
    for k in top or []:
        if k >= classes:
            raise UserError(
                f"--top {k} of {classes} classes is always 100 %: give at most {classes - 1}"
            )
    return top or [k for k in (1, 5) if k < classes]


def class_features(model: Embedder, names: list[str], templates: list[str]) -> Tensor:
    """Return each class's direction, (classes, d): the mean over the templates, of unit length."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = model.encode_texts(texts).view(len(names), len(templates), -1)
    return normalize(features.double().mean(1), dim=1).to(torch.float32)


def _read_folder(data: Path) -> dict[str, list[Path]]:
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; give a folder with one folder of images a class")
    found = {
        folder.name: sorted(
            f
            for f in folder.rglob("*")
            if is_image_name(f.name) and not is_leftover(f.relative_to(folder))
        )
        for folder in sorted(data.iterdir())
        if folder.is_dir() and not is_leftover(folder.name)
    }
    empty = [name for name, files in found.items() if not files]
    if not found or empty:
        where = f"{data / empty[0]}" if empty else f"{data}"
        raise UserError(f"{where}: no image here; give a folder with one folder of images a class")
    return found


def _read_names(path: Path | None, folders: list[str]) -> dict[str, str]:
    """Return each folder's name in words, in the order of the folders."""
    if path is None:
        return {folder: folder.replace("_", " ").replace("-", " ") for folder in folders}
    pairs = [line.split("\t", 1) for line in _lines(path)]
    broken = [number for number, pair in enumerate(pairs, 1) if len(pair) != 2]
    if broken:
        raise UserError(f"{path}: line {broken[0]} is not FOLDER<TAB>NAME; mend it")
    names = {folder.strip(): name.strip() for folder, name in pairs}
    missing = [folder for folder in folders if not names.get(folder)]
    if missing:
        raise UserError(f"{path}: names no class for the folder {missing[0]!r}; add a line")
    return {folder: names[folder] for folder in folders}


def _read_templates(path: Path | None) -> list[str]:
    if path is None:
        return [TEMPLATE]
    lines = _lines(path)
    bare = [line for line in lines if "{}" not in line]
    if bare or not lines:
        what = repr(bare[0]) if bare else "the file"
        raise UserError(
            f"{path}: {what} has no {{}} for the class; write lines like a photo of a {{}}"
        )
    return lines


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    return [line for line in text.splitlines() if line.strip()]
