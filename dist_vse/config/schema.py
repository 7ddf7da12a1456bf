"""The configuration of a run: frozen dataclasses with every check.

Two batch numbers matter: `global_batch_size` is the science, `chunk_size` the hardware; the
rest is derived. Only `train.main` and the builders see a config: a component takes plain values.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_vse.errors import UserError

LOSSES = ("convse", "convse++", "info_nce", "vse0", "vse++", "siglip")
OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("fp32", "bf16")
TEXT_KINDS = ("gru", "transformer", "pretrained")
AUTO = "auto"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _at_least(least: float, **values: float) -> None:
    """Check numbers; a name's double underscore stands for the dot of its key."""
    for name, value in values.items():
        key = name.replace("__", ".")
        _check(value >= least, f"{key} ({value}) must be at least {least}")


def _number_or_auto(least: int, **values: int | str) -> None:
    for name, value in values.items():
        if isinstance(value, int):
            _at_least(least, **{name: value})
        elif value != AUTO:
            key = name.replace("__", ".")
            raise UserError(f"{key}={value!r} must be a number or {AUTO}")


def _share(**values: float) -> None:
    for name, value in values.items():
        key = name.replace("__", ".")
        _check(0 <= value < 1, f"{key} ({value}) must be at least 0 and below 1")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
        raise UserError(f"{name}={value!r} is unknown; {hint}")


@dataclass(frozen=True)
class MixConfig:
    """One of several data sets to train on (an item of `data.mix`)."""

    index: str = ""
    """Folder of a sharded data set."""
    split: str = "train"
    weight: float = 1.0
    """How often an epoch holds each sample; 0.5: every other epoch, in turns of all of them."""

    def __post_init__(self) -> None:
        _check(self.weight > 0, f"data.mix: weight ({self.weight}) must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which order, and how an image becomes a tensor."""

    index: str = ""
    """Folder of a sharded data set (with index.json); made by `dist-vse shard`."""
    train_split: str = "train"
    mix: list[MixConfig] = field(default_factory=list)
    """Data sets to train on together, in the place of `train_split`:
    `[{index: DIR, split: train, weight: 0.5}, …]`. Evaluation stays with `data.index`."""
    eval_split: str = "val"
    lanes: int = 8
    """Parallel reading positions. The global batch is the same for every world size that
    divides this number (times any number of workers)."""
    shuffle_window: int = 1024
    """Samples within which a lane is shuffled; shards are shuffled as well."""
    num_workers: int = 1
    """Decoding processes a rank; 0 decodes in the training process."""
    crop: str = "random"
    """Training images: `random` (resized crop) or `center`. Evaluation always uses center."""
    min_crop_area: float = 0.5
    """Smallest share of the image that a random crop keeps."""
    flip: bool = False
    """Mirror half of the training images. Wrong for captions that say left and right."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation of training images by factors of 1 ± this."""
    features: str | None = None
    """Folder of the frozen image trunk's outputs, which `dist-vse features` writes once: training
    reads them instead of images. Needs a frozen trunk, no augmentation, and a single data set."""
    max_bad: float = 0.01
    """Share of an epoch's samples that may be bad: they are left out and listed in
    `skipped.jsonl`; more of them end the run."""

    def __post_init__(self) -> None:
        _at_least(1, data__lanes=self.lanes, data__shuffle_window=self.shuffle_window)
        _at_least(0, data__num_workers=self.num_workers)
        _one_of("data.crop", self.crop, ("random", "center"))
        _check(
            0 < self.min_crop_area <= 1,
            f"data.min_crop_area ({self.min_crop_area}) must be above 0 and at most 1",
        )
        _at_least(0, data__color_jitter=self.color_jitter, data__max_bad=self.max_bad)

    def train_sets(self) -> list[MixConfig]:
        """Return the data sets to train on."""
        return self.mix or [MixConfig(self.index, self.train_split)]


@dataclass(frozen=True)
class ImageConfig:
    """The image encoder's trunk: any timm model."""

    name: str = "resnet18"
    """A timm architecture, such as resnet152 or vit_base_patch16_224."""
    weights: str | None = None
    """A .safetensors or .pth file of pretrained weights; none starts from random ones."""
    frozen: bool = False
    """Keep the trunk as it is (in eval mode) and train the head alone."""
    size: int = 224
    """Side of the square input, pixels."""

    def __post_init__(self) -> None:
        _at_least(8, model__image__size=self.size)


@dataclass(frozen=True)
class TextConfig:
    """The text encoder's trunk: a transformers model from a folder, or one from scratch."""

    kind: str = "transformer"
    """`gru` or `transformer` (from scratch, on words), or `pretrained` (transformers)."""
    weights: str | None = None
    """Folder of a transformers model with its tokenizer; for `pretrained` only."""
    frozen: bool = False
    """Keep the trunk as it is (in eval mode) and train the head alone."""
    max_tokens: int = 32
    """Longer captions are cut."""
    width: int = 256
    """Size of the hidden states, from scratch."""
    depth: int = 2
    """Layers, from scratch."""
    word_dim: int = 300
    """Size of the word vectors of `gru`."""
    min_count: int = 1
    """Rarer words of the training captions become <unk>."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _one_of("model.text.kind", self.kind, TEXT_KINDS)
        _at_least(1, model__text__max_tokens=self.max_tokens, model__text__depth=self.depth)
        _share(model__text__dropout=self.dropout)
        _check(
            (self.kind == "pretrained") == (self.weights is not None),
            f"model.text.weights ({self.weights}) is the folder of a transformers model: give it "
            f"with model.text.kind=pretrained (it is {self.kind}), and only there",
        )
        _check(
            self.kind == "pretrained" or not self.frozen,
            f"model.text.frozen=true would freeze random weights (model.text.kind={self.kind}); "
            "set it to false",
        )
        _check(
            self.kind != "transformer" or self.width % 64 == 0,
            f"model.text.width ({self.width}) must be a multiple of 64, the width of a head",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Two trunks, two heads, one space."""

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    """Size of the shared space."""
    head_hidden: int = 0
    """Hidden units of the MLP heads; 0 makes the heads linear. The paper: 2048."""
    head_dropout: float = 0.0
    grad_checkpointing: bool = False
    """Recompute the trunks' activations in backward: less memory, more time."""
    compile: bool = False
    """Compile the trunks (torch.compile): faster steps after a slow first one; numbers differ in
    their last digits. Not under ZeRO 3. A CPU needs a C++ compiler for it."""

    def __post_init__(self) -> None:
        _at_least(1, model__embed_dim=self.embed_dim)
        _at_least(0, model__head_hidden=self.head_hidden)
        _share(model__head_dropout=self.head_dropout)


@dataclass(frozen=True)
class CacheConfig:
    """What gradient caching may keep in memory. It changes no number, only the time of a step."""

    keep_graphs: int | str = 1
    """Chunks a rank whose activations stay from the first pass to the second, so that they are
    encoded once only. 1 costs nothing at the peak; `auto` keeps as many as memory_gib holds."""
    memory_gib: float = 0.0
    """GiB a rank for activations, where chunk_size or keep_graphs is auto; 0 takes half of what
    is free at the start."""

    def __post_init__(self) -> None:
        _number_or_auto(0, cache__keep_graphs=self.keep_graphs)
        _at_least(0, cache__memory_gib=self.memory_gib)


@dataclass(frozen=True)
class LossConfig:
    """The loss over the global batch."""

    name: str = "convse"
    """convse, convse++ (Jain and Verma 2021), info_nce (CLIP), vse0, vse++, siglip."""
    temperature: float = 0.1
    """t of convse, convse++, info_nce and siglip; its start where it is learned."""
    learn_temperature: bool = False
    """Learn t (as 1/t, in log space, at most 100)."""
    temperature_end: float | None = None
    """t at the end of the run, which it reaches by a cosine; none keeps it (or learns it)."""
    margin: float = 0.2
    """m of convse++, vse0 and vse++."""
    bias: float = -10.0
    """Start of siglip's learned bias."""
    warmup_samples: int = 0
    """convse++ and vse++: pairs seen while going from the mean of all violations to the hardest."""
    twins: str = "exclude"
    """Pairs of equal image or caption: `exclude` (no negatives) or `positive` (more positives)."""
    transport: str = "gather"
    """`gather` the captions' features once, or pass them round a `ring` (memory O(b d))."""
    memory_gib: float = 0.25
    """Similarities kept from forward for backward, GiB a rank; the rest is computed again."""
    bf16_products: bool = False
    """Compute the similarities in bfloat16 (statistics stay float32)."""

    def __post_init__(self) -> None:
        _one_of("loss.name", self.name, LOSSES)
        _one_of("loss.twins", self.twins, ("exclude", "positive"))
        _one_of("loss.transport", self.transport, ("gather", "ring"))
        _check(self.temperature > 0, f"loss.temperature ({self.temperature}) must be above 0")
        _check(
            self.temperature_end is None or self.temperature_end > 0,
            f"loss.temperature_end ({self.temperature_end}) must be above 0",
        )
        _check(
            self.temperature_end is None or not self.learn_temperature,
            f"loss.temperature_end ({self.temperature_end}) is for a temperature that is not "
            "learned; set loss.learn_temperature=false, or leave it out",
        )
        _at_least(0, loss__margin=self.margin, loss__memory_gib=self.memory_gib)
        _at_least(0, loss__warmup_samples=self.warmup_samples)
        _check(
            not self.learn_temperature or self.temperature >= 0.01,
            f"loss.temperature ({self.temperature}) must be at least 0.01 where it is learned",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rate's course, in samples so that it fits any batch."""

    name: str = "adamw"
    lr: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Not applied to biases, norms and the temperature."""
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0
    """For sgd."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 is off (DeepSpeed's own default would be 1.0)."""
    schedule: str = "cosine"
    """constant; cosine to zero; step: a tenth after half of the run."""
    warmup_samples: int = 0
    """Pairs seen while the learning rate rises from 0."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, OPTIMIZERS)
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        _check(self.lr > 0, f"optim.lr ({self.lr}) must be above 0")
        _at_least(0, optim__clip_norm=self.clip_norm, optim__momentum=self.momentum)
        _at_least(0, optim__weight_decay=self.weight_decay)
        _at_least(0, optim__warmup_samples=self.warmup_samples)
        _share(optim__beta1=self.beta1, optim__beta2=self.beta2)


@dataclass(frozen=True)
class EngineConfig:
    """How parameters, gradients and optimizer states are spread: DeepSpeed's ZeRO."""

    zero_stage: int = 1
    """0 replicates all; 1 spreads optimizer states, 2 gradients too, 3 parameters too."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast: parameters and statistics stay float32)."""
    coalesce: bool = True
    """ZeRO 1-3: one gradient reduction a step, for a copy of the gradients in memory; false
    reduces at every chunk under ZeRO 2 and 3."""

    def __post_init__(self) -> None:
        stage = self.zero_stage
        _check(stage in (0, 1, 2, 3), f"engine.zero_stage ({stage}) must be 0, 1, 2 or 3")
        _one_of("engine.precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output_dir: str = "runs/run"
    """The run's folder: config, metrics, checkpoints, report. An existing run is resumed."""
    seed: int = 0
    global_batch_size: int = 256
    """Pairs a step over all ranks: every pair sees all others as negatives."""
    chunk_size: int | str = 64
    """Pairs a rank encodes at a time (gradient caching); at least the rank's share = no caching.
    `auto` tries at the start which is the largest that fits, and writes it into the run's config:
    where there is dropout, other chunks draw other numbers."""
    total_steps: int = 1000
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end (and when interrupted)."""
    checkpoint_samples: int = 0
    """Pairs between checkpoints, or 0."""
    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints, or 0: what a lost node may cost."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Further checkpoints that are kept: those of the highest sum of recalls, of the steps that
    were evaluated as well."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        _at_least(1, global_batch_size=self.global_batch_size)
        _number_or_auto(1, chunk_size=self.chunk_size)
        _at_least(1, total_steps=self.total_steps, log_every=self.log_every)
        _at_least(1, keep_checkpoints=self.keep_checkpoints)
        image = self.model.image
        _check(
            image.weights is not None or not image.frozen,
            "model.image.frozen=true would freeze random weights: give model.image.weights, or "
            "set it to false",
        )
        _at_least(0, eval_every=self.eval_every, checkpoint_every=self.checkpoint_every)
        _at_least(0, checkpoint_samples=self.checkpoint_samples, keep_best=self.keep_best)
        _at_least(0, checkpoint_minutes=self.checkpoint_minutes)
        data = self.data
        augmented = data.crop == "random" or data.flip or data.color_jitter > 0
        _check(
            data.features is None or (image.frozen and not augmented and not data.mix),
            "data.features needs model.image.frozen=true, data.crop=center, data.flip=false, "
            "data.color_jitter=0 and no data.mix: an image must have the same features every time",
        )
        keep, engine = self.cache.keep_graphs, self.engine
        _check(
            engine.coalesce or engine.zero_stage < 3 or keep == AUTO or int(keep) <= 1,
            f"cache.keep_graphs ({keep}) must be 0, 1 or auto under engine.zero_stage=3 with "
            "engine.coalesce=false (more would give wrong gradients); or set engine.coalesce=true",
        )

        _check(
            not self.model.compile or engine.zero_stage < 3,
            "model.compile=true is for engine.zero_stage 0 to 2: ZeRO 3 fetches parameters inside "
            "of what would be compiled",
        )

    def check_world_size(self, world_size: int) -> None:
        """Check all that depends on the number of processes.

        Raises UserError with the nearest numbers that would do.
        """
        lanes, workers = self.data.lanes, max(1, self.data.num_workers)
        if lanes % (world_size * workers):
            raise UserError(
                f"data.lanes ({lanes}) must be a multiple of the world size ({world_size}) times "
                f"data.num_workers ({workers}); nearest: {_nearest(lanes, world_size * workers)}"
            )
        unit = max(lanes, world_size)
        if self.global_batch_size % unit:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of data.lanes "
                f"({lanes}); nearest: {_nearest(self.global_batch_size, unit)}"
            )
        rank_batch_size = self.global_batch_size // world_size
        if isinstance(self.chunk_size, str):  # auto takes one that divides
            return
        if rank_batch_size > self.chunk_size and rank_batch_size % self.chunk_size:
            unit = world_size * self.chunk_size
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of the world "
                f"size ({world_size}) times chunk_size ({self.chunk_size}) = {unit}; nearest: "
                f"{_nearest(self.global_batch_size, unit)}"
            )

    @property
    def fixed_chunk_size(self) -> int:
        """Pairs a chunk. Raises UserError while `auto` was not tried yet."""
        if isinstance(self.chunk_size, str):
            raise UserError(
                f"{self.output_dir}: chunk_size is still {AUTO}: train the run first, or give a "
                "number"
            )
        return self.chunk_size


def _nearest(number: int, unit: int) -> str:
    below = number // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)
