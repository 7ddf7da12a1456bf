"""What `dist-vse bench scale` measures: a run's step, made as `dist-vse train` makes it."""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dist_vse import distributed
from dist_vse.common import step_timer
from dist_vse.config import TrainConfig
from dist_vse.data.samples import Batch
from dist_vse.data.streams import open_train_sets
from dist_vse.engine import RunEngine
from dist_vse.engine.deepspeed_internals import whole_shape
from dist_vse.losses.registry import find_loss
from dist_vse.models.build import build_model
from dist_vse.models.tokenizer import AnyWords, Tokenizer
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.trained import run_tokenizer
from dist_vse.training.batches import build_train_batches
from dist_vse.training.build_engine import build_engine
from dist_vse.training.chunking import agree, choose_chunks
from dist_vse.training.chunks import make_chunks
from dist_vse.training.flops import Flops, count_flops
from dist_vse.training.grad_cache import train_step
from dist_vse.training.step_loss import build_loss, has_bf16_products

VOCABULARY = 8192  # of a text encoder from scratch, on made-up pairs


@dataclass(frozen=True)
class StepHarness:
    """A run without its folder: what takes steps."""

    config: TrainConfig
    engine: RunEngine
    batches: Iterator[Batch]
    keep_graphs: int
    flops: Flops

    def step(self) -> None:
        """Take one step, as `dist_vse.train` does."""
        step_timer.begin("data")
        batch = next(self.batches)
        step_timer.begin("encode")
        loss = build_loss(self.config, batch, 0)
        chunks = make_chunks(self.engine.module, batch, self.config)
        kept = self.keep_graphs
        train_step(self.engine, loss, chunks, keep_graphs=kept)
        batch_size = self.config.global_batch_size
        self.engine.update_average(batch_size, batch_size)

    def known_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's inputs, features (captions of all ranks too, which are
        gathered while chunks are encoded) and gradients."""
        ranks = distributed.world_size()
        rows = self.config.global_batch_size // ranks
        texts = rows * self.config.data.negatives
        gathered = rows * ranks if ranks > 1 and self.config.loss.transport == "gather" else 0
        loss, width = self.config.loss, self.config.model.embed_dim
        caption = find_loss(loss.name).caption_bytes(bf16_products=has_bf16_products(self.config))
        pixels, tokens = 3 * self.config.model.image.size**2, self.config.model.text.max_tokens
        trainable = [p for p in self.engine.module.parameters() if p.requires_grad]
        return {
            "inputs": rows * pixels + 8 * (rows + texts) * tokens,
            "outputs": (4 * (2 * rows + texts) + caption * gathered) * width,
            "gradients": sum(whole_shape(p).numel() * p.itemsize for p in trainable),
        }

    def num_parameters(self) -> int:
        """Return how many parameters the model has, on all ranks together."""
        return sum(whole_shape(p).numel() for p in self.engine.module.parameters())


def build_harness(config: TrainConfig, *, stream: bool) -> StepHarness:
    """Build the model and its engine, and batches: of the config's data, or made-up ones."""
    with distributed.raise_on_all_ranks():
        tokenizer = _tokenizer(config, stream)
        words = AnyWords(VOCABULARY) if tokenizer is None else tokenizer
        model = build_model(config.model, config.loss, words, seed=config.seed)
        model = model.to(distributed.device())
        shape = config.model.image.size, config.model.text.max_tokens
        flops = count_flops(model, *shape, negatives=config.data.negatives > 0)
        chunking = choose_chunks(config, model)
    chunking = agree(chunking)
    config = replace(config, chunk_size=chunking.chunk_size)
    batches: Iterator[Batch]
    if stream:
        assert tokenizer is not None
        with distributed.raise_on_all_ranks():
            sets = open_train_sets(config.data)
            batches = build_train_batches(config, sets, tokenizer, Progress(0, 0, []))
    else:
        batches = itertools.repeat(_made_up(config))
    return StepHarness(config, build_engine(config, model), batches, chunking.keep_graphs, flops)


def _tokenizer(config: TrainConfig, stream: bool) -> Tokenizer | None:
    """Return the run's tokenizer; None where made-up words will do."""
    if not stream and not config.model.text.spec.tokenizer:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return run_tokenizer(config, Path(folder), build=True)


def _made_up(config: TrainConfig) -> Batch:
    """Draw this rank's pairs of a global batch; all of them different."""
    rows, size = config.global_batch_size // distributed.world_size(), config.model.image.size
    generator = torch.Generator().manual_seed(distributed.rank())
    if config.model.image.reads_vectors:
        images = torch.rand(rows, size, generator=generator)
    else:
        shape = (rows, 3, size, size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    words = (rows, config.model.text.max_tokens)
    ids = distributed.rank() * rows + torch.arange(rows)
    texts = config.data.negatives * rows
    of_false = config.global_batch_size + distributed.rank() * texts + torch.arange(texts)
    of_words = (texts, words[1])
    return Batch(
        images=images,
        tokens=torch.randint(1, VOCABULARY, words, generator=generator),
        image_ids=ids,
        text_ids=ids,
        origin=torch.stack([torch.zeros_like(ids), ids], 1),
        state=np.zeros((0, 2), np.int64),
        skipped=(),
        negatives=torch.randint(1, VOCABULARY, of_words, generator=generator) if texts else None,
        negative_ids=of_false if texts else None,
    )
