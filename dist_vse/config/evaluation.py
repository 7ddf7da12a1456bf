"""What a run is evaluated on besides its own split, and by which number it is judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import is_number
from dist_vse.config.checks import check

RETRIEVAL_METRICS = (
    "rsum",
    *(f"{way}_{part}" for way in ("i2t", "t2i") for part in ("r1", "r5", "r10", "map")),
)
ZEROSHOT_METRICS = ("top1", "top5", "mean_per_class")
VAL_LOSS = "val_loss"


@dataclass(frozen=True)
class EvalSetConfig:
    """A further set to evaluate on (an item of `eval_sets`): a split, or images by class."""

    name: str = ""
    """What its metrics begin with in the log: `NAME/rsum` of a split, `NAME/top1` of classes."""
    split: str = ""
    """Split to retrieve in."""
    index: str = ""
    """Folder of the split's data set; empty: `data.index`."""
    protocol: str = "plain"
    """`plain`, `coco-5k`, `coco-1k` or `flickr-1k`, as in `dist-vse eval --protocol`."""
    zeroshot: str = ""
    """Folder of images to classify, with one folder a class, in the place of a split."""
    classes: str = ""
    """What the classes are called: a file of lines FOLDER<TAB>NAME, or `imagenet` for folders that
    are named by WordNet id; empty: the folders' names."""
    templates: str = ""
    """A file of lines with a {} for the name, or `clip` for CLIP's 80; empty: that of a photo."""

    def __post_init__(self) -> None:
        where = f"eval_sets: {self.name or 'an item'}"
        check(
            self.name != "" and "/" not in self.name,
            f"{where} needs a name without a slash; its metrics begin with it",
        )
        check(
            (self.split == "") != (self.zeroshot == ""),
            f"{where} needs either a split to retrieve in, or a folder of classes in zeroshot",
        )
        check(
            self.split == "" or not (self.classes or self.templates),
            f"{where}: classes and templates are for a folder in zeroshot",
        )
        check(
            self.zeroshot == "" or (self.index == "" and self.protocol == "plain"),
            f"{where}: index and protocol are for a split",
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """By what a run may be judged on this set."""
        return RETRIEVAL_METRICS if self.split else ZEROSHOT_METRICS


def check_sets(sets: Sequence[EvalSetConfig], best_metric: str, *, val_loss: bool) -> None:
    """Check that the sets have names of their own and that `best_metric` is measured."""
    names = [item.name for item in sets]
    check(len({*names}) == len(names), f"eval_sets: names must differ ({', '.join(names)})")
    if best_metric == VAL_LOSS:
        check(val_loss, "best_metric=val_loss needs eval_loss=true, which measures it")
        return
    name, _, metric = best_metric.rpartition("/")
    found = {item.name: item.metrics for item in sets} | {"": RETRIEVAL_METRICS}
    if metric not in found.get(name, ()):
        choices = [*RETRIEVAL_METRICS, VAL_LOSS]
        choices += [f"{item.name}/{item.metrics[0]}" for item in sets]
        raise UserError(
            f"best_metric={best_metric!r} is not measured; choose from {', '.join(choices)}"
        )


def score_of(best_metric: str, values: Mapping[str, Any]) -> float | None:
    """Return an evaluation's score, the higher the better; None where it was not measured."""
    value = values.get(best_metric)
    if value is None or not is_number(value):
        return None
    return -float(value) if best_metric == VAL_LOSS else float(value)
