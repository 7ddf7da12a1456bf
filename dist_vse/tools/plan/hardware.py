"""What a machine can do: one YAML file each, stated by its maker or measured by `--calibrate`."""

from dataclasses import dataclass, field
from pathlib import Path

from dist_vse.common.units import GIB
from dist_vse.config.checks import at_least, check
from dist_vse.config.load import load_yaml


@dataclass(frozen=True)
class LinkConfig:
    """A level of the network, as a rank sees it when all ranks talk at once."""

    alpha_us: float = 10.0
    """Microseconds that a message takes beyond its bytes."""
    copy_gb_per_s: float = 10.0
    """10^9 bytes a second and rank where data is copied: gathers, messages. For the level between
    nodes: of a whole node's links, through which a ring of all ranks passes once."""
    reduce_gb_per_s: float = 10.0
    """The same where data is added up on the way."""
    pair_gb_per_s: float = 10.0
    """Of one rank that sends to one other."""

    def __post_init__(self) -> None:
        at_least(0, alpha_us=self.alpha_us)
        for name in ("copy_gb_per_s", "reduce_gb_per_s", "pair_gb_per_s"):
            check(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be above 0")


@dataclass(frozen=True)
class ChunkSpeed:
    """Measured seconds of one model's chunk; `--calibrate` writes these."""

    model: str = ""
    """What was measured: see `work.model_key`."""
    rows: int = 1
    together: int = 1
    """Processes of the node that worked at the same time."""
    forward_s: float = 0.0
    """Without a graph."""
    graph_s: float = 0.0
    """A forward that keeps its graph."""
    backward_s: float = 0.0
    frozen_s: float = 0.0
    """A frozen trunk's outputs, which are computed once a step."""
    hooks_forward_s: float = 0.0
    """What ZeRO 3's hooks at every module add to a forward, whatever its rows, without messages."""
    hooks_backward_s: float = 0.0
    """The same of a backward."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes; a rank has a GPU, or shares the cores of its node."""

    name: str = "unnamed"
    checked: str = ""
    """How predictions for it compare with measurements; empty where nothing was compared."""
    ranks_per_node: int = 8
    """GPUs of a node; for processes on a CPU: the largest number on one node."""
    cores: int = 0
    """CPU cores of a node, which its processes share; 0: each rank has a device of its own."""
    memory_gib: float = 80.0
    """Of a rank's device; of the whole node where processes share cores."""
    process_gib: float = 1.0
    """What a rank takes before there is a model: CUDA's context and NCCL, or the libraries."""
    conv_tflops: float = 10.0
    """10^12 float32 operations a second that convolutions reach at best, without TF32."""
    fp32_tflops: float = 10.0
    """The same of float32 matrix products."""
    tf32_tflops: float = 0.0
    """The same of products and convolutions in TF32; 0: the device has none, as a CPU."""
    bf16_tflops: float = 10.0
    """The same of bfloat16 and float16."""
    attained_encoders: float = 0.5
    """Share of these that the encoders' products and convolutions reach."""
    attained_loss: float = 0.8
    """Share of them that the loss's large products reach."""
    memory_gb_per_s: float = 1000.0
    """10^9 bytes a second that passes over memory reach."""
    launch_us: float = 5.0
    """Microseconds that an operator takes whatever its size: to start, and to fill the device."""
    optimizer_ns: float = 0.0
    """Nanoseconds an element of AdamW; 0 derives them from memory_gb_per_s."""
    inside: LinkConfig = field(default_factory=LinkConfig)
    """Between ranks of a node."""
    between: LinkConfig = field(default_factory=LinkConfig)
    """Between nodes."""
    chunks: list[ChunkSpeed] = field(default_factory=list)
    """Measured speeds of models, which count before the operations above."""

    def __post_init__(self) -> None:
        at_least(1, ranks_per_node=self.ranks_per_node)
        at_least(0, cores=self.cores, process_gib=self.process_gib, launch_us=self.launch_us)
        at_least(0, tf32_tflops=self.tf32_tflops)
        for name in ("attained_encoders", "attained_loss"):
            value = getattr(self, name)
            check(0 < value <= 1, f"{name} ({value}) must be above 0 and at most 1")
        for name in ("memory_gib", "conv_tflops", "fp32_tflops", "bf16_tflops", "memory_gb_per_s"):
            check(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be above 0")

    def rates(self, precision: str) -> tuple[float, float]:
        """Return the 10^12 operations a second of products and convolutions in a precision."""
        if precision in ("bf16", "fp16"):
            return self.bf16_tflops, self.bf16_tflops
        if precision == "tf32" and self.tf32_tflops:
            return self.tf32_tflops, self.tf32_tflops
        return self.fp32_tflops, self.conv_tflops

    def ranks_on_node(self, world_size: int) -> int:
        """Return how many ranks share a node."""
        return min(world_size, self.ranks_per_node)

    def nodes(self, world_size: int) -> int:
        """Return how many nodes so many ranks fill."""
        return -(-world_size // self.ranks_per_node)

    def crowding(self, world_size: int) -> float:
        """Return how many ranks share one core, at least 1; 1 where each has its own device."""
        return max(1.0, self.ranks_on_node(world_size) / self.cores) if self.cores else 1.0

    def rank_memory(self, world_size: int) -> float:
        """Return the bytes that a rank may fill besides what its process takes anyway."""
        whole = self.memory_gib / (self.ranks_on_node(world_size) if self.cores else 1)
        return (whole - self.process_gib) * GIB


def load_hardware(path: str | Path) -> Hardware:
    """Read a hardware file. Raises UserError for a missing file, unknown key or wrong value."""
    return load_yaml(path, Hardware)
