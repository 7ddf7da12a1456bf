"""The sections of a run's configuration: frozen dataclasses, each with its own checks."""

from dataclasses import dataclass, field

from dist_vse.config.checks import AUTO, at_least, check, number_or_auto, one_of, share
from dist_vse.config.encoders import ImageConfig, LoraConfig, TextConfig
from dist_vse.losses.options import DUPLICATES, KERNELS, TRANSPORTS
from dist_vse.losses.registry import check_name

GRAPHS = "graphs"  # of model.compile
ENGINES = ("deepspeed", "fsdp2")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MIN_LEARNED_TEMPERATURE = 0.01  # as CLIP bounds it


@dataclass(frozen=True)
class MixConfig:
    """One of several data sets to train on (an item of `data.mix`)."""

    index: str = ""
    """Folder of a sharded data set."""
    split: str = "train"
    weight: float = 1.0
    """How often an epoch holds each sample; 0.5: every other epoch, in turns of all of them."""

    def __post_init__(self) -> None:
        check(self.weight > 0, f"data.mix: weight ({self.weight}) must be above 0")


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
    num_streams: int = 8
    """Parallel reading positions. The global batch is the same for every world size that
    divides this number (times any number of workers)."""
    shuffle_window: int = 1024
    """Samples within which a stream is shuffled; shards are shuffled as well. 0 shuffles an epoch
    as a whole, evenly; every shard is then read all the time."""
    captions_per_image: int = 0
    """Captions of an image that are samples of their own (the paper: 5): an image can then stand in
    a batch several times. 0 takes each image once, with one of all its captions in turn."""
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
    caption_weights: dict[str, float] = field(default_factory=dict)
    """How often captions of a label are drawn, such as `{alt: 0.3, synthetic: 0.7}`; others never.
    The label is the caption's language, or its column's: `--caption-column alt=alt,text=synthetic`.
    Empty: an image's captions come in turn, or by the sample's own `caption_weights`."""
    sentences_above: int = 0
    """Begin a caption of more words than this at one of its sentences, drawn each time, so that
    what `model.text.max_tokens` cuts off is seen as well. 0: always at its start, as in
    evaluation."""
    negatives: int = 0
    """Texts a pair brings at most, from the `negatives` of its JSON, which no image belongs to:
    further captions that every image must distinguish from its own (hard negatives as NegCLIP's).
    Each is encoded, so they cost as much time and memory as captions."""
    features: str | None = None
    """Folder of the frozen image trunk's outputs, which `dist-vse features` writes once: training
    reads them instead of images. Needs a frozen trunk, no augmentation, and a single data set."""
    max_bad: float = 0.01
    """Share of an epoch's samples that may be bad: they are left out and listed in
    `skipped.jsonl`; more of them end the run."""
    allow_pipe: bool = False
    """Run the commands (`pipe:COMMAND`) that a data set's index names as shards. Whoever wrote the
    index wrote the commands."""

    def __post_init__(self) -> None:
        at_least(1, data__num_streams=self.num_streams)
        at_least(0, data__num_workers=self.num_workers, data__sentences_above=self.sentences_above)
        at_least(0, data__shuffle_window=self.shuffle_window)
        at_least(0, data__captions_per_image=self.captions_per_image)
        at_least(0, data__negatives=self.negatives)
        for label, weight in self.caption_weights.items():
            check(
                0 <= weight < float("inf"),
                f"data.caption_weights.{label} ({weight}) must be a number from 0 on",
            )
        check(
            not self.caption_weights or any(self.caption_weights.values()),
            "data.caption_weights: one of them must be above 0",
        )
        check(
            not self.caption_weights or self.captions_per_image == 0,
            f"data.captions_per_image ({self.captions_per_image}) takes captions equally often: "
            "leave out data.caption_weights, or set it to 0",
        )
        one_of("data.crop", self.crop, ("random", "center"))
        check(
            0 < self.min_crop_area <= 1,
            f"data.min_crop_area ({self.min_crop_area}) must be above 0 and at most 1",
        )
        at_least(0, data__color_jitter=self.color_jitter, data__max_bad=self.max_bad)

    def train_sets(self) -> list[MixConfig]:
        """Return the data sets to train on."""
        return self.mix or [MixConfig(self.index, self.train_split)]


@dataclass(frozen=True)
class ModelConfig:
    """Two trunks, two heads, one space."""

    pretrained: str | None = None
    """Folder of a CLIP or SigLIP checkpoint to start from (transformers' or OpenCLIP's). It brings
    encoders, heads, tokenizer, image size and normalisation, `embed_dim`, temperature and bias."""
    from_run: str | None = None
    """Run folder, or one of its checkpoints, to start from: its weights, encoders, `embed_dim` and
    vocabulary, with a new optimizer. All else is this config's: loss, rates, batch, `frozen`."""
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    embed_dim: int = 256
    """Size of the shared space."""
    head_hidden: int = 0
    """Hidden units of the MLP heads; 0 makes the heads linear. The paper: 2048."""
    head_bias: bool = True
    """Give the hidden layer of the MLP heads a bias. The paper's has none."""
    head_dropout: float = 0.0
    grad_checkpointing: bool = False
    """Recompute the trunks' activations in backward: less memory, more time."""
    compile: bool | str = False
    """Compile the trunks (torch.compile) before the first step; the log says whether it helps, and
    numbers differ in their last digits. Not under ZeRO 3. A CPU needs a C++ compiler for it.
    `graphs` also records a trunk's kernels on a GPU and starts them all at once (CUDA graphs)."""

    def __post_init__(self) -> None:
        at_least(1, model__embed_dim=self.embed_dim)
        at_least(0, model__head_hidden=self.head_hidden)
        share(model__head_dropout=self.head_dropout)
        check(
            isinstance(self.compile, bool) or self.compile == GRAPHS,
            f"model.compile={self.compile!r} must be true, false or {GRAPHS}",
        )
        check(
            not self.text.frozen or self.text.weights is not None or self.is_whole,
            "model.text.frozen=true would freeze random weights (model.text.kind="
            f"{self.text.kind}); set it to false",
        )
        if self.pretrained is not None:
            self._check_nothing_is_ignored()

    @property
    def is_whole(self) -> bool:
        """Whether both trunks start from a trained model."""
        return self.pretrained is not None or self.from_run is not None

    def _check_nothing_is_ignored(self) -> None:
        """Check that nothing is set that a whole checkpoint decides."""
        for key, value, default in (
            ("image.kind", self.image.kind, ImageConfig.kind),
            ("image.name", self.image.name, ImageConfig.name),
            ("image.weights", self.image.weights, None),
            ("image.normalize", self.image.normalize, False),
            ("image.projection", self.image.projection, 0),
            ("text.kind", self.text.kind, TextConfig.kind),
            ("text.dropout", self.text.dropout, 0.0),
            ("head_hidden", self.head_hidden, 0),
            ("head_dropout", self.head_dropout, 0.0),
        ):
            check(
                value == default,
                f"model.pretrained ({self.pretrained}) brings both encoders and heads: leave out "
                f"model.{key} ({value})",
            )


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
        number_or_auto(0, cache__keep_graphs=self.keep_graphs)
        at_least(0, cache__memory_gib=self.memory_gib)


@dataclass(frozen=True)
class LossConfig:
    """The loss over the global batch."""

    name: str = "convse"
    """A loss of docs/explain/losses.md; or one of your own: `module:NAME` of a LossSpec
    (CONTRIBUTING.md)."""
    temperature: float = 0.1
    """t of a loss that has one; its start where it is learned."""
    learn_temperature: bool = False
    """Learn t (as 1/t, in log space, at most 100)."""
    temperature_end: float | None = None
    """t at the end of the run, which it reaches by a cosine; none keeps it (or learns it)."""
    margin: float = 0.2
    """m of convse++, vse0 and vse++."""
    bias: float = -10.0
    """Start of siglip's learned bias."""
    widths: list[int] = field(default_factory=list)
    """Smaller widths that the features shall serve as well: the loss is the mean over the whole of
    them and over their first w numbers, normalised again (Matryoshka)."""
    warmup_samples: int = 0
    """convse++ and vse++: pairs seen while going from the mean of all violations to the hardest."""
    duplicates: str = "mask"
    """Pairs of equal image or caption: `mask` (no negatives), `positive` (more positives), or
    `keep`: negatives like all others, as in the authors' code."""
    ignore_above: float | None = None
    """Pairs within this of the cosine of their image's or caption's own pair, or above it, are no
    negatives: false ones, such as another caption that fits as well. Try 0.05; below 0 leaves out
    only what is further above. None keeps all."""
    teacher: str | None = None
    """Features of another model, for the pairs that are trained on: a `.safetensors` file that
    `dist-vse embed` wrote of the training split. They judge `ignore_above`, and are distilled."""
    distill_weight: float = 0.0
    """Weight of the divergence between the teacher's and the model's similarities over the global
    batch, which is added to the loss."""
    distill_temperature: float = 0.01
    """t of the teacher's softmax; CLIP's is 0.01. The model's is `temperature`."""
    transport: str = "gather"
    """`gather` the captions' features once, or pass them round a `ring` (memory O(b d))."""
    memory_gib: float = 0.25
    """Similarities kept from forward for backward, GiB a rank; the rest is computed again."""
    bf16_products: bool | str = AUTO
    """Compute the similarities in bfloat16 (statistics stay float32). `auto` does so on a GPU with
    engine.precision=bf16: three times as fast as float32. On a CPU it is no faster."""
    kernels: str = "auto"
    """`fused` (Triton; docs/explain/losses.md), `tiled`, or `auto`: fused on a GPU, tiled on a CPU.
    What fused kernels can't do runs in tiles, and the log says so."""

    def __post_init__(self) -> None:
        check_name(self.name, key="loss.name")
        one_of("loss.duplicates", self.duplicates, DUPLICATES)
        one_of("loss.transport", self.transport, TRANSPORTS)
        one_of("loss.kernels", self.kernels, KERNELS)
        check(
            isinstance(self.bf16_products, bool) or self.bf16_products == AUTO,
            f"loss.bf16_products={self.bf16_products!r} must be true, false or {AUTO}",
        )
        check(
            self.ignore_above is None or -2 <= self.ignore_above <= 2,
            f"loss.ignore_above ({self.ignore_above}) must be between -2 and 2, as cosines differ",
        )
        at_least(0, loss__distill_weight=self.distill_weight)
        check(
            self.distill_temperature > 0,
            f"loss.distill_temperature ({self.distill_temperature}) must be above 0",
        )
        check(
            self.teacher is not None or self.distill_weight == 0,
            f"loss.distill_weight ({self.distill_weight}) needs the teacher's features: give "
            "loss.teacher=FILE, which `dist-vse embed` writes",
        )
        check(
            self.teacher is None or self.distill_weight > 0 or self.ignore_above is not None,
            f"loss.teacher ({self.teacher}) would not be used: set loss.distill_weight or "
            "loss.ignore_above, or leave it out",
        )
        check(self.temperature > 0, f"loss.temperature ({self.temperature}) must be above 0")
        check(
            self.temperature_end is None or self.temperature_end > 0,
            f"loss.temperature_end ({self.temperature_end}) must be above 0",
        )
        check(
            self.temperature_end is None or not self.learn_temperature,
            f"loss.temperature_end ({self.temperature_end}) is for a temperature that is not "
            "learned; set loss.learn_temperature=false, or leave it out",
        )
        at_least(0, loss__margin=self.margin, loss__memory_gib=self.memory_gib)
        at_least(0, loss__warmup_samples=self.warmup_samples)
        check(
            not self.learn_temperature or self.temperature >= MIN_LEARNED_TEMPERATURE,
            f"loss.temperature ({self.temperature}) must be at least {MIN_LEARNED_TEMPERATURE} "
            "where it is learned",
        )


@dataclass(frozen=True)
class EngineConfig:
    """How parameters, gradients and optimizer states are spread over the ranks."""

    zero_stage: int = 1
    """0 replicates all; 1 spreads optimizer states, 2 gradients too, 3 parameters too. Of fsdp2, 2
    keeps parameters gathered during a step, 3 gathers them block by block."""
    precision: str = "fp32"
    """fp32; tf32 (a GPU rounds the factors of products and convolutions to 10 bits; the same as
    fp32 on a CPU); bf16 (autocast: parameters and statistics stay float32); or fp16 (the same, for
    GPUs without bfloat16: losses are scaled, and a step whose gradients overflow is skipped)."""
    coalesce: bool = True
    """Stages 2 and 3: one gradient reduction a step, for whole gradients in memory until then;
    false reduces at every chunk. Stages 0 and 1 always reduce once."""
    name: str = "deepspeed"
    """deepspeed (ZeRO 0 to 3) or fsdp2 (PyTorch's `fully_shard`, zero_stage 2 or 3)."""

    def __post_init__(self) -> None:
        stage = self.zero_stage
        one_of("engine.name", self.name, ENGINES)
        check(stage in (0, 1, 2, 3), f"engine.zero_stage ({stage}) must be 0, 1, 2 or 3")
        check(
            self.name != "fsdp2" or stage >= 2,
            f"engine.name=fsdp2 spreads gradients and optimizer states, and engine.zero_stage="
            f"{stage} does not: set engine.zero_stage to 2, or to 3 to spread parameters too",
        )
        one_of("engine.precision", self.precision, PRECISIONS)

    @property
    def title(self) -> str:
        """The engine and its stage, in words for a table."""
        return f"{'FSDP2' if self.name == 'fsdp2' else 'ZeRO'} {self.zero_stage}"


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights, which evaluation and export take."""

    samples: int = 0
    """Pairs after which a step's weights count e times less; 0 keeps no average. Checkpoints hold
    both, and a run goes on from its own weights. Costs a tensor more for each that learns, split
    over the ranks as the optimizer's state is."""

    def __post_init__(self) -> None:
        at_least(0, ema__samples=self.samples)


@dataclass(frozen=True)
class ResumeConfig:
    """How a run goes on that was trained before."""

    allow: list[str] = field(default_factory=list)
    """Settings that may differ from those that the run began with, though they change what is
    learned: `[loss.temperature, optim]`; `data` and `vocabulary` stand for what was read."""
    verify_shards: bool = False
    """Compare the bytes of all local shards with the index (SHA-256) before training; else only
    their sizes and times are compared with the last start's, and a change is a warning."""
