"""The run's record: metrics.jsonl, TensorBoard, and one line a log step on rank 0."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from dist_vse import distributed
from dist_vse.common.errors import writing
from dist_vse.common.log import logger
from dist_vse.common.step_timer import OTHER, PARTS, Clock
from dist_vse.common.units import GIB
from dist_vse.runs.files import METRICS_NAME, drop_lines_after
from dist_vse.runs.trackers import Tracker, call_trackers, start_trackers

LOW_SHARE = 0.7  # of the device: below it the host is what limits


class Recorder:
    """Writes the metrics of a run; every rank may call it, rank 0 writes."""

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        *,
        trackers: Sequence[str] = (),
        project: str = "",
        settings: dict[str, object] | None = None,
    ) -> None:
        """Start the writers; `trackers` get the `settings` too. Raises UserError if one can't."""
        self.trackers: list[Tracker] = []
        self.path = run_dir / METRICS_NAME
        self.writer: Any = None
        with distributed.raise_on_all_ranks(), writing(self.path):
            if distributed.is_main_process():
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                drop_lines_after(self.path, start_step)
                self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
                self.trackers = start_trackers(
                    trackers, run_dir, project=project, settings=settings or {}
                )

    @distributed.main_process_only
    def write(self, kind: str, step: int, values: dict[str, float | int | str]) -> None:
        """Append one line of metrics; `kind` is train or eval. Raises UserError if it can't."""
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        with writing(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        self.trackers = call_trackers(
            self.trackers, lambda tracker: tracker.log(numbers, step=step)
        )

    def close(self) -> None:
        """Flush what is not written yet; every rank calls this."""
        with distributed.raise_on_all_ranks(), writing(self.path):
            if self.writer is not None:
                self.writer.close()
        self.trackers = call_trackers(self.trackers, lambda tracker: tracker.finish())


class Meter:
    """Measures the steps between two log steps: pairs a second, seconds by part, and MFU.

    `step_flops` returns the operations of a step on all ranks, given how many texts without an
    image these bring; `peak_flops` are a device's in a second. None where they are not known.
    """

    def __init__(
        self, step_flops: Callable[[float], float] | None = None, peak_flops: float | None = None
    ) -> None:
        self.clock = Clock(distributed.device())
        self.step_flops, self.peak_flops = step_flops, peak_flops
        self.hinted = False
        self.reset()

    def reset(self) -> None:
        """Start an interval."""
        synchronize()
        self.clock.read()
        self.started, self.pairs, self.steps = time.perf_counter(), 0, 0
        self.negatives = 0

    def add(self, pairs: int, negatives: int = 0) -> None:
        """Count a step of so many pairs on all ranks, and of this rank's texts without an image."""
        self.pairs += pairs
        self.negatives += negatives
        self.steps += 1

    def rates(self) -> dict[str, float]:
        """Return pairs_per_s over all ranks, this rank's seconds a step (data_s ...), and mfu.

        On a GPU also `device_share`: for which share of the time it had work queued.
        """
        synchronize()
        seconds = time.perf_counter() - self.started
        values = {"pairs_per_s": self.pairs / seconds}
        values |= {f"{part}_s": taken / self.steps for part, taken in self.clock.read().items()}
        if self.clock.device_share is not None:
            values["device_share"] = self.clock.device_share
        if self.step_flops is not None and self.peak_flops is not None:
            negatives = self.negatives / self.steps * distributed.world_size()  # as many on each
            done = self.step_flops(negatives) * self.steps / seconds
            values["mfu"] = done / (self.peak_flops * distributed.world_size())
        return values


def device_hint(values: Mapping[str, float]) -> str | None:
    """Say what to raise where a GPU waits for the host, given what `Meter.rates` returned."""
    share = values.get("device_share")
    if share is None or share >= LOW_SHARE:
        return None
    step = sum(values[f"{part}_s"] for part in (*PARTS, OTHER))
    remedy = (
        "the batches come late: raise data.num_workers"
        if values["data_s"] > (1 - LOW_SHARE) / 2 * step
        else "raise chunk_size (or set it to auto), or set model.compile=true"
    )
    return f"the GPU had work queued for {share:.0%} of the last steps; {remedy}"


def peak_memory_gib() -> float:
    """Return the largest peak of any rank so far: GPU memory where there is one, else RSS."""
    here = distributed.device()
    if here.type == "cuda":
        peak = torch.cuda.max_memory_allocated(here) / GIB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return float(distributed.all_reduce_max(torch.tensor([peak], device=here)).item())


def log_line(step: int, total_steps: int, values: dict[str, Any]) -> None:
    """Print the line of a log step."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    formats = {
        "loss": "loss {:.4f}",
        "lr": "lr {:.1e}",
        "grad_norm": "gradient {:.2g}",
        "pairs_per_s": "{:,.0f} pairs/s",
        "memory_gib": "{:.2f} GiB a rank",
        "mfu": "MFU {:.1%}",
    }
    parts += [text.format(values[name]) for name, text in formats.items() if name in values]
    logger.info("  ".join(parts))


def progress_bar(total_steps: int, done: int) -> "tqdm[NoReturn]":
    """Return a bar of the steps with the time left; shown by rank 0 on a terminal only."""
    shown = distributed.is_main_process() and sys.stderr.isatty()
    return tqdm(total=total_steps, initial=done, unit="step", disable=not shown, leave=False)


def synchronize() -> None:
    """Wait until the device has done its work."""
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
