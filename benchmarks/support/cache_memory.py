"""Memory of a cached step: what the encoders need at their peak, and what grows with the batch."""

from typing import Any

from torch import Tensor

from benchmarks.support.workload import Workload, make_model, make_optimizer, make_pairs
from dist_vse.common.memory import TensorMemoryTracker
from dist_vse.common.units import GIB
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.options import LossOptions
from dist_vse.runs.metrics import peak_memory_gib
from dist_vse.tools.bench.table import Table
from dist_vse.training.grad_cache import train_step


class _MeasuredEngine(PlainEngine):
    """Notes how much a chunk's forward and backward add to what was allocated before them."""

    storages: TensorMemoryTracker
    own = 0  # peak of the bytes of a chunk
    outside = 0  # peak of the bytes held before a chunk was encoded

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward."""
        self._before = self.storages.held
        self.outside = max(self.outside, self._before)
        self.storages.peak = self._before
        outputs = super().__call__(**inputs)
        self.own = max(self.own, self.storages.peak - self._before)
        return outputs

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        super().backward(loss, last=last)
        self.own = max(self.own, self.storages.peak - self._before)


def measure_memory(load: Workload, batch: int, chunk_size: int) -> dict[str, Any]:
    """Take a step of `batch` pairs in one process; return bytes by what they are for.

    No graph is kept, so that a chunk's forward and backward stand alone.
    """
    model = make_model(load)
    engine = _MeasuredEngine(model, make_optimizer(model))
    images, tokens = make_pairs(load, batch)
    pieces = zip(images.split(chunk_size), tokens.split(chunk_size), strict=True)
    chunks = [model.prepare(images=i, tokens=t) for i, t in pieces]

    loss = GlobalLoss("info_nce", LossOptions(memory_gib=0))
    engine.storages = TensorMemoryTracker()
    train_step(engine, loss, chunks[:2], keep_graphs=0)  # optimizer states are made here
    engine.own = engine.outside = 0
    resident = peak_memory_gib()
    with TensorMemoryTracker() as engine.storages:
        train_step(engine, loss, chunks, keep_graphs=0)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "global_batch": batch,
        "chunk": chunk_size,
        "model_bytes": engine.own,
        "gradient_bytes": gradients,
        "features_bytes": engine.outside - gradients,  # these are held from the first backward on
        "input_bytes": images.nbytes + tokens.nbytes,
        "process_peak_bytes": int(peak_memory_gib() * GIB),
        "process_peak_bytes_of_two_chunks": int(resident * GIB),
    }


def memory_table(results: list[dict[str, Any]]) -> Table:
    """Return the table of what `measure_memory` returned for several batches."""
    title = f"memory of a step in one process, chunks of {results[0]['chunk']} pairs"
    columns = ("batch", "a chunk's forward and backward", "/ smallest batch's")
    table = Table(title, (*columns, "features and cache", "inputs", "process's peak"))
    parts = ("model", "features", "input", "process_peak")
    for result in results:
        model, *others = (f"{result[f'{part}_bytes'] / 2**20:.1f} MiB" for part in parts)
        ratio = result["model_bytes"] / results[0]["model_bytes"]
        table.add_row(str(result["global_batch"]), model, f"{ratio:.3f}", *others)
    return table
