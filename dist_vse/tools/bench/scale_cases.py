"""What `dist-vse bench scale` measures: a base case, and one change of it a row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig, load_config

BASE, STRONG, WEAK, INDEPENDENT = "base", "strong", "weak", "independent"

SMALL = (  # the default
    "model.image.name=vit_tiny_patch16_224",
    "model.image.size=48",
    "model.text.width=128",
    "model.text.depth=2",
    "model.text.max_tokens=16",
    "loss.learn_temperature=true",
    "global_batch_size=512",
    "chunk_size=64",
)


@dataclass(frozen=True)
class Case:
    """One row: a run's config on a number of processes."""

    series: str
    """base; strong (the same global batch), weak (the same batch a rank), independent (as many
    runs of one process at once as a weak row has ranks); or the setting that is varied."""
    world_size: int
    config: TrainConfig
    runs: int = 1
    """How many of it run at the same time."""
    varied: str = ""
    """The setting that is varied, with its value."""


def read_settings(settings: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the config's path, None for the built-in one, and the overrides.

    Raises UserError for two files.
    """
    files = [word for word in settings if "=" not in word]
    overrides = [word for word in settings if "=" in word]
    if len(files) > 1:
        raise UserError(f"two configs ({', '.join(files)}): give one, and key=value behind it")
    return (files[0], overrides) if files else (None, [*SMALL, *overrides])


def plan_cases(
    settings: Sequence[str], processes: Sequence[int], vary: Sequence[str], *, independent: bool
) -> list[Case]:
    """Return all cases, the base first.

    The base has the config's own global batch, on the first number of processes. What `vary` names
    (`key=value,value`) is varied on the last one. Raises UserError for what cannot be run.
    """
    path, overrides = read_settings(settings)
    config = load_config(path, overrides)
    first, last = processes[0], processes[-1]
    cases = [Case(BASE, first, config)]
    for size in processes[1:]:
        cases.append(Case(STRONG, size, config))
        batch = config.global_batch_size * size // first
        cases.append(Case(WEAK, size, replace(config, global_batch_size=batch)))
        if independent and first == 1:
            cases.append(Case(INDEPENDENT, 1, config, runs=size))
    for axis in vary:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise UserError(f"--vary {axis!r}: write key=value,value, such as chunk_size=32,128")
        for value in values.split(","):
            changed = load_config(path, [*overrides, f"{key}={value}"])
            if changed != config:
                cases.append(Case(key, last, changed, varied=f"{key}={value}"))
    for case in cases:
        _check(case)
    return cases


def share(cases: Sequence[Case], task: str | None) -> list[Case]:
    """Return the cases of one task of several, `i/n` with i from 0; all without a task.

    Every task measures the first case as well, so that what it measures has its reference.
    """
    if task is None:
        return list(cases)
    number, slash, count = task.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"--task {task!r}: write i/n, i from 0 to n - 1")
    return [cases[0], *cases[1:][int(number) :: int(count)]]


def _check(case: Case) -> None:
    config, size = case.config, case.world_size
    batch = config.global_batch_size
    chunk = config.asked_chunk_size(on_gpu=distributed.device().type == "cuda")
    whole = math.lcm(size, size * chunk if chunk is not None and chunk * size < batch else 1)
    if batch % whole:
        raise UserError(
            f"global_batch_size ({batch}) must be a multiple of {whole}, for {size} processes and "
            f"chunks of {chunk} pairs"
        )
