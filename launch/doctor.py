"""`dist-vse doctor`: find in seconds what would otherwise fail after an hour in the queue."""

import contextlib
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.terminal import say
from dist_vse.common.units import GIB
from dist_vse.config import TrainConfig, load_config
from dist_vse.data.index import Index, Shard, is_remote, read_index
from dist_vse.launch.check_job import run_check_job, short_cluster
from dist_vse.launch.cluster import ClusterConfig, load_cluster
from dist_vse.launch.rank_check import RankCheck
from dist_vse.launch.schedulers import find_scheduler
from dist_vse.launch.submit import plan_submission

if TYPE_CHECKING:
    from dist_vse.models.tokenizer import Tokenizer
    from dist_vse.tools.plan.step_memory import StepMemory


@dataclass(frozen=True)
class Checkup:
    """What is to run, and where."""

    config_path: str
    overrides: Sequence[str]
    cluster_path: str | None
    config: TrainConfig
    cluster: ClusterConfig
    timeout_s: float
    """Seconds that the ranks' job may take, with its time in the queue."""

    def shards(self) -> Iterator[tuple[Index, Shard]]:
        """Yield the shards of the training and evaluation splits, each with its index."""
        from dist_vse.data.streams import open_train_sets

        evaluated = read_index(self.config.data.index, allow_pipe=self.config.data.allow_pipe)
        splits = [(s.index, s.split) for s in open_train_sets(self.config.data)]
        for index, name in [*splits, (evaluated, self.config.data.eval_split)]:
            yield from ((index, shard) for shard in index.split(name).shards)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The run's tokenizer; built once, since a vocabulary is made from all captions."""
        from dist_vse.runs.trained import run_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            return run_tokenizer(self.config, Path(folder), build=True)

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """The number of parameters, and of trained ones."""
        from dist_vse.models.build import build_model

        model = build_model(self.config.model, self.config.loss, self.tokenizer)
        numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return sum(n for n, _ in numbers), sum(n for n, trained in numbers if trained)

    @functools.cached_property
    def step_memory(self) -> "StepMemory":
        """Memory of a rank in a step."""
        from dist_vse.tools.plan.step_memory import step_memory

        return step_memory(
            self.config,
            self.cluster.world_size,
            parameters=self.sizes,
            vocabulary=self.tokenizer.vocab_size,
            on_cpu=not self.cluster.gpus_per_node,
        )


def doctor(
    config_path: str, overrides: Sequence[str], cluster_path: str | None, timeout_s: float
) -> int:
    """Make all checks, print one line for each, and return 2 if any failed."""
    config, cluster = load_config(config_path, overrides), load_cluster(cluster_path)
    checkup = Checkup(config_path, overrides, cluster_path, config, cluster, timeout_s)
    find_scheduler(cluster.scheduler)  # an unknown name ends here
    began, failures = time.monotonic(), dict[str, str]()
    for name, check in _CHECKS.items():
        try:
            say(f"ok    {name}: {check(checkup)}", flush=True)
        except UserError as error:
            first = failures.setdefault(str(error), name)
            say(f"FAIL  {name}: {error if first == name else f'same error as {first}'}", flush=True)
    say(f"{len(_CHECKS)} checks in {time.monotonic() - began:.0f} s")
    return 2 if failures else 0


def _batch(checkup: Checkup) -> str:
    config, size = checkup.config, checkup.cluster.world_size
    config.check_world_size(size, on_gpu=checkup.cluster.gpus_per_node > 0)
    return f"{config.global_batch_size} pairs on {size} processes"


def _shards(checkup: Checkup) -> str:
    num_local = num_remote = 0
    for index, shard in checkup.shards():
        if is_remote(shard.path):
            num_remote += 1
            continue
        num_local += 1
        rows = index.offsets(shard)
        _check_shard(index, shard, rows[-1].tolist() if len(rows) else None)
    words = f"{num_local} shards match their index"
    return f"{words}; {num_remote} at URLs were not checked" if num_remote else words


def _check_shard(index: Index, shard: Shard, last: list[int] | None) -> None:
    """Check a shard's size, and the position of its last sample."""
    path = index.root / shard.path
    if not path.is_file():
        raise UserError(f"{path}: missing; shard the data again, or copy it again")
    found = path.stat().st_size
    if found != shard.num_bytes:
        words = f"has {found} bytes, the index says {shard.num_bytes}; copy it again"
        raise UserError(f"{path}: {words}")
    if last is None:
        return
    _, _, start, length, _ = last
    try:
        with (index.root / (shard.meta_name or shard.path)).open("rb") as file:
            file.seek(start)
            json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({first_line(error)})") from error
    except ValueError as error:
        hint = f"run `dist-vse shard verify {index.root}`"
        raise UserError(f"{path}: its samples are not where the index says; {hint}") from error


def _samples(checkup: Checkup) -> str:
    from dist_vse.data.streams import open_train_sets
    from dist_vse.runs.checkpoint import Progress
    from dist_vse.training.batches import build_train_batches

    config, nothing = checkup.config, Progress(0, 0, [])
    sets, tokenizer = open_train_sets(config.data), checkup.tokenizer
    data = replace(config.data, num_workers=0)
    whole = (
        -(-config.global_batch_size // data.num_streams) * data.num_streams
    )  # the batch has a check of its own
    large = replace(config, data=data, global_batch_size=whole, chunk_size=whole)
    build_train_batches(large, sets, tokenizer, nothing)  # raises where samples are too few
    small = replace(
        config, data=data, global_batch_size=data.num_streams, chunk_size=data.num_streams
    )
    batch = next(build_train_batches(small, sets, tokenizer, nothing))
    if batch.skipped:
        raise UserError(f"one of the first samples can't be read: {batch.skipped[0]}")
    return f"{sum(s.num_samples for s in sets)} samples, the first {data.num_streams} can be read"


def _memory(checkup: Checkup) -> str:
    cluster = checkup.cluster
    states, rank = checkup.step_memory.states / GIB, checkup.step_memory.peak / GIB
    needed = rank * cluster.processes_per_node
    what = "weights, gradients and optimizer"
    words = f"{rank:.2f} GiB a rank in a step ({states:.2f} for {what})"
    if checkup.config.model.pretrained is not None:
        words = f"{rank:.2f} GiB a rank for {what}, without a chunk's activations"
    if not cluster.gpus_per_node and cluster.mem_gib and needed > cluster.mem_gib:
        raise UserError(
            f"{words}: {needed:.1f} GiB a node, but mem_gib is {cluster.mem_gib}; ask for more, "
            "lower chunk_size, or raise engine.zero_stage"
        )
    return words


def _disk(checkup: Checkup) -> str:
    config = checkup.config
    folder = _writable(config)
    whole, trained = checkup.sizes
    kept = config.keep_checkpoints + config.keep_best + 1  # one more while it is written
    weights = trained if config.model.lora.rank else whole  # adapters come without their base
    needed = 4 * (weights + config.state_tensors * trained) * kept / GIB
    free = shutil.disk_usage(folder).free / GIB
    words = f"{kept} checkpoints take {needed:.2f} GiB, {folder} has {free:.2f}"
    if needed > free:
        raise UserError(f"{words}; free some space, or lower keep_checkpoints")
    return words


def _ranks(checkup: Checkup) -> str:
    cluster, parent = checkup.cluster, _writable(checkup.config)
    with tempfile.TemporaryDirectory(
        prefix=".doctor-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        overrides = [*checkup.overrides, f"output_dir={folder}"]
        plan = plan_submission(checkup.config_path, overrides, short_cluster(cluster))
        took_s = run_check_job(plan, _rank_check(checkup, folder), checkup.timeout_s)
    precision = checkup.config.engine.precision
    return f"{cluster.world_size} communicate, have {precision} and the memory ({took_s:.0f} s)"


def _rank_check(checkup: Checkup, folder: str) -> RankCheck:
    """Return the ranks' part; what is unknown here was reported by an earlier check."""
    needed_gib, shard = 0.0, None
    with contextlib.suppress(UserError):
        needed_gib = checkup.step_memory.peak / GIB
    with contextlib.suppress(UserError):
        paths = (index.root / s.path for index, s in checkup.shards() if not is_remote(s.path))
        shard = next(map(str, paths), None)
    bf16 = checkup.config.engine.precision == "bf16"
    return RankCheck(bf16=bf16, needed_gib=needed_gib, shard=shard, folder=folder)


def _writable(config: TrainConfig) -> Path:
    """Return the existing folder that holds the run's. Raises UserError if it is not writable."""
    folder = _existing(Path(config.output_dir).absolute())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        words = f"can't be written to ({first_line(error)}); give another output_dir"
        raise UserError(f"{folder}: {words}") from error
    return folder


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return folder if folder.is_dir() else _existing(folder.absolute().parent)


_CHECKS: dict[str, Callable[[Checkup], str]] = {
    "batch": _batch,
    "shards": _shards,
    "samples": _samples,
    "memory": _memory,
    "disk": _disk,
    "ranks": _ranks,
}
