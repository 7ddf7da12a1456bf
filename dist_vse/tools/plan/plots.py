"""How the cost of a step grows, as SVG files for light and dark pages: one axis is one setting."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dist_vse.common.errors import writing
from dist_vse.common.units import GIB
from dist_vse.config import TrainConfig
from dist_vse.tools.plan.check import settings_of
from dist_vse.tools.plan.choose import Plan, price
from dist_vse.tools.plan.hardware import Hardware
from dist_vse.tools.plan.loglog import Curve, draw
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.work import FP32, Work

RANKS, ROWS = 64, 512  # where these are not the axis
BATCH = RANKS * ROWS
PARTS = ("encode", "second_pass", "loss", "gather", "reduce", "step")
Value = Callable[[Plan], float]


def write_plots(work: Work, config: TrainConfig, hardware: Hardware, folder: Path) -> list[Path]:
    """Draw all plots for a model into the folder; return the files.

    Chunks are the largest up to 256 pairs; all else is as configured.
    """

    def at(ranks: int, batch: int, width: int = 0, **changes: object) -> Plan:
        start = settings_of(config, global_batch=batch, world_size=ranks)
        rows = batch // ranks
        chunk = next(n for n in range(min(256, rows), 0, -1) if rows % n == 0)
        settings = start.changed(chunk_size=chunk, **changes)
        return price(replace(work, embed_dim=width or work.embed_dim), settings, hardware)

    sizes = _powers(8, 4096)
    batches = _powers(1024, 1 << 20)
    widths = _powers(64, 8192)
    by_batch = [(float(n), at(RANKS, n)) for n in batches]
    strong = [(float(w), at(w, BATCH)) for w in sizes]
    weak = [(float(w), at(w, w * ROWS)) for w in sizes]
    rows = [(float(b), at(RANKS, RANKS * b)) for b in _powers(16, 16384)]
    wide = [(float(d), at(RANKS, BATCH, d)) for d in widths]
    ring = [(float(n), at(RANKS, n, transport="ring")) for n in batches]
    drawings = {
        "plan-batch": ("seconds of a step, 64 GPUs", "global batch N", _parts(by_batch)),
        "plan-strong": ("seconds of a step, N = 32,768", "GPUs W", _parts(strong)),
        "plan-weak": ("seconds of a step, 512 pairs a GPU", "GPUs W", _parts(weak)),
        "plan-rows": ("pairs/s a GPU, 64 GPUs", "pairs a GPU b", [
            Curve("a GPU's pairs/s", [(x, p.pairs_per_s / RANKS) for x, p in rows]),
        ]),
        "plan-width": ("seconds of a step, 64 GPUs, N = 32,768", "embedding d", _parts(wide)),
        "plan-memory": ("GiB a GPU for the loss, 64 GPUs", "global batch N", [
            Curve("OpenCLIP's way", [(x, _open_clip(p.settings, work)) for x, p in by_batch]),
            Curve("ours, gather", [(x, _loss_gib(p)) for x, p in by_batch]),
            Curve("ours, ring", [(x, _loss_gib(p)) for x, p in ring]),
        ]),
    }  # fmt: skip
    paths = []
    for name, (title, axis, curves) in drawings.items():
        path = folder / f"{name}.svg"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(draw(title, axis, curves), encoding="utf-8")
        paths.append(path)
    return paths


def _powers(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return sizes


def _parts(points: Sequence[tuple[float, Plan]]) -> list[Curve]:
    whole = Curve("whole", [(x, plan.seconds.total) for x, plan in points])
    return [whole] + [
        Curve(part.replace("_", " "), [(x, plan.seconds.parts()[part]) for x, plan in points])
        for part in PARTS
    ]


def _open_clip(settings: Settings, work: Work) -> float:
    """Return what OpenCLIP's loss takes: two matrices, their gradients, both sides gathered."""
    matrices = 4 * settings.similarity_bytes
    return (matrices + 2 * FP32 * settings.global_batch * work.embed_dim) / GIB


def _loss_gib(plan: Plan) -> float:
    moment = next(m for m in plan.moments if m.phase == "loss")
    return (moment.features + moment.similarities) / GIB
