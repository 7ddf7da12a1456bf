"""Checks 9 and 12: how fast a step is and what the host waits for; whether memory was foretold."""

import collections
import contextlib
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dist_vse import distributed
from dist_vse.common.units import GIB
from dist_vse.config import TrainConfig
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.workload import (
    VOCABULARY,
    Rig,
    build,
    build_rig,
    reference_config,
)
from dist_vse.tools.bench.device_time import time_on_device
from dist_vse.tools.bench.scale_memory import measure_memory
from dist_vse.tools.plan.choose import price
from dist_vse.tools.plan.count import count_work
from dist_vse.tools.plan.doctor_figures import hardware_of_gpu
from dist_vse.tools.plan.hardware import Hardware
from dist_vse.tools.plan.settings import settings_of
from dist_vse.tools.plan.step_memory import step_memory
from dist_vse.training.flops import count_flops, peak_flops

SHARE = 0.7  # of a step that the device should work at least
WAITS = 2  # of the host for the device in a step, outside of DeepSpeed's own code
SPARE_S = 10.0  # of the limit, that are left after a step that is foreseen to end
_WAITS = "called a synchronizing"  # PyTorch's words; it also says once that it can't see all
SMALLER = (1, 4, 16)  # chunks are so many times smaller than the config's
CLOSE = 0.15  # of a forecast


def check_step(task: Task) -> Finding:
    """Time steps with three sizes of chunks; list where the host waits for the device."""
    config = reference_config(task)
    here = distributed.device()
    operations = _operations(config)
    rig = build_rig(config)
    largest = rig.config.fixed_chunk_size
    by_chunk: dict[int, dict[str, Any]] = {}
    for chunk in sorted({max(1, largest // smaller) for smaller in SMALLER}, reverse=True):
        smaller = rig.changed(chunk)
        if chunk < largest:  # without a profile: their steps have very many kernels
            # At most as many times longer as it has more kernels.
            slower = largest // chunk * by_chunk[largest]["step_s"]
            if slower > task.left_s() - SPARE_S:
                break
            step_s = _wall_seconds(smaller)
            by_chunk[chunk] = {"step_s": step_s}
        else:
            timed = time_on_device(smaller.step, here, repeats=2)
            step_s = timed.wall_s
            by_chunk[chunk] = {
                "step_s": step_s,
                "device_share": timed.device_share,
                "kernels": timed.kernels,
                "peak_gib": timed.peak_bytes / GIB,
            }
        by_chunk[chunk]["pairs_per_s"] = rig.config.global_batch_size / step_s
        by_chunk[chunk]["mfu"] = operations / step_s if operations else None
    waits = _waits(rig)
    best = by_chunk[largest]
    ours = sum(count for place, count in waits.items() if "deepspeed" not in place)
    figures = {
        "pairs_per_s": best["pairs_per_s"],
        "step_s": best["step_s"],
        "chunk_size": largest,
        "keep_graphs": rig.keep_graphs,
        "rows": rig.config.global_batch_size // distributed.world_size(),
        "by_chunk": by_chunk,
        "waits": waits,
        "our_waits": ours,
    }
    mfu = "" if best["mfu"] is None else f", MFU {best['mfu']:.0%}"
    words = f"{best['pairs_per_s']:,.0f} pairs/s in chunks of {largest}{mfu}"
    if here.type != "cuda":
        return Finding(True, f"{words}; a CPU waits for nothing", figures)
    faults = []
    if not best["kernels"]:
        faults.append("the profiler sees no kernels (may this user profile?)")
    elif best["device_share"] < SHARE:
        faults.append(f"the device works {best['device_share']:.0%} of a step: raise chunk_size")
    if ours > WAITS:
        faults.append(f"the host waits {ours} times a step, {WAITS} are allowed")
    words += (
        f", device's share {best['device_share']:.0%}, {ours} waits of ours and "
        f"{sum(waits.values()) - ours} of DeepSpeed"
    )
    return Finding(not faults, "; ".join([words, *faults]), figures)


def compile_step(task: Task) -> Finding:
    """Compile the kernels of the steps of checks 9 and 12."""
    build_rig(reference_config(task)).step()
    return Finding(True, "")


def _operations(config: TrainConfig) -> float:
    """Return a step's operations over those that the ranks' devices can do in a second, or 0."""
    peak = peak_flops(distributed.device(), config.engine.precision)
    if peak is None:
        return 0.0
    flops = count_flops(build(config), config.model.image.size, config.model.text.max_tokens)
    step = flops.of_step(config.global_batch_size, config.model.embed_dim)
    return step / peak / distributed.world_size()


def _wall_seconds(rig: Rig) -> float:
    """Return the seconds of a step, in which the allocator may still learn its sizes."""
    started = time.perf_counter()
    rig.step()
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _waits(rig: Rig) -> dict[str, int]:
    """Return how often the host waits for the device in a step, by place; nothing on a CPU."""
    if distributed.device().type != "cuda":
        return {}
    with _watched() as found:
        rig.step()
    return dict(found)


@contextlib.contextmanager
def _watched() -> Iterator["collections.Counter[str]"]:
    """Count what makes the host wait, by the last lines of ours and of DeepSpeed's."""
    found: collections.Counter[str] = collections.Counter()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if _WAITS in str(message):
            found[_place()] += 1

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before


def _place() -> str:
    """Return the file and line that waits, of dist_vse or of deepspeed."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if {"dist_vse", "deepspeed"} & set(Path(frame.filename).parts)
        and Path(frame.filename) != Path(__file__)
        and Path(frame.filename).name != "collective_timing.py"  # around DeepSpeed's own
    ]
    if not frames:
        return "elsewhere"
    parts = Path(frames[-1].filename).parts
    start = max(parts.index(name) for name in ("dist_vse", "deepspeed") if name in parts)
    return f"{'/'.join(parts[start:])}:{frames[-1].lineno}"


def check_memory(task: Task) -> Finding:
    """Compare the plan's memory of a step with what a step takes; on a GPU its seconds as well."""
    config = reference_config(task)
    size = distributed.world_size()
    model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del model
    rigs: list[Rig] = []

    def built() -> Rig:
        rigs.append(build_rig(config))
        return rigs[0]

    rig, memory = measure_memory(built, lambda rig: rig.step())  # type: ignore[arg-type]
    measured = float(max(memory.peaks.values()))
    config = replace(rig.config, cache=replace(config.cache, keep_graphs=rig.keep_graphs))
    forecast = step_memory(
        config, size, parameters=(parameters, trained), vocabulary=VOCABULARY,
        on_cpu=not task.on_gpu,
    ).peak  # fmt: skip
    error = forecast / measured - 1
    figures: dict[str, Any] = {
        "chunk_size": config.chunk_size,
        "measured_gib": measured / GIB,
        "forecast_gib": forecast / GIB,
        "memory_error": error,
    }
    words = f"{measured / GIB:.3g} GiB at most, the plan says {forecast / GIB:.3g} ({error:+.0%})"
    if task.on_gpu:
        figures["device_gib"] = torch.cuda.get_device_properties(0).total_memory / GIB
        words += _time_in_words(task, config, figures)
    near = abs(error) <= CLOSE and abs(figures.get("time_error", 0.0)) <= CLOSE
    # A very small model's memory is that of buffers which the plan does not count.
    return Finding(near or not task.on_gpu, words, figures)


def _time_in_words(task: Task, config: TrainConfig, figures: dict[str, Any]) -> str:
    """Compare the plan's seconds with those of check 9, by the ceilings of check 2."""
    step_s, ceilings = task.earlier_figure(9, "step_s"), task.earlier.get("2")
    if step_s is None or not ceilings or "fp32_tflops" not in ceilings:
        return "; its seconds need checks 2 and 9"
    hardware = hardware_of_gpu({2: ceilings, 4: task.earlier.get("4", {})}, Hardware())
    work = count_work(config, vocabulary=VOCABULARY)
    settings = settings_of(
        config,
        global_batch=config.global_batch_size,
        world_size=distributed.world_size(),
        on_cpu=not task.on_gpu,
    )
    planned = price(work, settings, hardware).seconds.total
    figures |= {"step_s": step_s, "planned_s": planned, "time_error": planned / step_s - 1}
    return f"; {step_s:.3g} s a step, planned {planned:.3g} ({planned / step_s - 1:+.0%})"
