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
SPARE = 3.0  # times the longest loss or step: so much must be left of the limit
ON_CPU = 4  # steps


def check_exactness(task: Task) -> Finding:
    """Compare with one process in float64: each loss alone, then steps of the whole grid."""
    rows: dict[str, list[Row]] = {}
    longest = 0.0
    grid = list(steps())
    most = len(grid) if task.on_gpu else ON_CPU
    for name, transport in itertools.product(LOSSES, TRANSPORTS):
        started = time.monotonic()
        if distributed.any_rank(bool(rows) and SPARE * longest > task.left_s()):
            break
        config = load_config(None, [f"loss.name={name}", f"loss.transport={transport}"])
        rows[f"{name} {transport}"] = check_loss(config)
        longest = max(longest, time.monotonic() - started)
    tried, longest, losses = 0, 0.0, len(rows)
    for label, config in grid[:most]:
        started = time.monotonic()
        if distributed.any_rank(tried > 0 and SPARE * longest > task.left_s()):
            break
        rows[label] = check_step(config)
        tried, longest = tried + 1, max(longest, time.monotonic() - started)
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
        f"{losses} of {len(LOSSES) * len(TRANSPORTS)} losses and {tried} of {len(grid)} steps "
        f"on {size} ranks equal one process in float64, all {sum(map(len, rows.values()))} "
        "within their tolerance"
    )
    return Finding(True, words, figures)


def compile_losses(task: Task) -> Finding:
    """Compile the kernels that check 7's steps need, by a step of each loss and precision."""
    done = set()
    for _, config in steps():
        kind = config.loss.name, config.engine.precision
        if kind not in done:
            check_step(config)
            done.add(kind)
    return Finding(True, "")


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
