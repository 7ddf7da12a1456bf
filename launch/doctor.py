"""`dist-vse doctor`: try in seconds what would else fail after an hour in the queue."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_vse.config import TrainConfig, load_config
from dist_vse.errors import UserError, first_line
from launch.cluster import ClusterConfig, load_cluster

GIB = 2**30


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


@dataclass(frozen=True)
class Probe:
    """A job's work: join the other ranks and add a number up."""

    bf16: bool

    def __call__(self) -> int:
        """Return 0. Raises UserError if the ranks don't find the right sum, or lack a type."""
        import torch

        from dist_vse import distributed

        with distributed.process_group(), distributed.same_verdict():
            size = distributed.world_size()
            ones = torch.ones(1 << 20, device=distributed.device())
            total = distributed.all_reduce_sum(ones)[0].item()
            if total != size:
                raise UserError(f"the sum over {size} ranks is {total}")
            if self.bf16 and ones.is_cuda and not torch.cuda.is_bf16_supported():
                raise UserError("this GPU has no bfloat16; set engine.precision=fp32")
        return 0


def doctor(
    config_path: str, overrides: Sequence[str], cluster_path: str | None, patience_s: float
) -> int:
    """Make all checks, print a line each, and return 2 if any failed."""
    config, cluster = load_config(config_path, overrides), load_cluster(cluster_path)
    checkup = Checkup(config_path, overrides, cluster_path, config, cluster, patience_s)
    failed = False
    for name, check in _CHECKS.items():
        try:
            print(f"ok    {name}: {check(checkup)}", flush=True)
        except UserError as error:
            failed = True
            print(f"FAIL  {name}: {error}", flush=True)
    return 2 if failed else 0


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
            index.offsets(shard)
            path = index.root / shard.path
            if is_remote(shard.path):
                continue
            if not path.is_file():
                raise UserError(f"{path}: is missing; shard the data again, or copy it whole")
            if path.stat().st_size != shard.num_bytes:
                raise UserError(
                    f"{path}: has {path.stat().st_size} bytes, the index says {shard.num_bytes}; "
                    "copy it again"
                )
    return f"{num_shards} shards are as their index says"


def _samples(checkup: Checkup) -> str:
    from dist_vse.builders import build_train_batches
    from dist_vse.checkpoint import Progress
    from dist_vse.run_dir import open_train_sets, run_tokenizer

    config, nothing = checkup.config, Progress(0, 0, [])
    sets = open_train_sets(config)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_tokenizer(config, Path(folder), build=True)
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
    config, cluster = checkup.config, checkup.cluster
    whole, trained = _num_parameters(config)
    size, stage = cluster.world_size, config.engine.zero_stage
    states = {"adamw": 2, "adam": 2, "sgd": int(config.optim.momentum > 0)}[config.optim.name]
    share = [size if stage >= least else 1 for least in (3, 2, 1)]
    per_rank = 4 * (whole / share[0] + trained / share[1] + trained * (1 + states) / share[2])
    needed = per_rank * cluster.processes_per_node / GIB
    words = f"{per_rank / GIB:.2f} GiB a rank for weights, gradients and optimizer"
    if not cluster.gpus_per_node and cluster.mem_gib and needed > cluster.mem_gib:
        raise UserError(
            f"{words}: {needed:.1f} GiB a node, but mem_gib is {cluster.mem_gib}; ask for more, or "
            "raise engine.zero_stage"
        )
    return f"{words}; a chunk's activations come on top"


def _num_parameters(config: TrainConfig) -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them are trained."""
    from dist_vse.run_dir import run_model, run_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        model = run_model(config, run_tokenizer(config, Path(folder), build=True))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _disk(checkup: Checkup) -> str:
    config = checkup.config
    folder = _existing(Path(config.output_dir))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"{folder}: can't be written to ({first_line(error)})") from error
    whole, trained = _num_parameters(config)
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

    parent = _existing(Path(checkup.config.output_dir).absolute())
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as folder:
        overrides = [*checkup.overrides, f"output_dir={folder}/run"]
        plan = plan_submission(checkup.config_path, overrides, checkup.cluster_path)
        job = prepare(plan)
        work = Probe(bf16=checkup.config.engine.precision == "bf16")
        started, began = start(plan, replace(job, work=work)), time.monotonic()
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
    return f"{checkup.cluster.world_size} met in {time.monotonic() - began:.0f} s"


def _until(end: float) -> Iterator[None]:
    while time.monotonic() < end:
        yield
        time.sleep(0.2)


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
