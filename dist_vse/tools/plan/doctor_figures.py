"""A GPU's hardware file from what `dist-vse doctor --gpu --json FILE` measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import read_json
from dist_vse.tools.plan.hardware import Hardware, LinkConfig

ATTAINED_ENCODERS = 0.6  # of the measured products, by the encoders' smaller ones; assumed
CEILINGS, BANDWIDTH, STEP_MEMORY = 2, 4, 12  # checks
RATES = ("fp32_tflops", "tf32_tflops", "bf16_tflops", "launch_us", "optimizer_ns", "process_gib")

Figures = Mapping[int, Mapping[str, Any]]
"""What checks found, by number."""


def read_figures(path: Path) -> tuple[Figures, int]:
    """Read doctor's JSON; return the figures and the number of GPUs.

    Raises UserError if it is something else, or has no ceilings.
    """
    try:
        report = read_json(path)
        figures = {row["number"]: row["figures"] for row in report["checks"]}
        gpus = int(report["gpus"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no JSON of `dist-vse doctor --gpu --json` ({error})") from None
    missing = [name for name in RATES if name not in figures.get(CEILINGS, {})]
    if missing:
        raise UserError(
            f"{path}: check {CEILINGS} is missing or failed (no {missing[0]}); run "
            f"`dist-vse doctor --gpu --json {path}` on the GPU"
        )
    return figures, gpus


def hardware_of_gpu(figures: Figures, base: Hardware, gpus: int = 1) -> Hardware:
    """Return the hardware that was measured; what nobody measured is that of `base`.

    Links inside the node are measured where it has several GPUs, those between nodes never are.
    """
    found, link = figures[CEILINGS], figures.get(BANDWIDTH, {})
    names = ("alpha_us", "copy_gb_per_s", "reduce_gb_per_s", "pair_gb_per_s")
    inside = base.inside
    if all(name in link for name in names):
        inside = LinkConfig(**{name: float(link[name]) for name in names})
    rates: dict[str, Any] = {name: float(found[name]) for name in RATES}
    return replace(
        base,
        name=f"{found['device']}, {gpus} a node",
        checked=_checked(figures),
        ranks_per_node=max(1, gpus),
        cores=0,
        memory_gib=float(found["memory_gib"]),
        conv_tflops=float(found["conv_fp32_tflops"]),
        memory_gb_per_s=float(found["copy_gb_per_s"]),
        attained_encoders=ATTAINED_ENCODERS,
        attained_loss=1.0,  # the rates are of products that are as large
        inside=inside,
        chunks=[],
        **rates,
    )


def _checked(figures: Figures) -> str:
    """Say how the forecast of doctor's own step compares with it."""
    found = figures.get(STEP_MEMORY, {})
    if "time_error" not in found:
        return ""
    time, memory = found["time_error"], found["memory_error"]
    return f"doctor's step: the plan's time is off by {time:+.0%}, its memory by {memory:+.0%}"
