"""The configuration of a run: its sections, and every check that spans several of them.

Two batch numbers matter: `global_batch_size` is the science, `chunk_size` the hardware; the
rest is derived. A component takes its own section, or plain values; what joins several sections
(`training.setup`, `training.batches`, `evaluation.batches` …) takes the whole.
"""

from dataclasses import dataclass, field, replace

from dist_vse.common.errors import UserError
from dist_vse.common.local_path import require_local
from dist_vse.config.checks import AUTO, at_least, check, number_or_auto
from dist_vse.config.evaluation import EvalSetConfig, check_sets
from dist_vse.config.optimizers import OptimConfig, needs_whole_tensors, state_tensors
from dist_vse.config.sections import (
    GRAPHS,
    CacheConfig,
    DataConfig,
    EmaConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    ResumeConfig,
)

DEFAULT_CHUNK = 64  # pairs, where nothing is tried


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output_dir: str = "runs/run"
    """The run's local folder: config, metrics, checkpoints, report. An existing run is resumed."""
    seed: int = 0
    global_batch_size: int = 256
    """Pairs a step over all ranks: every pair sees all others as negatives."""
    chunk_size: int | str | None = None
    """Pairs a rank encodes at a time (gradient caching); at least the rank's share = no caching.
    `auto` tries at the start which is the largest that fits, and writes it into the run's config:
    where there is dropout, other chunks draw other numbers. Left out: `auto` on a GPU, 64 on a
    CPU."""
    total_steps: int = 1000
    """Length of the run in steps. A larger batch then means more samples; the next two do not."""
    total_samples: int = 0
    """Length of the run in pairs, in the place of `total_steps`, which is rounded up from it."""
    epochs: float = 0.0
    """Length of the run in readings of the training data, in the place of both."""
    trackers: list[str] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl and TensorBoard: `wandb`, `mlflow`. Both can stay
    offline (WANDB_MODE=offline; MLflow writes into the run's folder)."""
    project: str = "dist_vse"
    """The trackers' name of the project (MLflow: experiment) that the run belongs to."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end (and when interrupted)."""
    checkpoint_samples: int = 0
    """Pairs between checkpoints, or 0."""
    checkpoint_minutes: float = 30.0
    """Minutes between checkpoints, or 0: what a lost node may cost, or a loss that diverged."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Further checkpoints that are kept: those of the best best_metric, of the steps that were
    evaluated as well."""
    eval_sets: list[EvalSetConfig] = field(default_factory=list)
    """Further sets to evaluate on, besides `data.eval_split`: `[{name: coco, index: DIR,
    split: test, protocol: coco-5k}, {name: imagenet, zeroshot: DIR, classes: imagenet}]`."""
    eval_loss: bool = False
    """Evaluate the loss too (`val_loss`): over batches of global_batch_size of the eval_split, each
    image with its first caption."""
    best_metric: str = "rsum"
    """Metric of an evaluation by which keep_best and patience judge: rsum, or i2t_ or t2i_ with r1,
    r5, r10 or map; NAME/metric of an item of eval_sets; or val_loss, the lower the better."""
    patience: int = 0
    """Evaluations without a better best_metric after which the run ends; 0 goes on to the end."""
    batch_report: bool = False
    """At log steps, estimate what a larger batch would be worth: the gradient's noise scale and the
    bias of few negatives (docs/explain/batch.md), for metrics.jsonl and the report."""
    profile: bool = False
    """Write a trace of three steps (torch.profiler, rank 0) to `profile.json` in the run's folder,
    for https://ui.perfetto.dev."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    def __post_init__(self) -> None:
        require_local(self.output_dir, "output_dir=")
        require_local(self.data.features or "", "data.features=")
        at_least(1, global_batch_size=self.global_batch_size)
        if self.chunk_size is not None:
            number_or_auto(1, chunk_size=self.chunk_size)
        at_least(1, total_steps=self.total_steps, log_every=self.log_every)
        at_least(0, total_samples=self.total_samples, epochs=self.epochs)
        at_least(1, keep_checkpoints=self.keep_checkpoints)
        image, whole = self.model.image, self.model.is_whole
        check(
            whole or image.weights is not None or not image.frozen,
            "model.image.frozen=true would freeze random weights: give model.image.weights , "
            "model.pretrained or model.from_run, or set it to false",
        )
        at_least(0, eval_every=self.eval_every, checkpoint_every=self.checkpoint_every)
        at_least(0, checkpoint_samples=self.checkpoint_samples, keep_best=self.keep_best)
        at_least(0, checkpoint_minutes=self.checkpoint_minutes, patience=self.patience)
        check_sets(self.eval_sets, self.best_metric, val_loss=self.eval_loss)
        check(
            self.patience == 0 or self.eval_every > 0,
            f"patience ({self.patience}) counts evaluations: set eval_every as well",
        )
        check(
            self.keep_best == 0 or self._scores_a_checkpoint(),
            f"keep_best ({self.keep_best}) can keep none: before the last step, no step is both "
            f"evaluated (eval_every={self.eval_every}) and saved (checkpoint_every="
            f"{self.checkpoint_every}, checkpoint_samples={self.checkpoint_samples}); make "
            "eval_every a multiple of checkpoint_every",
        )
        check(
            (self.model.pretrained is None and image.kind == "timm")
            or not (image.size_schedule or image.patch_drop),
            "model.image.size_schedule and model.image.patch_drop are for timm models "
            "(model.image.name), not for the encoder of model.pretrained or of another kind",
        )
        widths, embed_dim = self.loss.widths, self.model.embed_dim
        check(
            len({*widths}) == len(widths)
            and all(w > 0 and (w < embed_dim or self.model.is_whole) for w in widths),
            f"loss.widths ({widths}) must be different numbers above 0 and below model.embed_dim "
            f"({embed_dim})",
        )
        data = self.data
        check(
            not image.reads_vectors or not (data.flip or data.color_jitter or data.features),
            "model.image.kind=vectors reads no images: leave out data.flip, data.color_jitter and "
            "data.features",
        )
        augmented = data.crop == "random" or data.flip or data.color_jitter > 0
        augmented = augmented or image.drifting_statistics
        check(
            data.features is None
            or (image.all_frozen and image.weights is not None and not augmented and not data.mix),
            "data.features needs model.image.frozen=true with model.image.weights, "
            "data.crop=center, data.flip=false, data.color_jitter=0, "
            "model.image.drifting_statistics=false and no data.mix: an image must have the same "
            "features every time",
        )
        keep, engine = self.cache.keep_graphs, self.engine
        check(
            engine.name != "deepspeed"
            or engine.coalesce
            or engine.zero_stage < 3
            or keep == AUTO
            or int(keep) <= 1,
            f"cache.keep_graphs ({keep}) must be 0, 1 or auto under engine.zero_stage=3 with "
            "engine.coalesce=false (more would give wrong gradients); or set engine.coalesce=true",
        )

        check(
            not needs_whole_tensors(self.optim) or engine.zero_stage == 0,
            f"optim.name={self.optim.name} needs whole tensors, and engine.zero_stage="
            f"{engine.zero_stage} hands it pieces of them: set engine.zero_stage=0, with "
            "engine.name=deepspeed",
        )
        whole_gradients = engine.name == "deepspeed" and engine.zero_stage < 3
        check(
            not self.batch_report or whole_gradients,
            "batch_report=true is for engine.name=deepspeed with engine.zero_stage 0 to 2: others "
            "have no whole gradients",
        )
        check(
            not self.model.compile or whole_gradients,
            f"model.compile={str(self.model.compile).lower()} is for engine.name=deepspeed with "
            "engine.zero_stage 0 to 2: others fetch parameters inside of what would be compiled",
        )
        check(
            self.model.compile != GRAPHS or keep in (0, 1),
            f"cache.keep_graphs ({keep}) must be 0 or 1 with model.compile={GRAPHS}: a replay "
            "writes over the activations of the one before; or set model.compile=true",
        )

    def saves_after(self, step: int) -> bool:
        """Return whether a step ends in a checkpoint by its number, the clock aside."""
        seen, every = step * self.global_batch_size, self.checkpoint_samples
        return (self.checkpoint_every > 0 and step % self.checkpoint_every == 0) or (
            every > 0 and seen // every > (seen - self.global_batch_size) // every
        )

    @property
    def state_tensors(self) -> int:
        """Numbers kept for each parameter that learns: the optimizer's, and its average."""
        return state_tensors(self.optim) + (self.ema.samples > 0)

    @property
    def horizon(self) -> int:
        """Pairs at whose end the schedules end."""
        return self.total_samples or self.total_steps * self.global_batch_size

    def with_budget(self, epoch_size: int) -> "TrainConfig":
        """Fill in `total_samples` from `epochs`, and `total_steps` from `total_samples`."""
        samples = round(self.epochs * epoch_size) if self.epochs else self.total_samples
        if not samples:
            return self
        steps = -(-samples // self.global_batch_size)
        return replace(self, total_samples=samples, total_steps=steps)

    def _scores_a_checkpoint(self) -> bool:
        """Return whether a step before the last is both evaluated and saved, as far as known."""
        every = self.eval_every
        if self.epochs and not self.total_samples:  # the data set decides how many steps
            return every > 0
        total = -(-self.total_samples // self.global_batch_size) or self.total_steps
        steps = range(every, total, every) if every else range(0)
        return any(map(self.saves_after, steps))

    def check_world_size(self, world_size: int, *, on_gpu: bool) -> None:
        """Check all that depends on the number of processes, and what these run on.

        Raises UserError with the nearest numbers that would do.
        """
        streams, workers = self.data.num_streams, max(1, self.data.num_workers)
        if streams % (world_size * workers):
            raise UserError(
                f"data.num_streams ({streams}) must be a multiple of the world size "
                f"({world_size}) times data.num_workers ({workers}); nearest: "
                f"{_nearest(streams, world_size * workers)}"
            )
        unit = max(streams, world_size)
        if self.global_batch_size % unit:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"data.num_streams ({streams}); nearest: {_nearest(self.global_batch_size, unit)}"
            )
        rank_batch_size = self.global_batch_size // world_size
        chunk = self.asked_chunk_size(on_gpu=on_gpu)
        if chunk is None:  # what is found by trying divides
            return
        if rank_batch_size > chunk and rank_batch_size % chunk:
            unit = world_size * chunk
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of the world "
                f"size ({world_size}) times chunk_size ({chunk}) = {unit}; nearest: "
                f"{_nearest(self.global_batch_size, unit)}"
            )

    @property
    def before_name(self) -> str:
        """What the model is before its first step: `untrained`, or `start` of a trained model."""
        return "start" if self.model.is_whole else "untrained"

    def has_bf16_products(self, *, on_gpu: bool) -> bool:
        """Return whether similarities are computed in bfloat16; `auto`: in a bf16 run on a GPU."""
        asked = self.loss.bf16_products
        return asked if isinstance(asked, bool) else on_gpu and self.engine.precision == "bf16"

    def asked_chunk_size(self, *, on_gpu: bool) -> int | None:
        """Return the pairs of a chunk; None: the largest number that fits, a GPU's default."""
        if isinstance(self.chunk_size, int):
            return self.chunk_size
        return None if on_gpu or self.chunk_size == AUTO else DEFAULT_CHUNK

    @property
    def fixed_chunk_size(self) -> int:
        """Pairs a chunk; a run's config has them. Raises UserError while `auto` was not tried."""
        if self.chunk_size == AUTO:
            raise UserError(
                f"{self.output_dir}: chunk_size is still {AUTO}: train the run first, or give a "
                "number"
            )
        return DEFAULT_CHUNK if self.chunk_size is None else int(self.chunk_size)


def _nearest(number: int, unit: int) -> str:
    below = number // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)
