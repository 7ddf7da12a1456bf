"""Our arithmetic beside a peer's published table: the loss's memory in Inf-CL, table 2.

Cheng et al., Breaking the Memory Barrier, 2024, https://arxiv.org/abs/2410.17243: ViT-L/14
(d = 768), A800 of 80 GB, peak of the loss a GPU, by global batch.
"""

from dataclasses import dataclass

from dist_vse.common.units import GIB
from dist_vse.tools.plan.memory import Place, loss_bytes
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.work import FP32

WIDTH = 768
THOUSAND = 1024  # of their "32k"
CLIP, OPEN_CLIP, INF_CL = "CLIP", "OpenCLIP", "Inf-CL"


@dataclass(frozen=True)
class Published:
    """A figure of the table, GiB."""

    way: str
    ranks: int
    batch_k: int
    gib: float


TABLE = [
    Published(way, ranks, batch_k, gib)
    for way, ranks, figures in (
        (CLIP, 8, {32: 16.67, 64: 66.11}),
        (OPEN_CLIP, 8, {32: 2.27, 64: 8.63, 128: 33.64}),
        (INF_CL, 8, {32: 0.18, 64: 0.36, 128: 0.72, 256: 1.45, 1024: 6.53}),
        (CLIP, 32, {32: 16.66, 64: 66.11}),
        (OPEN_CLIP, 32, {32: 0.71, 64: 2.45, 128: 8.98, 256: 34.35}),
        (INF_CL, 32, {32: 0.05, 64: 0.09, 128: 0.18, 256: 0.35, 1024: 1.44}),
    )
    for batch_k, gib in figures.items()
]


def predict(way: str, ranks: int, batch: int) -> float | None:
    """Return the GiB of a peer's loss by its arithmetic; None for Inf-CL, whose kernels we lack.

    Two matrices of logits and their gradients, in float32: of all pairs on every GPU (CLIP), or of
    a GPU's rows with all columns (OpenCLIP with local_loss); and both sides' gathered features.
    """
    if way == INF_CL:
        return None
    rows = batch if way == CLIP else batch // ranks
    return (4 * FP32 * rows * batch + 2 * FP32 * batch * WIDTH) / GIB


def ours(ranks: int, batch: int, transport: str) -> float:
    """Return the GiB of our loss, with no similarity kept: features, their gradients, tiles."""
    settings = Settings(batch, ranks, batch // ranks, transport=transport, loss_gib=0.0)
    return sum(loss_bytes(settings, WIDTH, Place(on_cpu=False))) / GIB
