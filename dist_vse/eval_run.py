"""`dist-vse eval`: a run's retrieval on a split, beside the untrained model and chance."""

import dataclasses
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_vse import distributed
from dist_vse.builders import build_eval_batches
from dist_vse.config import TrainConfig
from dist_vse.evaluate import Evaluation, evaluate, save_examples
from dist_vse.index import Index, read_index
from dist_vse.log import setup_logging
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.tokenizer import Tokenizer
from dist_vse.retrieval import chance
from dist_vse.run_dir import load_trained, open_run, run_model, run_tokenizer
from dist_vse.run_files import EXAMPLES_NAME, RESULT_NAME

_ROWS = {
    "i2t_r1": "image to text R@1, %",
    "i2t_r5": "R@5, %",
    "i2t_r10": "R@10, %",
    "i2t_medr": "median rank",
    "t2i_r1": "text to image R@1, %",
    "t2i_r5": "R@5, %",
    "t2i_r10": "R@10, %",
    "t2i_medr": "median rank",
    "rsum": "sum of the six recalls",
}


def eval_run(run_dir: Path, *, split: str, data: str | None) -> int:
    """Evaluate the newest checkpoint of a run; every rank of a launcher may call this.

    Writes `eval-SPLIT.json` and `examples.json` into the run's folder and prints a table.
    """
    setup_logging()
    with distributed.process_group():
        with distributed.same_verdict():
            config = open_run(run_dir)
            if data is not None:
                elsewhere = dataclasses.replace(config.data, index=data)
                config = dataclasses.replace(config, data=elsewhere)
            index = read_index(config.data.index)
            index.split(split)
            tokenizer = run_tokenizer(config, run_dir, build=False)
            model = run_model(config, tokenizer).to(distributed.device())
        untrained = _evaluate(config, index, tokenizer, model, split)
        with distributed.same_verdict():
            checkpoint = load_trained(run_dir, model)
        trained = _evaluate(config, index, tokenizer, model, split)
        if distributed.is_main_process():
            results = {
                "trained": trained.metrics,
                "untrained": untrained.metrics,
                "chance": chance(trained.image_of_text, len(trained.keys)),
            }
            _write(run_dir, split, checkpoint.name, results)
            save_examples(trained, run_dir / EXAMPLES_NAME, split=split)
            _print(results, f"{run_dir}, {checkpoint.name}, split {split}", trained)
    return 0


def _evaluate(
    config: TrainConfig, index: Index, tokenizer: Tokenizer, model: DualEncoder, split: str
) -> Evaluation:
    batches = build_eval_batches(config, index, tokenizer, split)
    return evaluate(model, batches, distributed.device())


def _write(
    run_dir: Path, split: str, checkpoint: str, results: dict[str, dict[str, float]]
) -> None:
    path = run_dir / RESULT_NAME.format(split=split)
    temporary = path.with_suffix(".tmp")
    content = {"checkpoint": checkpoint, "split": split, **results}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _print(results: dict[str, dict[str, float]], title: str, evaluation: Evaluation) -> None:
    images, texts = len(evaluation.keys), len(evaluation.captions)
    table = Table(title=f"{title}: {images:,} images, {texts:,} captions")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key, label in _ROWS.items():
        table.add_row(label, *(f"{metrics[key]:.1f}" for metrics in results.values()))
    Console().print(table)
