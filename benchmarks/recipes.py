"""What the options of docs/guides/recipes.md cost: time and memory of a step, by `bench scale`.

One small model, and one change of its config a row. All take their turns on the same processes.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks.result import Result
from dist_vse.config import load_config
from dist_vse.tools.bench.scale import measure_here
from dist_vse.tools.bench.scale_cases import BASE, SMALL, Case
from dist_vse.tools.bench.scale_run import Budget
from dist_vse.tools.bench.scale_tables import MIB
from dist_vse.tools.bench.table import Table

NAME, SIZE = "vit_tiny_patch16_224", 48
OPTIONS = {
    "`ema.samples: 100000`": ["ema.samples=100000"],
    "`optim.layer_decay: 0.75`": ["optim.layer_decay=0.75"],
    "`model.lora.rank: 8` (images)": ["model.lora.rank=8"],
    "`model.image.patch_drop: 0.5`": ["model.image.patch_drop=0.5"],
    "`model.image.size: 32`, not 48": ["model.image.size=32"],
    "`loss.widths: [64, 128]`": ["loss.widths=[64,128]"],
    "`loss.ignore_above: 0.05`": ["loss.ignore_above=0.05"],
    "`optim.name: lion`": ["optim.name=lion"],
    "`engine.name: fsdp2`, stage 2": ["engine.name=fsdp2", "engine.zero_stage=2"],
    "`engine.name: fsdp2`, stage 3": ["engine.name=fsdp2", "engine.zero_stage=3"],
    "`engine.zero_stage: 3`": ["engine.zero_stage=3"],
    "the same, `ema.samples: 100000`": ["engine.zero_stage=3", "ema.samples=100000"],
}


def run(args: argparse.Namespace) -> Result:
    """Measure what `args` ask for."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "image.safetensors")  # adapters and frozen layers need some
        torch.manual_seed(0)
        model = timm.create_model(NAME, num_classes=0, img_size=SIZE)
        save_file(model.state_dict(), weights)
        rows = measure_here(_cases(args, weights), Budget(args.rounds, args.steps, False))
    return Result({"rows": rows}, [_table(rows, args)])


def _cases(args: argparse.Namespace, weights: Path) -> list[Case]:
    base = [*SMALL, f"model.image.weights={weights}", f"global_batch_size={args.batch}"]
    base += [f"chunk_size={args.chunk}", "loss.name=info_nce"]
    size = args.processes
    cases = [Case(BASE, size, load_config(None, base))]
    for label, overrides in OPTIONS.items():
        cases.append(Case("option", size, load_config(None, [*base, *overrides]), varied=label))
    return cases


def _table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    columns = ("option", "s a step", "x base", "state MiB", "peak MiB", "MiB reduced")
    title = f"{args.processes} processes, {args.batch} pairs in chunks of {args.chunk}, ZeRO 1"
    note = (
        "State is what a process holds between two steps. Reduced is what it sends of gradients; "
        "FSDP2 sends them itself, uncounted."
    )
    table, base = Table(title, columns, note=note), rows[0]["step_seconds"]
    for label, row in zip(["base", *OPTIONS], rows, strict=True):
        memory = [row["memory_bytes"][name] / MIB for name in ("state", "peak")]
        sent = row["sent_bytes"].get("reduce", 0) / MIB
        cells = [f"{row['step_seconds']:.3f}", f"{row['step_seconds'] / base:.2f}"]
        cells += [f"{mib:.1f}" for mib in memory]
        table.add_row(label, *cells, "" if "fsdp2" in label else f"{sent:.1f}")
    return table
