"""What a step is planned for: the batch, the ranks, and all that may be chosen."""

from dataclasses import dataclass, replace

from dist_vse.common.units import GIB
from dist_vse.config import TrainConfig
from dist_vse.losses.registry import LossSpec, find_loss


@dataclass(frozen=True)
class Settings:
    """A step of `world_size` ranks; the names are those of the config."""

    global_batch: int
    world_size: int
    chunk_size: int
    keep_graphs: int = 1
    zero_stage: int = 1
    coalesce: bool = True
    transport: str = "gather"
    loss: str = "convse"
    loss_gib: float = 0.25
    bf16_products: bool = False
    state_tensors: int = 2
    """Numbers that the optimizer keeps for each parameter that it trains."""
    negatives: int = 0
    """Texts without an image that a pair brings."""

    @property
    def rank_batch(self) -> int:
        """Pairs of a rank (b)."""
        return self.global_batch // self.world_size

    @property
    def chunk(self) -> int:
        """Pairs of a chunk; no more than the rank has."""
        return min(self.chunk_size, self.rank_batch)

    @property
    def num_chunks(self) -> int:
        """Chunks of a rank (K)."""
        return -(-self.rank_batch // self.chunk)

    @property
    def kept(self) -> int:
        """Chunks that keep their graphs (m)."""
        return min(self.keep_graphs, self.num_chunks)

    @property
    def ring(self) -> bool:
        """Whether captions are passed round; one rank has nobody to pass them to."""
        return self.transport == "ring" and self.world_size > 1

    @property
    def loss_spec(self) -> LossSpec:
        """The loss's entry in the registry."""
        return find_loss(self.loss)

    @property
    def caption_bytes(self) -> int:
        """Bytes of a number of a caption's features on its way to other ranks."""
        return self.loss_spec.caption_bytes(bf16_products=self.bf16_products)

    @property
    def columns(self) -> int:
        """Texts that an image is compared with: captions, and negatives (N + M)."""
        return self.global_batch * (1 + self.negatives)

    @property
    def similarity_bytes(self) -> float:
        """Bytes of all of a rank's similarities (b, N + M)."""
        return 4.0 * self.rank_batch * self.columns

    @property
    def kept_similarities(self) -> float:
        """Bytes of similarities that stay from the loss's forward to its backward."""
        if not self.loss_spec.cost.dense_gradient:
            return 0.0
        return min(self.loss_gib * GIB, self.similarity_bytes)

    def changed(self, **values: object) -> "Settings":
        """Return other settings."""
        return replace(self, **values)  # type: ignore[arg-type]


def settings_of(
    config: TrainConfig, *, global_batch: int, world_size: int, on_cpu: bool
) -> Settings:
    """Return the config's own settings, for a batch and a number of ranks."""
    rows = global_batch // world_size
    chunk, kept = config.asked_chunk_size(on_gpu=not on_cpu), config.cache.keep_graphs
    return Settings(
        global_batch=global_batch,
        world_size=world_size,
        chunk_size=rows if chunk is None else chunk,
        keep_graphs=1 if isinstance(kept, str) else kept,
        zero_stage=config.engine.zero_stage,
        coalesce=config.engine.coalesce,
        transport=config.loss.transport,
        loss=config.loss.name,
        loss_gib=config.loss.memory_gib,
        bf16_products=config.has_bf16_products(on_gpu=not on_cpu),
        state_tensors=config.state_tensors,
        negatives=config.data.negatives,
    )
