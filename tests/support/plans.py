"""A made-up model and device to plan for, and a small config whose step is measured."""

from dist_vse.config import TrainConfig, load_config
from dist_vse.tools.bench.scale_cases import SMALL
from dist_vse.tools.plan.hardware import Hardware
from dist_vse.tools.plan.work import Line, Ops, Work

STEP = [*SMALL, "global_batch_size=32", "chunk_size=4"]  # two ranks, four chunks
WORK = Work(
    model="made up",
    precision="fp32",
    embed_dim=512,
    trainable=100_000_000,
    frozen=0,
    persistent=500_000,
    lowered=90_000_000,
    gathers=100,
    largest=4_000_000,
    last=1 << 20,
    buckets=60,
    forward=Ops(40e9, 1e9, 100e6, 400),
    backward=Ops(80e9, 2e9, 200e6, 800),
    frozen_forward=Ops(),
    held=Line(0, 100e6),
    forward_peak=Line(0, 5e6),
    graph_peak=Line(0, 101e6),
    backward_peak=Line(0, 2e6),
    input_bytes=150_000,
    hidden_bytes=0,
)
GPU = Hardware(name="a GPU")


def case(words: list[str]) -> TrainConfig:
    """Return the small config with some settings changed."""
    return load_config(None, [*STEP, *words])
