"""From a config to a run that can take its first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.errors import writing
from dist_vse.common.log import logger
from dist_vse.config import TrainConfig
from dist_vse.data.index import Index, read_index
from dist_vse.data.precomputed import Features
from dist_vse.data.streams import TrainSet, open_train_sets
from dist_vse.data.teacher import Teacher
from dist_vse.engine import RunEngine
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import use_precision
from dist_vse.models.tokenizer import Tokenizer
from dist_vse.runs import checkpoint
from dist_vse.runs.files import CHECKPOINTS
from dist_vse.runs.folder import prepare_run_dir, write_config
from dist_vse.runs.lease import Lease, acquire
from dist_vse.runs.metrics import Meter
from dist_vse.runs.resolve import resolve
from dist_vse.runs.trackers import check_trackers
from dist_vse.runs.trained import build_for_checkpoint, build_start, run_tokenizer
from dist_vse.training.build_engine import build_engine
from dist_vse.training.chunking import agree, choose_chunks
from dist_vse.training.compile_warmup import warm_up
from dist_vse.training.flops import count_flops, peak_flops
from dist_vse.training.frozen_features import open_run_features
from dist_vse.training.kernel_check import settle_kernels
from dist_vse.training.replay_check import check_replay


@dataclass(frozen=True)
class Run:
    """What lives as long as the run."""

    config: TrainConfig
    run_dir: Path
    index: Index
    train_sets: list[TrainSet]
    tokenizer: Tokenizer
    engine: RunEngine
    keep_graphs: int
    features: Features | None
    teacher: Teacher | None
    lease: Lease
    meter: Meter
    kernels: str
    """What computes the loss: `fused` or `tiled`."""
    kernels_reason: str

    def check_lease(self) -> None:
        """Raise LostLease, alike on every rank, if a later attempt has taken the run over."""
        with distributed.raise_on_all_ranks():
            if distributed.is_main_process():
                self.lease.check()

    @contextmanager
    def exclusive_write(self) -> Iterator[None]:
        """Check the lease, then write into the run's folder.

        Every rank calls this; the block must not wait for other ranks. Raises alike on every rank:
        as `check_lease` does, and UserError for what cannot be written.
        """
        with distributed.raise_on_all_ranks(), writing(self.run_dir):
            if distributed.is_main_process():
                self.lease.check()
            yield


def set_up(config: TrainConfig) -> Run:
    """Resolve the config, open the data and the run's folder, build the model and its engine.

    The config comes to rest here: `resolve` fills it in, and the chunk size is tried if nothing
    else has decided it. Every rank calls this. Raises UserError alike on every rank.
    """
    with distributed.raise_on_all_ranks():
        if distributed.is_main_process():
            config = resolve(config)
    config = distributed.broadcast_object(config)
    on_gpu = distributed.device().type == "cuda"
    config.check_world_size(distributed.world_size(), on_gpu=on_gpu)
    with distributed.raise_on_all_ranks():
        check_trackers(config.trackers)
        index = read_index(config.data.index, allow_pipe=config.data.allow_pipe)
        index.split(config.data.eval_split)
        train_sets = open_train_sets(config.data)
        config = config.with_budget(sum(a_set.per_epoch for a_set in train_sets))
        features = open_run_features(config, index)
        teacher = None if config.loss.teacher is None else Teacher(Path(config.loss.teacher))
        with writing(Path(config.output_dir)):
            if distributed.is_main_process():
                run_tokenizer(config, prepare_run_dir(config), build=True)
    run_dir = Path(config.output_dir)
    with distributed.raise_on_all_ranks():
        tokenizer = run_tokenizer(config, run_dir, build=False)
        if checkpoint.steps(run_dir / CHECKPOINTS):
            model = build_for_checkpoint(config, tokenizer)
        else:
            model = build_start(config, tokenizer)
        model = model.to(distributed.device())
        use_precision(distributed.device(), config.engine.precision)
        check_replay(
            model,
            image_size=config.model.image.size,
            num_tokens=config.model.text.max_tokens,
            precision=config.engine.precision,
        )
        chunking = choose_chunks(config, model)
        meter = _build_meter(config, model)
    settled = settle_kernels(config)
    config = settled.config
    chunking = agree(chunking)
    if not isinstance(config.chunk_size, int):
        config = replace(config, chunk_size=chunking.chunk_size)
        write_config(config)
    rows, graphs = chunking.chunk_size, chunking.keep_graphs
    logger.info("%d pairs a chunk, %d chunks keep their graphs", rows, graphs)
    with distributed.raise_on_all_ranks():
        warm_up(model, config, rows)
    engine = build_engine(config, model)
    with distributed.raise_on_all_ranks(), writing(run_dir):
        lease = acquire(run_dir) if distributed.is_main_process() else None
    lease = distributed.broadcast_object(lease)
    return Run(
        config,
        run_dir,
        index,
        train_sets,
        tokenizer,
        engine,
        graphs,
        features,
        teacher,
        lease,
        meter,
        settled.kernels,
        settled.reason,
    )


def _build_meter(config: TrainConfig, model: DualEncoder) -> Meter:
    """Return what measures the steps; it counts operations where the device's peak is known."""
    peak = peak_flops(distributed.device(), config.engine.precision)
    if peak is None:
        return Meter()
    size, words = config.model.image.size, config.model.text.max_tokens
    flops = count_flops(model, size, words, negatives=config.data.negatives > 0)
    return Meter(partial(flops.of_step, config.global_batch_size, config.model.embed_dim), peak)
