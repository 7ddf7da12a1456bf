"""`dist-vse eval`: a run's retrieval on a split, compared with the untrained model and chance."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vse import distributed
from dist_vse.common.errors import writing
from dist_vse.common.files import check_output, output_json
from dist_vse.common.log import logger, setup_logging
from dist_vse.common.terminal import plain
from dist_vse.config import TrainConfig
from dist_vse.data.index import Index, read_index
from dist_vse.evaluation.batches import build_eval_batches
from dist_vse.evaluation.evaluate import Evaluation, evaluate
from dist_vse.evaluation.examples import save_examples
from dist_vse.evaluation.retrieval import RECALLS, check_protocol
from dist_vse.evaluation.width import AtWidth, check_width
from dist_vse.models.build import build_model
from dist_vse.models.precision import use_precision
from dist_vse.runs.environment import read_environment, trained_on
from dist_vse.runs.files import EXAMPLES_NAME, RESULT_NAME
from dist_vse.runs.folder import find_run, open_run
from dist_vse.runs.trained import build_start, load_trained, run_tokenizer

Results = dict[str, dict[str, float]]


def eval_run(
    location: Path,
    *,
    split: str,
    data: str | None,
    protocol: str = "plain",
    recalls: Sequence[int] = RECALLS,
    bootstrap: int = 0,
    allow_pipe: bool = False,
    width: int | None = None,
) -> int:
    """Evaluate a run's newest checkpoint, or the one given; every rank of a launcher may call.

    Writes `eval-SPLIT.json` into the run's folder and prints a table. `width` takes the first
    numbers of each feature. Protocol, width, the data's fingerprint and the checkpoint stand in the
    file's name where they are not the run's usual ones. Where they are, the report's examples are
    written too. Raises UserError, on every rank,
    if the trained model has collapsed.
    """
    setup_logging()
    how: dict[str, Any] = {"protocol": protocol, "recalls": recalls, "bootstrap": bootstrap}
    with distributed.process_group():
        here = distributed.device()
        with distributed.raise_on_all_ranks():
            task = _open(location, split, data, protocol, width, allow_pipe=allow_pipe)
            tokenizer = run_tokenizer(task.config, task.run_dir, build=False)
            config = task.config
            how["precision"] = config.engine.precision
            use_precision(here, config.engine.precision)
            start = config.model.from_run
            gone = start is not None and not Path(start).is_dir()
            if gone and not config.model.lora.rank:  # adapters need what they were trained on
                logger.warning("%s is gone: compared with random weights instead", start)
                model = build_model(config.model, config.loss, tokenizer, seed=config.seed)
            else:
                model = build_start(config, tokenizer)
            model = model.to(here)
        encoders = AtWidth(model, width)
        batches = build_eval_batches(task.config, task.index, tokenizer, split)
        untrained = evaluate(encoders, batches, here, **{**how, "bootstrap": 0})
        with distributed.raise_on_all_ranks():
            checkpoint = load_trained(task.run_dir, model, task.asked)
        batches = build_eval_batches(task.config, task.index, tokenizer, split)
        trained = evaluate(encoders, batches, here, **how, allow_collapse=False)
        results = {
            "trained": trained.metrics,
            "untrained": untrained.metrics,
            "chance": trained.chance,
        }
        how_measured = protocol if width is None else f"{protocol}, width {width}"
        where = {"checkpoint": checkpoint.name, "split": split, "protocol": how_measured}
        with distributed.raise_on_all_ranks():
            if distributed.is_main_process():
                _save(task, {**where, "data": task.index.fingerprint(), **results}, trained)
        if distributed.is_main_process():
            title = f"{task.run_dir} at {checkpoint.name}, {split}, {how_measured}"
            title += f", data {task.index.fingerprint()[:8]}" if task.elsewhere else ""
            before = "untrained" if gone else task.config.before_name
            columns = ["trained", before, "chance"]
            _print(dict(zip(columns, results.values(), strict=True)), title, trained, recalls)
    return 0


@dataclass(frozen=True)
class _Task:
    """What is to be evaluated, on what."""

    run_dir: Path
    asked: Path | None  # a checkpoint that is not simply the newest
    config: TrainConfig  # with the data set to evaluate on
    index: Index
    elsewhere: bool  # whether that is another data set than the run's own
    path: Path  # of the results
    usual: bool  # plain, newest checkpoint, own data


def _open(
    location: Path,
    split: str,
    data: str | None,
    protocol: str,
    width: int | None,
    *,
    allow_pipe: bool,
) -> _Task:
    """Open the run and the data. Raises UserError for what is missing or can't be written."""
    run_dir, asked = find_run(location)
    config = open_run(run_dir)
    check_width(width, config.model.embed_dim)
    own = trained_on(read_environment(run_dir), config.data.index)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, index=data))
    index = read_index(config.data.index, allow_pipe=allow_pipe)
    check_protocol(protocol, index.split(split).num_samples)
    found = index.fingerprint()
    elsewhere = found != own
    names = [protocol] if protocol != "plain" else []
    names += [f"width{width}"] if width is not None else []
    names += [found[:8]] if elsewhere else []
    names += [asked.name] if asked is not None else []
    path = run_dir / RESULT_NAME.format(split="-".join([split, *names]))
    if distributed.is_main_process():
        check_output(path)
    return _Task(run_dir, asked, config, index, elsewhere, path, usual=not names)


def _save(task: _Task, content: dict[str, Any], trained: Evaluation) -> None:
    output_json(task.path, {**content, "intervals": trained.intervals})
    if task.usual:
        examples = task.run_dir / EXAMPLES_NAME
        with writing(examples):
            save_examples(trained, examples, split=content["split"])


def _print(results: Results, title: str, evaluation: Evaluation, recalls: Sequence[int]) -> None:
    metrics, bands = evaluation.metrics, evaluation.intervals
    images, captions = metrics["num_images"], metrics["num_texts"]
    table = Table(title=plain(f"{title}\n{images:,} images, {captions:,} captions"))
    table.add_column("")
    for name in results:
        table.add_column(plain(name), justify="right")
    for key, label in _rows(recalls).items():
        cells = [f"{column[key]:.1f}" for column in results.values()]
        if key in bands:
            cells[0] += " [{:.1f}, {:.1f}]".format(*bands[key]).replace("[", r"\[")
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    if bands:
        console.print(
            "In brackets: 95 % bootstrap intervals over images with their captions.",
            highlight=False,
        )
    if metrics["tied"]:
        low, high = metrics["rsum_min"], metrics["rsum_max"]
        console.print(
            f"Ties leave {metrics['tied']:.1f} % of the ranks open; they count as the mean over "
            f"their orders, and rsum lies between {low:.1f} and {high:.1f}.",
            highlight=False,
        )


def _rows(recalls: Sequence[int]) -> dict[str, str]:
    rows: dict[str, str] = {}
    for way, name in (("i2t", "image to text "), ("t2i", "text to image ")):
        for k in recalls:
            rows[f"{way}_r{k}"] = f"{name}R@{k}, %"
            name = ""
        rows |= {
            f"{way}_map": "mAP@R, %",
            f"{way}_medr": "median rank",
            f"{way}_meanr": "mean rank",
        }
    return rows | {"rsum": "rsum (R@1, 5, 10 both ways)"}
