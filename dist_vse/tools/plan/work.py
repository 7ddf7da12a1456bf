"""What a pair asks of the encoders: operations, memory, parameters; plain numbers."""

from dataclasses import dataclass

FP32 = 4  # bytes of a number


@dataclass(frozen=True)
class Ops:
    """Work of one direction of the model."""

    matmul_flops: float = 0.0
    """A pair: matrix products and attention, a multiply-add counted as two."""
    conv_flops: float = 0.0
    """A pair: convolutions, which a GPU runs on its tensor cores (TF32) in float32 as well."""
    moved_bytes: float = 0.0
    """A pair: read and written by all operators that are neither."""
    calls: int = 0
    """Operators a chunk, whatever its size."""

    @property
    def flops(self) -> float:
        """Return the operations of a pair."""
        return self.matmul_flops + self.conv_flops


@dataclass(frozen=True)
class Line:
    """Bytes of a chunk: some whatever its size, and some a pair."""

    fixed: float = 0.0
    per_pair: float = 0.0

    def of(self, rows: float) -> float:
        """Return the bytes of a chunk of so many pairs."""
        return self.fixed + self.per_pair * rows


@dataclass(frozen=True)
class Work:
    """A model and a pair, as `count_work` finds them."""

    model: str
    """Its name among measured speeds."""
    precision: str
    embed_dim: int
    trainable: int
    """Elements of the parameters that learn."""
    frozen: int
    """Elements of those that do not."""
    persistent: int
    """Elements in parameters so small that ZeRO 3 keeps them whole."""
    lowered: int
    """Elements that learn in linear and convolutional layers: under bf16 these travel in it."""
    gathers: int
    """Parameters larger than that: ZeRO 3 gathers each by itself."""
    largest: int
    """Elements of the largest parameter that learns."""
    last: int
    """Elements of the engine's last bucket of gradients, which a backward completes last."""
    buckets: int
    """Messages in which the gradients travel."""
    forward: Ops
    """Of what the two passes run: without a frozen trunk."""
    backward: Ops
    frozen_forward: Ops
    """Of frozen trunks, once a step."""
    held: Line
    """What a chunk's graph keeps from forward to backward."""
    forward_peak: Line
    """Peak of a forward without a graph."""
    graph_peak: Line
    """Peak of a forward that keeps its graph; `held` is left of it."""
    backward_peak: Line
    """Peak of backward beyond the graph, without the parameters' gradients."""
    input_bytes: float
    """A pair's pixels and tokens."""
    hidden_bytes: float
    """A pair's outputs of frozen trunks, which are held for the whole step."""

    @property
    def weight_bytes(self) -> float:
        """Return the bytes of all parameters."""
        return FP32 * (self.trainable + self.frozen)

    @property
    def gradient_bytes(self) -> float:
        """Return the bytes of the gradients of all that learns (P)."""
        return FP32 * self.trainable
