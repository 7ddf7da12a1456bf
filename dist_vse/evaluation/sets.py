"""The further sets of a run's `eval_sets`, opened once and measured at every evaluation."""

from dataclasses import dataclass
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig
from dist_vse.config.evaluation import EvalSetConfig
from dist_vse.data.decode import Transform
from dist_vse.data.index import Index, read_index
from dist_vse.data.samples import Tokenizer
from dist_vse.distributed import watchdog
from dist_vse.evaluation.batches import EVAL_SAMPLES_A_WORKER, build_eval_batches
from dist_vse.evaluation.class_folder import ClassFolder, read_class_folder
from dist_vse.evaluation.evaluate import evaluate
from dist_vse.evaluation.retrieval import check_protocol
from dist_vse.evaluation.zeroshot import classify
from dist_vse.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class EvalSet:
    """A set that is there: of its two kinds of content it has one."""

    config: EvalSetConfig
    index: Index | None = None
    folder: ClassFolder | None = None


def open_eval_sets(config: TrainConfig) -> list[EvalSet]:
    """Open the sets. Raises UserError for what is missing, before anything is trained."""
    return [_open(item, config) for item in config.eval_sets]


def _open(item: EvalSetConfig, config: TrainConfig) -> EvalSet:
    if item.zeroshot:
        data = Path(item.zeroshot)
        folder = read_class_folder(data, item.classes or None, item.templates or None)
        if config.best_metric == f"{item.name}/top5" and len(folder.names) <= 5:
            raise UserError(
                f"best_metric={config.best_metric} of {len(folder.names)} classes is always 100 %: "
                f"choose {item.name}/top1"
            )
        return EvalSet(item, folder=folder)
    index = read_index(item.index or config.data.index, allow_pipe=config.data.allow_pipe)
    check_protocol(item.protocol, index.split(item.split).num_samples)
    return EvalSet(item, index)


def evaluate_sets(
    model: DualEncoder, sets: list[EvalSet], config: TrainConfig, tokenizer: Tokenizer
) -> dict[str, float]:
    """Return all metrics of all sets as `NAME/metric`; every rank calls this.

    They are the same to the bit for any number of ranks.
    """
    found: dict[str, float] = {}
    for item in sets:
        metrics = _measure(model, item, config, tokenizer)
        found |= {f"{item.config.name}/{key}": value for key, value in metrics.items()}
        watchdog.progress()
    return found


def _measure(
    model: DualEncoder, item: EvalSet, config: TrainConfig, tokenizer: Tokenizer
) -> dict[str, float]:
    precision = config.engine.precision
    if item.index is not None:
        batches = build_eval_batches(config, item.index, tokenizer, item.config.split)
        return evaluate(
            model,
            watchdog.each(batches),
            distributed.device(),
            protocol=item.config.protocol,
            precision=precision,
        ).metrics
    assert item.folder is not None
    image, share = config.model.image, sum(map(len, item.folder.files)) // distributed.world_size()
    return classify(
        model,
        item.folder,
        tokenizer,
        Transform(
            image.size,
            squash=image.squash,
            crop_share=image.crop_share,
            resampling=image.resampling,
        ),
        batch_size=config.fixed_chunk_size,
        num_workers=min(config.data.num_workers, share // EVAL_SAMPLES_A_WORKER),
        precision=precision,
    )
