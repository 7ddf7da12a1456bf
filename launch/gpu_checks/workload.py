"""What the checks of a step take: the run's config, or a reference model; made-up pairs."""

from dataclasses import dataclass, replace

import torch

from dist_vse import distributed
from dist_vse.config import ImageConfig, ModelConfig, TextConfig, TrainConfig, load_config
from dist_vse.config.sections import EngineConfig
from dist_vse.data.samples import Batch
from dist_vse.engine import RunEngine
from dist_vse.launch.gpu_checks.finding import Task
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import use_precision
from dist_vse.models.tokenizer import AnyWords
from dist_vse.training.build_engine import build_engine
from dist_vse.training.chunking import agree, choose_chunks
from dist_vse.training.chunks import make_chunks
from dist_vse.training.grad_cache import train_step
from dist_vse.training.kernel_check import settle_kernels
from dist_vse.training.step_loss import build_loss

VOCABULARY = 30_000
ROWS, SMALL_ROWS = 4096, 32  # pairs a rank, on a GPU and on a CPU


@dataclass
class Rig:
    """An engine that can take steps on one made-up batch."""

    config: TrainConfig
    engine: RunEngine
    batch: Batch
    keep_graphs: int

    def step(self) -> torch.Tensor:
        """Take a step as training does; return the loss."""
        loss = build_loss(self.config, self.batch, 0)
        chunks = make_chunks(self.engine.module, self.batch, self.config)
        return train_step(self.engine, loss, chunks, keep_graphs=self.keep_graphs).loss

    def changed(self, chunk_size: int) -> "Rig":
        """Return the same engine with another size of chunks."""
        return replace(self, config=replace(self.config, chunk_size=chunk_size))


def reference_config(task: Task) -> TrainConfig:
    """Return the run's config if doctor was given one, else a model that many train.

    On a GPU a ViT-B/32 and a text transformer of 12 layers, in bfloat16, with default settings;
    on a CPU a very small one.
    """
    if task.config is not None:
        return load_config(task.config, task.overrides)
    size = distributed.world_size()
    if not task.on_gpu:
        return small_config(global_batch_size=SMALL_ROWS * size, chunk_size=SMALL_ROWS // 4)
    model = ModelConfig(
        image=ImageConfig(name="vit_base_patch32_224", size=224),
        text=TextConfig(width=512, depth=12, max_tokens=32),
        embed_dim=512,
    )
    return TrainConfig(
        model=model,
        engine=EngineConfig(precision="bf16"),
        global_batch_size=ROWS * size,
        chunk_size="auto",
    )


def small_config(
    *, global_batch_size: int, chunk_size: int, text: TextConfig | None = None
) -> TrainConfig:
    """Return a model that takes a step in a fraction of a second."""
    text = text or TextConfig(width=64, depth=1, max_tokens=8)
    model = ModelConfig(image=ImageConfig(name="test_vit", size=32), text=text, embed_dim=16)
    return TrainConfig(model=model, global_batch_size=global_batch_size, chunk_size=chunk_size)


def build(config: TrainConfig) -> DualEncoder:
    """Build the config's model on this rank's device, in its precision."""
    use_precision(distributed.device(), config.engine.precision)
    model = build_model(config.model, config.loss, AnyWords(VOCABULARY))
    return model.to(distributed.device())


def build_rig(config: TrainConfig) -> Rig:
    """Build the config's engine with its own chunks (found by trying where auto)."""
    model = build(config)
    chunking = agree(choose_chunks(config, model))
    config = settle_kernels(replace(config, chunk_size=chunking.chunk_size)).config
    batch = made_up_batch(config, config.global_batch_size // distributed.world_size())
    if distributed.device().type == "cuda":  # as the buffers of a run are, once for all steps
        batch = replace(batch, images=batch.images.pin_memory(), tokens=batch.tokens.pin_memory())
    return Rig(config, build_engine(config, model), batch, chunking.keep_graphs)


def made_up_batch(config: TrainConfig, rows: int, seed: int = 0) -> Batch:
    """Draw this rank's rows of a batch; no two pairs share an image or a caption."""
    rank = distributed.rank()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    size, tokens = config.model.image.size, config.model.text.max_tokens
    ids = torch.arange(rows) + rank * rows
    return Batch(
        images=torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator),
        tokens=torch.randint(1, VOCABULARY, (rows, tokens), generator=generator),
        image_ids=ids,
        text_ids=ids,
        origin=torch.zeros(rows, 2, dtype=torch.int64),
        state=torch.zeros(0, 2, dtype=torch.int64).numpy(),
        skipped=(),
    )
