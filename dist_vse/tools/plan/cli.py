"""The command `dist-vse plan`."""

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import check_output, output_json
from dist_vse.common.terminal import plain, say

if TYPE_CHECKING:
    from dist_vse.config import TrainConfig
    from dist_vse.tools.plan.choose import Plan
    from dist_vse.tools.plan.hardware import Hardware
    from dist_vse.tools.plan.work import Work

GPUS = (8, 64, 512, 4096)
HARDWARE = "hardware/a100_80g"
VOCABULARY = 8192
WIDTH = 150
NOT_CHECKED = (
    "not checked: no prediction for this hardware was compared with a measurement; "
    "`dist-vse plan --check` does that"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Predict step time, memory and efficiency of a config on numbers of GPUs that are not "
        "here, and recommend chunk size, kept graphs, ZeRO stage, gather or ring. "
        "docs/guides/plan.md describes the model, and docs/benchmarks/plan.md its errors."
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the run's YAML")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=list(GPUS),
        metavar="W",
        help=f"numbers of GPUs (default: {' '.join(map(str, GPUS))})",
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="global batches (default: the config's)"
    )
    parser.add_argument(
        "--hardware",
        metavar="FILE",
        help=f"what a GPU and the network can do (default: {HARDWARE}), or what --calibrate wrote",
    )
    parser.add_argument(
        "--as-configured",
        action="store_true",
        help="price the config's own settings; recommend nothing",
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=VOCABULARY,
        metavar="N",
        help="words of a text encoder from scratch, which the data decides (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the numbers as JSON")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help="instead: measure this machine with the config's model, and write its hardware file",
    )
    instead.add_argument(
        "--check",
        metavar="FILE",
        type=Path,
        help="instead: predict the rows of `dist-vse bench scale --out FILE`; print the errors",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of --calibrate (default: 5)")
    parser.add_argument(
        "--from-doctor",
        metavar="JSON",
        type=Path,
        help="of --calibrate: measure nothing, take a GPU's figures from "
        "`dist-vse doctor --gpu --json JSON`, and what that did not measure from --hardware",
    )


def run(args: argparse.Namespace) -> int:
    """Plan, or do what is asked for instead; return the exit code."""
    config = _read_config(args)
    if args.rounds < 1 or args.vocabulary < 1:
        raise UserError(f"--rounds ({args.rounds}), --vocabulary ({args.vocabulary}): at least 1")
    if args.from_doctor is not None and args.calibrate is None:
        raise UserError(f"--from-doctor {args.from_doctor} needs --calibrate FILE, which it writes")
    for path in filter(None, (args.out, args.calibrate)):
        check_output(path)
    if args.calibrate is not None:
        return _calibrate_gpu(args) if args.from_doctor else _calibrate(args, config)

    from dist_vse.tools.plan.check import read_report
    from dist_vse.tools.plan.hardware import load_hardware

    hardware = load_hardware(args.hardware or HARDWARE)
    if args.check is not None:
        return _check(args, config, hardware, read_report(args.check))
    batches = args.batch or [config.global_batch_size]
    cases = [(batch, size) for batch in batches for size in args.gpus]
    _check_cases(cases, hardware)
    return _plan(args, config, _count(config, args.vocabulary), hardware, cases)


def _read_config(args: argparse.Namespace) -> "TrainConfig":
    from dist_vse.config import load_config

    given, overrides = args.config, args.overrides
    if given is not None and "=" in given and not Path(given).exists():
        given, overrides = None, [given, *overrides]
    if given is None and args.check is not None:  # of the rows' own settings
        from dist_vse.tools.plan.check import read_report

        report = read_report(args.check)
        given, overrides = report["config"], [*report["overrides"], *overrides]
    return load_config(given, overrides)


def _count(config: "TrainConfig", vocabulary: int) -> "Work":
    from dist_vse.tools.plan.count import count_work

    return count_work(config, vocabulary=vocabulary)


def _check_cases(cases: Sequence[tuple[int, int]], hardware: "Hardware") -> None:
    from dist_vse.tools.plan.choose import check_batch

    for batch, size in cases:
        check_batch(batch, size, hardware)


def _plan(
    args: argparse.Namespace,
    config: "TrainConfig",
    work: "Work",
    hardware: "Hardware",
    cases: Sequence[tuple[int, int]],
) -> int:
    from dist_vse.tools.plan.choose import as_overrides, choose, explain, price
    from dist_vse.tools.plan.settings import settings_of
    from dist_vse.tools.plan.table import memory_table, plan_table, seconds_table

    on_cpu = hardware.cores > 0
    starts = [
        settings_of(config, global_batch=n, world_size=size, on_cpu=on_cpu) for n, size in cases
    ]
    find = price if args.as_configured else choose
    plans = [find(work, start, hardware) for start in starts]
    console = _console()
    about = (
        f"{work.model}: {work.forward.flops / 1e9:.3g} GFLOP a pair forward, "
        f"{work.backward.flops / 1e9:.3g} backward; {work.trainable / 1e6:.4g} M "
        f"parameters learn, {work.frozen / 1e6:.1f} M are frozen."
    )
    console.print(plain(about))
    console.print(plain(f"{hardware.name}: {hardware.checked or NOT_CHECKED}"), soft_wrap=True)
    for table in (plan_table(plans, "the plan"), seconds_table(plans), memory_table(plans)):
        console.print(table)
    for plan in plans:
        console.print(plain(f"{plan.settings.world_size:,} GPUs: {explain(plan, work)}"))
        if plan.fits and not args.as_configured:
            overrides = f"    {as_overrides(plan)}{_streams(config, plan)}"
            console.print(plain(overrides), soft_wrap=True)
    _write(
        args.out,
        {
            "work": asdict(work),
            "hardware": asdict(hardware),
            "plans": [_row(plan) for plan in plans],
        },
    )
    return 0 if any(plan.fits for plan in plans) else 1


def _streams(config: "TrainConfig", plan: "Plan") -> str:
    """Return the override that so many ranks need of the stream, if any."""
    needed = plan.settings.world_size * max(1, config.data.num_workers)
    return "" if config.data.num_streams % needed == 0 else f" data.num_streams={needed}"


def _row(plan: "Plan") -> dict[str, Any]:
    return {
        **asdict(plan.settings),
        "fits": plan.fits,
        "step_seconds": plan.seconds.total,
        "pairs_per_s": plan.pairs_per_s,
        "efficiency": plan.seconds.efficiency,
        "seconds": plan.seconds.parts(),
        "memory_bytes": {**plan.memory.parts(), "total": plan.memory.total},
        "fullest": plan.memory.phase,
        "rank_memory_bytes": plan.rank_memory,
        "sent_bytes": plan.sent,
    }


def _calibrate(args: argparse.Namespace, config: "TrainConfig") -> int:
    import torch

    from dist_vse.tools.plan.calibrate import calibrate, save_hardware

    hardware = calibrate(config, vocabulary=args.vocabulary, rounds=args.rounds)
    day = datetime.date.today().isoformat()
    about = f"Measured by `dist-vse plan --calibrate`, torch {torch.__version__}, {day}."
    save_hardware(hardware, args.calibrate, about)
    say(f"wrote {args.calibrate}; plan with --hardware {args.calibrate}")
    return 0


def _calibrate_gpu(args: argparse.Namespace) -> int:
    from dist_vse.tools.plan.calibrate import save_hardware
    from dist_vse.tools.plan.doctor_figures import hardware_of_gpu, read_figures
    from dist_vse.tools.plan.hardware import load_hardware

    figures, gpus = read_figures(args.from_doctor)
    base = load_hardware(args.hardware or HARDWARE)
    about = (
        f"Measured by `dist-vse doctor --gpu` ({args.from_doctor.name}); links between nodes"
        f"{' and inside them' * (gpus < 2)} are those of {base.name}, attained_encoders is assumed."
    )
    save_hardware(hardware_of_gpu(figures, base, gpus), args.calibrate, about)
    say(f"wrote {args.calibrate}; plan with --hardware {args.calibrate}")
    return 0


def _check(
    args: argparse.Namespace, config: "TrainConfig", hardware: "Hardware", report: dict[str, Any]
) -> int:
    """Print predictions compared with a report's rows; return 1 if one is out of bounds."""
    from dist_vse.tools.plan.check import MEMORY_BOUND, TIME_BOUND, check_rows
    from dist_vse.tools.plan.table import check_table, parts_table

    checked = check_rows(report, config, _count(config, args.vocabulary), hardware)
    if not checked:
        raise UserError(f"{args.check}: no row of one run on one node in this precision")
    console = _console()
    console.print(check_table(checked))
    console.print(parts_table(checked))
    in_time = sum(abs(one.time_error) <= TIME_BOUND for one in checked)
    in_memory = sum(abs(one.memory_error) <= MEMORY_BOUND for one in checked)
    say(f"within the bounds: time {in_time}, memory {in_memory} of {len(checked)} rows")
    _write(
        args.out,
        {
            "rows": [
                {
                    **_row(one.plan),
                    "measured": one.row,
                    "time_error": one.time_error,
                    "memory_error": one.memory_error,
                }
                for one in checked
            ]
        },
    )
    return 0 if in_time == in_memory == len(checked) else 1


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    output_json(path, {"plan": 1, **content})
    say(f"wrote {path}")
