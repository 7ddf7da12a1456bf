"""A rank's batch, cut into chunks of what the model's forward takes."""

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.data.precomputed import Features
from dist_vse.data.samples import Batch
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import autocast
from dist_vse.training.prefetch_to_device import Chunk


def make_chunks(
    model: DualEncoder, batch: Batch, config: TrainConfig, features: Features | None = None
) -> list[Chunk]:
    """Cut the rank's batch into chunks of what the model's forward takes.

    A frozen trunk runs here, once: its outputs take the place of its inputs. Those of `features`
    are only read. Images of a trunk that learns stay on the host, uint8, until their chunk's turn.
    """
    here = distributed.device()
    name, images = "images", batch.images
    if features is not None:
        name, images = "image_hidden", features.rows(batch.origin[:, 1])
    parts = {name: images, "tokens": batch.tokens}
    if here.type == "cuda":  # a GPU reads such memory by itself; the workers' buffers are such
        parts = {name: part.pin_memory() for name, part in parts.items()}
    size = config.fixed_chunk_size
    pieces = [
        dict(zip(parts, p, strict=True))
        for p in zip(*(x.split(size) for x in parts.values()), strict=True)
    ]
    if batch.negatives is not None:  # whichever chunk encodes them
        texts = batch.negatives.pin_memory() if here.type == "cuda" else batch.negatives
        for piece, negatives in zip(pieces, texts.tensor_split(len(pieces)), strict=True):
            piece["negatives"] = negatives
    with autocast(here, config.engine.precision):
        return [model.prepare(**piece) for piece in pieces]
