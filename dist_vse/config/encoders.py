"""The encoders: one table entry each, and the config's sections that choose one.

To add an encoder, write its builder and add an entry. `models.image.build_image_trunk` and
`models.text.build_text_trunk` say what a builder is given and what it returns. `dist-vse export`
saves any encoder, and loads it again.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from dist_vse.config.checks import at_least, check, one_of, share


@dataclass(frozen=True)
class EncoderSpec:
    """What the system knows of a kind of encoder."""

    builder: str
    """"module:function", which is imported when a model is built."""
    from_library: bool = False
    """Whether timm or transformers made it: it is exported in that library's own layout."""
    tokenizer: str = ""
    """"module:function" of a text encoder's tokenizer, which takes the encoder's weights and
    `max_tokens`; empty: words of the training captions."""
    is_stored: bool = False
    """Whether there is no encoder: its outputs were stored before."""


IMAGE_ENCODERS = {
    "timm": EncoderSpec("dist_vse.models.image:build_timm", from_library=True),
    "vectors": EncoderSpec("dist_vse.models.vectors:build_stored_vectors", is_stored=True),
}
TEXT_ENCODERS = {
    "gru": EncoderSpec("dist_vse.models.text:build_gru"),
    "transformer": EncoderSpec("dist_vse.models.text:build_transformer"),
    "pretrained": EncoderSpec(
        "dist_vse.models.text:build_pretrained",
        from_library=True,
        tokenizer="dist_vse.models.tokenizer:PretrainedTokenizer",
    ),
    "vectors": EncoderSpec(
        "dist_vse.models.vectors:build_caption_vectors",
        tokenizer="dist_vse.models.vectors:CaptionTokenizer",
        is_stored=True,
    ),
}

WORD_RULES = ("plain", "treebank")  # functions of dist_vse.models.words

MAX_DEPTH = 1000
"""Layers of a text encoder from scratch; a config of somebody else's may ask for a billion."""


@dataclass(frozen=True)
class ImageConfig:
    """The image encoder's trunk: any timm model, or another kind."""

    kind: str = "timm"
    """`timm`; or `vectors`: the shards hold vectors in the place of images, such as those that
    `dist-vse shard precomp` writes, and only the head learns."""
    name: str = "resnet18"
    """A timm architecture, such as resnet152 or vit_base_patch16_224."""
    weights: str | None = None
    """A .safetensors or .pth file of pretrained weights; none starts from random ones."""
    frozen: bool = False
    """Keep the trunk as it is (in eval mode) and train the head alone."""
    unlocked: int = 0
    """Of a frozen trunk, the last layers that learn nevertheless: 1 is the last block and what
    follows it."""
    size: int = 224
    """Side of the square input, pixels. A checkpoint of `model.pretrained` has its own; another one
    here resamples its positions. 224 counts as left out there. Of `vectors`: how many numbers each
    has."""
    size_schedule: list[list[float]] = field(default_factory=list)
    """Smaller sides in training: `[[0, 112], [0.7, 160], [0.95, 224]]` trains at 112 pixels until
    0.7 of the run; timm resamples the positions. Evaluation has `size`. For timm models."""
    patch_drop: float = 0.0
    """Share of a ViT's patches that training leaves out, drawn for each image."""
    patch_drop_until: float = 1.0
    """Share of the run after which no patch is left out."""
    squash: bool = False
    """Without a random crop, make the whole image the square; else its middle."""
    resampling: str = "bicubic"
    """`bicubic` or `bilinear`, of images in evaluation."""
    crop_share: float = 1.0
    """Share of the middle square's side that is seen without a random crop. The paper: 0.875, since
    it resizes to 256 and crops 224."""
    normalize: bool = False
    """Divide the trunk's output by its L2 norm, as VSE++ does."""
    projection: int = 0
    """Size of a linear map between the trunk and the head; 0 is none. The paper: 1024."""
    drifting_statistics: bool = False
    """A fault of the authors' code, to reproduce it: run a frozen trunk in train mode. BatchNorm
    then uses the statistics of each chunk, and its running statistics move: an image's features
    depend on the other images of the chunk."""

    def __post_init__(self) -> None:
        one_of("model.image.kind", self.kind, tuple(IMAGE_ENCODERS))
        _check_unlocked("model.image", self.frozen, self.unlocked)
        at_least(1 if self.reads_vectors else 8, model__image__size=self.size)
        at_least(0, model__image__projection=self.projection)
        check(
            0 < self.crop_share <= 1,
            f"model.image.crop_share ({self.crop_share}) must be above 0 and at most 1",
        )
        share(model__image__patch_drop=self.patch_drop)
        check(
            not self.reads_vectors or not (self.weights or self.frozen or self.drifting_statistics),
            "model.image.kind=vectors has no encoder: leave out model.image.weights, "
            "model.image.frozen and model.image.drifting_statistics",
        )
        self._check_schedule()
        one_of("model.image.resampling", self.resampling, ("bicubic", "bilinear"))

    @property
    def reads_vectors(self) -> bool:
        """Whether vectors stand in the place of images."""
        return self.spec.is_stored

    def _check_schedule(self) -> None:
        for item in self.size_schedule:
            check(
                len(item) == 2 and 0 <= item[0] < 1 and item[1] == int(item[1]) >= 8,
                f"model.image.size_schedule: {item} must be a share of the run (0 to 1) and a side "
                "in pixels, such as [0.7, 160]",
            )
        shares = [item[0] for item in self.size_schedule]
        check(
            shares[:1] in ([], [0]) and all(a < b for a, b in pairwise(shares)),
            f"model.image.size_schedule: the shares {shares} must begin with 0 and grow",
        )
        check(
            not (self.all_frozen and (self.size_schedule or self.patch_drop)),
            "model.image.size_schedule and model.image.patch_drop are for a trunk that learns; "
            "leave them out with model.image.frozen=true",
        )

    def input_at(self, progress: float) -> tuple[int, float]:
        """Return the side and the share of dropped patches at a share of the run."""
        sizes = [int(side) for start, side in self.size_schedule if start <= progress]
        drop = self.patch_drop if progress < self.patch_drop_until else 0.0
        return (sizes[-1] if sizes else self.size), drop

    @property
    def asked_size(self) -> int | None:
        """The side, None where it is left to a checkpoint."""
        return None if self.size == type(self).size else self.size

    @property
    def all_frozen(self) -> bool:
        """Whether no layer of the trunk learns."""
        return self.spec.is_stored or (self.frozen and self.unlocked == 0)

    @property
    def spec(self) -> EncoderSpec:
        """The table's entry."""
        return IMAGE_ENCODERS[self.kind]


@dataclass(frozen=True)
class TextConfig:
    """The text encoder's trunk: a transformers model from a folder, or one from scratch."""

    kind: str = "transformer"
    """`gru` or `transformer` (from scratch, on words), `pretrained` (transformers), or `vectors`: a
    folder has a vector for each caption, and only the head learns."""
    weights: str | None = None
    """Folder of a transformers model with its tokenizer; for `vectors`, of `captions.txt` (one a
    line) and `vectors.npy` (a row each)."""
    frozen: bool = False
    """Keep the trunk as it is (in eval mode) and train the head alone."""
    unlocked: int = 0
    """Of a frozen trunk, the last layers that learn nevertheless."""
    max_tokens: int = 32
    """Longer captions are cut. A checkpoint of `model.pretrained` has its own number; a larger one
    here stretches its positions, and 32 counts as left out there."""
    width: int = 256
    """Size of the hidden states, from scratch."""
    depth: int = 2
    """Layers, from scratch."""
    word_dim: int = 300
    """Size of the word vectors of `gru`."""
    min_count: int = 1
    """Rarer words of the training captions become <unk>."""
    words: str = "plain"
    """How captions are split: `plain`, or `treebank` (nearly as NLTK does it for the paper)."""
    vocabulary: str | None = None
    """A file of words to take instead of counting them: a run's vocabulary.json, or what
    `dist-vse import` made of the authors' vocabulary."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        one_of("model.text.kind", self.kind, tuple(TEXT_ENCODERS))
        _check_unlocked("model.text", self.frozen, self.unlocked)
        one_of("model.text.words", self.words, WORD_RULES)
        check(
            self.vocabulary is None or not self.spec.tokenizer,
            f"model.text.vocabulary ({self.vocabulary}) is for encoders from scratch: the model of "
            "model.text.weights brings its own",
        )
        at_least(1, model__text__max_tokens=self.max_tokens, model__text__depth=self.depth)
        at_least(1, model__text__width=self.width, model__text__word_dim=self.word_dim)
        check(self.depth <= MAX_DEPTH, f"model.text.depth ({self.depth}) is above {MAX_DEPTH:,}")
        share(model__text__dropout=self.dropout)
        check(
            bool(self.spec.tokenizer) == (self.weights is not None),
            f"model.text.weights ({self.weights}) is the folder of a transformers model or of "
            "vectors: give it with model.text.kind=pretrained or vectors (it is "
            f"{self.kind}), and only there",
        )
        check(
            self.kind != "transformer" or self.width % 64 == 0,
            f"model.text.width ({self.width}) must be a multiple of 64, the width of a head",
        )

    @property
    def asked_tokens(self) -> int | None:
        """The longest caption, None where it is left to a checkpoint."""
        return None if self.max_tokens == type(self).max_tokens else self.max_tokens

    @property
    def all_frozen(self) -> bool:
        """Whether no layer of the trunk learns."""
        return self.spec.is_stored or (self.frozen and self.unlocked == 0)

    @property
    def spec(self) -> EncoderSpec:
        """The table's entry."""
        return TEXT_ENCODERS[self.kind]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) in pretrained trunks that learn; the trunks' own weights stay.

    Heads, temperature, and trunks from scratch learn as without it.
    """

    rank: int = 0
    """Rank of each layer's adapter; 0 has none, and trains whole weights. Needs the extra `lora`
    (peft). Checkpoints and gradient reductions hold the adapters and not the layers."""
    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' input."""
    match: list[str] = field(default_factory=lambda: ["*"])
    """Which linear layers: globs over their names in the trunk, such as `["*attn*"]` or
    `["*q_proj", "*v_proj"]`. Layers inside PyTorch's MultiheadAttention take none."""

    def __post_init__(self) -> None:
        at_least(0, model__lora__rank=self.rank)
        share(model__lora__dropout=self.dropout)
        check(self.alpha > 0, f"model.lora.alpha ({self.alpha}) must be above 0")
        check(bool(self.match), "model.lora.match must name layers, such as [*]")


def _check_unlocked(section: str, frozen: bool, unlocked: int) -> None:
    at_least(0, **{f"{section}.unlocked": unlocked})
    check(
        frozen or unlocked == 0,
        f"{section}.unlocked ({unlocked}) is for a frozen trunk: set {section}.frozen=true",
    )
