"""Check 7: `dist-vse verify` over losses, transports, stages and precisions, in one group."""

import itertools
import time
from collections.abc import Iterator

from dist_vse import distributed
from dist_vse.config import TrainConfig, load_config
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.tools.verify.loss import check_loss
from dist_vse.tools.verify.step import check_step
from dist_vse.tools.verify.table import Row

LOSSES, TRANSPORTS = ("convse", "convse++", "siglip"), ("gather", "ring")
STAGES, PRECISIONS = (1, 3, 2, 0), ("fp32", "bf16")
SHARE = 0.6  # of the check's seconds: what began by then may end after it
FEWEST = 4


def check_exactness(task: Task) -> Finding:
    """Compare with one process in float64: each loss alone, then steps of the whole grid."""
    began = time.monotonic()
    rows: dict[str, list[Row]] = {}
    grid = list(steps())
    most = len(grid) if task.on_gpu else FEWEST
    for name, transport in itertools.product(LOSSES, TRANSPORTS):
        config = load_config(None, [f"loss.name={name}", f"loss.transport={transport}"])
        rows[f"{name} {transport}"] = check_loss(config)
    tried = 0
    for label, config in grid[:most]:
        late = tried >= FEWEST and time.monotonic() - began > SHARE * task.limit_s
        if distributed.any_rank(late):
            break
        rows[label] = check_step(config)
        tried += 1
    rows = distributed.broadcast_object(rows)
    off = {
        f"{label}: {row.name}": row.error
        for label, found in rows.items()
        for row in found
        if not row.exact
    }
    size = distributed.world_size()
    worst = {
        label: max(row.error / row.tolerance for row in found) for label, found in rows.items()
    }
    figures = {"ranks": size, "steps": tried, "of": len(grid), "of_tolerance": worst, "off": off}
    if off:
        first = next(iter(off))
        return Finding(
            False, f"{len(off)} off on {size} ranks: {first} ({off[first]:.0e})", figures
        )
    words = (
        f"{len(LOSSES) * len(TRANSPORTS)} losses and {tried} of {len(grid)} steps on {size} ranks "
        f"equal one process in float64, all {sum(map(len, rows.values()))} within their tolerance"
    )
    return Finding(True, words, figures)


def steps() -> Iterator[tuple[str, TrainConfig]]:
    """Yield the grid; its first quarter has each value of each setting several times."""
    settings = list(itertools.product(LOSSES, STAGES, TRANSPORTS, PRECISIONS))
    # 29 shares no factor with the 48 of them, so that neighbours differ in everything.
    for place in range(len(settings)):
        name, stage, transport, precision = settings[place * 29 % len(settings)]
        label = f"{name} {transport} ZeRO {stage} {precision}"
        yield (
            label,
            load_config(
                None,
                [
                    f"loss.name={name}",
                    f"loss.transport={transport}",
                    f"engine.zero_stage={stage}",
                    f"engine.precision={precision}",
                ],
            ),
        )
