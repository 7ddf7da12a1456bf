"""`dist-vse eval`: a run's retrieval on a split, beside the untrained model and chance."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vse import distributed
from dist_vse.builders import build_eval_batches
from dist_vse.evaluate import Evaluation, evaluate
from dist_vse.examples import save_examples
from dist_vse.index import read_index
from dist_vse.log import setup_logging
from dist_vse.retrieval import RECALLS, check_protocol
from dist_vse.run_dir import find_run, load_trained, open_run, run_model, run_tokenizer
from dist_vse.run_files import EXAMPLES_NAME, RESULT_NAME

Results = dict[str, dict[str, float]]


def eval_run(
    location: Path,
    *,
    split: str,
    data: str | None,
    protocol: str = "plain",
    recalls: Sequence[int] = RECALLS,
    bootstrap: int = 0,
) -> int:
    """Evaluate a run's newest checkpoint, or the one given; every rank of a launcher may call.

    Writes `eval-SPLIT.json` into the run's folder (with the protocol or checkpoint in its name
    where they are not the usual ones), for the newest checkpoint `examples.json` too, and prints
    a table. Raises UserError, on every rank, if the trained model has collapsed.
    """
    setup_logging()
    how: dict[str, Any] = {"protocol": protocol, "recalls": recalls, "bootstrap": bootstrap}
    with distributed.process_group():
        here = distributed.device()
        with distributed.same_verdict():
            run_dir, asked = find_run(location)
            config = open_run(run_dir)
            if data is not None:
                elsewhere = dataclasses.replace(config.data, index=data)
                config = dataclasses.replace(config, data=elsewhere)
            index = read_index(config.data.index)
            check_protocol(protocol, index.split(split).num_samples)
            tokenizer = run_tokenizer(config, run_dir, build=False)
            model = run_model(config, tokenizer).to(here)
        batches = build_eval_batches(config, index, tokenizer, split)
        untrained = evaluate(model, batches, here, **{**how, "bootstrap": 0})
        with distributed.same_verdict():
            checkpoint = load_trained(run_dir, model, asked)
        batches = build_eval_batches(config, index, tokenizer, split)
        trained = evaluate(model, batches, here, **how, allow_collapse=False)
        if distributed.is_main_process():
            results = {
                "trained": trained.metrics,
                "untrained": untrained.metrics,
                "chance": trained.chance,
            }
            extra = [name for name in (protocol,) if name != "plain"]
            extra += [checkpoint.name] if asked is not None else []
            content = {
                "checkpoint": checkpoint.name,
                "split": split,
                "protocol": protocol,
                "data": index.fingerprint(),
                **results,
                "intervals": trained.intervals,
            }
            _write(run_dir / RESULT_NAME.format(split="-".join([split, *extra])), content)
            if asked is None:
                save_examples(trained, run_dir / EXAMPLES_NAME, split=split)
            title = f"{run_dir} at {checkpoint.name}, {split}, {protocol}"
            _print(results, title, trained, recalls)
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _print(results: Results, title: str, evaluation: Evaluation, recalls: Sequence[int]) -> None:
    metrics, bands = evaluation.metrics, evaluation.intervals
    images, captions = metrics["num_images"], metrics["num_texts"]
    table = Table(title=f"{title}\n{images:,} images, {captions:,} captions")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
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
