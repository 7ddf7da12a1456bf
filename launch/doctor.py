"""`dist-vse doctor`: try in seconds what would else fail after an hour in the queue."""

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.config import TrainConfig, load_config
from dist_vse.errors import UserError, first_line
from launch.cluster import ClusterConfig, load_cluster
from launch.probe import GIB, Probe

if TYPE_CHECKING:
    from dist_vse.index import Index, Shard
    from dist_vse.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkup:
    """What is to be run, and where."""

    config_path: str
    overrides: Sequence[str]
    cluster_path: str | None
    config: TrainConfig
    cluster: ClusterConfig
    patience_s: float
    """Seconds that the ranks' job may take, with its time in the queue."""

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The run's tokenizer; a vocabulary is made from all captions, so only once."""
        from dist_vse.run_dir import run_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            return run_tokenizer(self.config, Path(folder), build=True)

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """How many parameters the model has, and how many of them are trained."""
        from dist_vse.run_dir import run_model

        model = run_model(self.config, self.tokenizer)
        numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return sum(n for n, _ in numbers), sum(n for n, trained in numbers if trained)

    @functools.cached_property
    def rank_gib(self) -> float:
        """Memory of a rank for weights, gradients and optimizer, without activations."""
        config, size = self.config, self.cluster.world_size
        whole, trained = self.sizes
        states = {"adamw": 2, "adam": 2, "sgd": int(config.optim.momentum > 0)}[config.optim.name]
        share = [size if config.engine.zero_stage >= least else 1 for least in (3, 2, 1)]
        numbers = whole / share[0] + trained / share[1] + trained * (1 + states) / share[2]
        return 4 * numbers / GIB


def doctor(
    config_path: str, overrides: Sequence[str], cluster_path: str | None, patience_s: float
) -> int:
    """Make all checks, print a line each, and return 2 if any failed."""
    config, cluster = load_config(config_path, overrides), load_cluster(cluster_path)
    checkup = Checkup(config_path, overrides, cluster_path, config, cluster, patience_s)
    began, failures = time.monotonic(), dict[str, str]()
    for name, check in _CHECKS.items():
        try:
            print(f"ok    {name}: {check(checkup)}", flush=True)
        except UserError as error:
            first = failures.setdefault(str(error), name)
            print(f"FAIL  {name}: {error if first == name else f'as {first}'}", flush=True)
    print(f"{len(_CHECKS)} checks in {time.monotonic() - began:.0f} s")
    return 2 if failures else 0


def _batch(checkup: Checkup) -> str:
    config, size = checkup.config, checkup.cluster.world_size
    config.check_world_size(size)
    return f"{config.global_batch_size} pairs on {size} processes"


def _shards(checkup: Checkup) -> str:
    from dist_vse.index import is_remote, read_index
    from dist_vse.run_dir import open_train_sets

    config = checkup.config
    evaluated = read_index(config.data.index)
    splits = [(s.index, s.split) for s in open_train_sets(config)]
    splits.append((evaluated, config.data.eval_split))
    num_shards = 0
    for index, name in splits:
        for shard in index.split(name).shards:
            num_shards += 1
            rows = index.offsets(shard)
            if not is_remote(shard.path):
                _look_into(index, shard, rows[-1].tolist() if len(rows) else None)
    return f"{num_shards} shards are as their index says"


def _look_into(index: "Index", shard: "Shard", last: list[int] | None) -> None:
    """Check a shard's size, and that its last sample is where the index says."""
    path = index.root / shard.path
    if not path.is_file():
        raise UserError(f"{path}: is missing; shard the data again, or copy it whole")
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
        hint = f"`dist-vse shard verify {index.root}` says which are"
        raise UserError(f"{path}: its samples are not where the index says; {hint}") from error


def _samples(checkup: Checkup) -> str:
    from dist_vse.builders import build_train_batches
    from dist_vse.checkpoint import Progress
    from dist_vse.run_dir import open_train_sets

    config, nothing = checkup.config, Progress(0, 0, [])
    sets, tokenizer = open_train_sets(config), checkup.tokenizer
    data = replace(config.data, num_workers=0)
    whole = -(-config.global_batch_size // data.lanes) * data.lanes  # the batch is checked apart
    large = replace(config, data=data, global_batch_size=whole, chunk_size=whole)
    build_train_batches(large, sets, tokenizer, nothing)  # raises where samples are too few
    small = replace(config, data=data, global_batch_size=data.lanes, chunk_size=data.lanes)
    batch = next(build_train_batches(small, sets, tokenizer, nothing))
    if batch.skipped:
        raise UserError(f"bad samples among the first: {batch.skipped[0]}")
    return f"{sum(s.num_samples for s in sets)} samples, the first {data.lanes} can be read"


def _memory(checkup: Checkup) -> str:
    cluster = checkup.cluster
    needed = checkup.rank_gib * cluster.processes_per_node
    words = f"{checkup.rank_gib:.2f} GiB a rank for weights, gradients and optimizer"
    if not cluster.gpus_per_node and cluster.mem_gib and needed > cluster.mem_gib:
        raise UserError(
            f"{words}: {needed:.1f} GiB a node, but mem_gib is {cluster.mem_gib}; ask for more, or "
            "raise engine.zero_stage"
        )
    return f"{words}; a chunk's activations come on top"


def _disk(checkup: Checkup) -> str:
    config = checkup.config
    folder = _writable(config)
    whole, trained = checkup.sizes
    kept = config.keep_checkpoints + config.keep_best + 1  # one more while it is being written
    needed = 4 * (whole + 2 * trained) * kept / GIB
    free = shutil.disk_usage(folder).free / GIB
    words = f"{kept} checkpoints take {needed:.2f} GiB, {folder} has {free:.2f}"
    if needed > free:
        raise UserError(f"{words}; make room, or lower keep_checkpoints")
    return words


def _ranks(checkup: Checkup) -> str:
    from launch import control, slurm
    from launch.follow import has_ended, report
    from launch.submit import plan_submission, prepare, start

    parent = _writable(checkup.config)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as folder:
        overrides = [*checkup.overrides, f"output_dir={folder}/run"]
        plan = plan_submission(checkup.config_path, overrides, checkup.cluster_path)
        job = prepare(plan)
        bf16 = checkup.config.engine.precision == "bf16"
        work = Probe(bf16=bf16, needed_gib=_known_gib(checkup))
        began = time.monotonic()
        started = start(plan, replace(job, work=work))
        for _ in _until(began + checkup.patience_s):
            if has_ended(started):
                break
        else:
            control.cancel(plan.folder.parent)
            state = control.job_state(control.read_note(plan.folder.parent))
            raise UserError(
                f"the ranks' job is still {state} after {checkup.patience_s:.0f} s; give --timeout"
            )
        if report(started):
            raise UserError(f"the ranks of {plan.scheduler} can't work together (see above)")
        assert plan.scheduler != "slurm" or slurm.job_state(started.job_id) == "COMPLETED"
    number, precision = checkup.cluster.world_size, checkup.config.engine.precision
    return f"{number} met in {time.monotonic() - began:.0f} s, have {precision} and the memory"


def _known_gib(checkup: Checkup) -> float:
    """Return a rank's memory; 0 where a check before this one has told why it can't be known."""
    try:
        return checkup.rank_gib
    except UserError:
        return 0.0


def _until(end: float) -> Iterator[None]:
    while time.monotonic() < end:
        yield
        time.sleep(0.2)


def _writable(config: TrainConfig) -> Path:
    """Return the folder in which the run's can be made. Raises UserError if it can't."""
    folder = _existing(Path(config.output_dir).absolute())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        words = f"can't be written to ({first_line(error)}); give another output_dir"
        raise UserError(f"{folder}: {words}") from error
    return folder


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return folder if folder.is_dir() else _existing(folder.absolute().parent)


_CHECKS: dict[str, Callable[[Checkup], str]] = {
    "batch": _batch,
    "shards": _shards,
    "samples": _samples,
    "memory": _memory,
    "disk": _disk,
    "ranks": _ranks,
}
