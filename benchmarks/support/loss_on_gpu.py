"""Time the losses on one GPU, in the share of one of eight ranks, against peers' losses."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import Result
from dist_vse.common.errors import UserError
from dist_vse.tools.bench.rank_loss import (
    BARE,
    OPEN_CLIP,
    RANKS,
    TEMPERATURE,
    LossStep,
    open_clip_loss,
    time_losses,
)
from dist_vse.tools.bench.table import Table

SENTENCE_TRANSFORMERS = "sentence-transformers, autocast"


def run_on_gpu(all_rows: Sequence[int], width: int, repeats: int) -> Result:
    """Measure on the current GPU. Raises UserError where there is none."""
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda needs a GPU, and PyTorch sees none here; --device cpu measures gloo "
            "processes"
        )
    torch.backends.cuda.matmul.allow_tf32 = True  # as in a bfloat16 run
    return measure(all_rows, width, repeats, torch.device("cuda"))


def measure(all_rows: Sequence[int], width: int, repeats: int, device: torch.device) -> Result:
    """Return the figures and tables of one rank's share, for each number of its rows."""
    figures: dict[str, Any] = {"ranks": RANKS, "embedding": width, "losses": []}
    tables = []
    for rows in all_rows:
        found = time_losses(rows, width, device, peers=lambda: peers(device), repeats=repeats)
        figures["losses"].append({"rows_per_rank": rows, "global_batch": rows * RANKS, **found})
        tables.append(_table(rows, width, found))
    return Result(figures, tables)


def peers(device: torch.device) -> dict[str, LossStep]:
    """Return the peers' losses that are installed."""
    return {**open_clip_loss(device), **_sentence_transformers(device)}


def _sentence_transformers(device: torch.device) -> dict[str, LossStep]:
    """Return its symmetric InfoNCE over all ranks, as CLIP's, under autocast."""
    try:
        metadata.version("sentence-transformers")
    except metadata.PackageNotFoundError:
        return {}
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    symmetric: Any = MultipleNegativesRankingLoss(
        torch.nn.Identity(),  # no model: it is given features
        scale=1 / TEMPERATURE,
        gather_across_devices=True,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            found: Tensor = symmetric.compute_loss_from_embeddings([images, texts], None)
        return found

    return {SENTENCE_TRANSFORMERS: loss}


def _table(rows: int, width: int, found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(
        f"forward and backward, one rank of {RANKS}, b = {rows}, N = {rows * RANKS}, d = {width}",
        ("case", "wall ms", "device ms", "kernels", "GiB", "x OpenCLIP"),
    )
    peer = found.get(OPEN_CLIP, {}).get("wall_s")
    for case, one in found.items():
        if "error" in one:
            table.add_row(case, one["error"][:60], "", "", "", "")
            continue
        wall, device = one["wall_s"], one["device_s"]
        table.add_row(
            case,
            f"{wall * 1e3:.2f}",
            "" if device is None else f"{device * 1e3:.2f}",
            str(one["kernels"]),
            f"{one['peak_gib']:.2f}",
            f"{peer / wall:.2f}" if peer and case != BARE else "",
        )
    table.note = (
        "the other ranks are pretended: shapes and work are right, the network takes no time; our "
        "products are in bfloat16; device: the sum over the kernels; GiB: above the features"
    )
    return table
