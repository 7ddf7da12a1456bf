"""DeepSpeed's ZeRO behind the `Engine` protocol: the sole owner of deepspeed.

Its configuration is built here from plain values; nobody writes its JSON by hand. Settings
that silently change the numbers are always set: `gradient_clipping` (its default is 1.0),
`gradient_accumulation_steps` (1: a step is a step; with K it would divide the loss by K).
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.config import EngineConfig
from dist_vse.distributed import rank, world_size
from dist_vse.engine.collective_timing import reduced_already, tell_collectives
from dist_vse.engine.gradient_reduction import GradientReduction, find_shares
from dist_vse.engine.optimizer_state import Piece, dump_state, find_pieces, load_state
from dist_vse.models.dual_encoder import DualEncoder

IMPORTS = ("torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3")
"""Slow to import; for a server of which ranks are forked."""
PERSISTENT = 100_000  # elements: ZeRO 3 keeps smaller parameters whole on every rank
_HELD = -1  # no module has this number
_LARGEST_BUCKET = 1 << 26  # elements
_ALIGNMENT = 1 << 10  # DeepSpeed wants buckets in multiples of a small power of two


def zero_config(
    config: EngineConfig, *, rank_batch_size: int, clip_norm: float, bucket: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration; `bucket` is in elements."""
    stage = config.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    if stage in (1, 2):
        # Reduce to the owner of a partition, not to everyone: fewer bytes.
        zero["use_multi_rank_bucket_allreduce"] = False
    described: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rank_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if config.precision == "bf16":
        described["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return described


def max_live_graphs(stage: int, *, coalesce: bool) -> int | None:
    """Return how many chunks' graphs may stand at once; None is no bound.

    ZeRO 3 that reduces at every chunk gives wrong gradients, without a word, where two or more
    forwards wait for their backward.
    """
    return 1 if stage == 3 and not coalesce else None


class ZeroEngine:
    """A DeepSpeed engine that reduces gradients once a step where its stage allows."""

    def __init__(
        self,
        module: DualEncoder,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        rank_batch_size: int,
        clip_norm: float = 0.0,
    ) -> None:
        deepspeed = _import_deepspeed()
        stage = config.zero_stage
        if stage == 3:
            _fetch_at_once(module)
        size = sum(p.numel() for p in module.parameters() if p.requires_grad)
        described = zero_config(
            config,
            rank_batch_size=rank_batch_size,
            clip_norm=clip_norm,
            bucket=min(_LARGEST_BUCKET, size + -size % _ALIGNMENT),
        )
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=described)
        self.module = module
        self.stage = stage
        self.max_live_graphs = max_live_graphs(stage, coalesce=config.coalesce)
        # One reduction for all chunks, at the price of whole gradients in memory for the step,
        # which ZeRO 0 and 1 hold anyway.
        self.coalesce = config.coalesce or stage < 2
        self.reduction: GradientReduction | None = None
        if self.coalesce and stage < 3:
            self.reduction = GradientReduction(find_shares(self.engine, module, stage=stage))
            self.engine.enable_backward_allreduce = False  # once at the end instead

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward (ZeRO 3 gathers parameters on the way)."""
        return self.engine(**inputs)

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Hold the gradients of a step's backward calls together; reduce them once, at the end."""
        if not self.coalesce:
            yield
        elif self.reduction is None:
            with self._reduction_at_the_end():
                yield
        else:  # DeepSpeed is left to divide by W and to put the sums in their places
            with reduced_already(), self._reduction_at_the_end():
                yield
                self.reduction.finish()

    @contextlib.contextmanager
    def _reduction_at_the_end(self) -> Iterator[None]:
        """Hold back DeepSpeed's reduction until the block's end."""
        if self.stage > 0:
            with self.engine.coalesce_grad_reduction():
                yield
        else:
            yield
            self.engine.allreduce_gradients()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the last call of a step lets them be reduced."""
        if not self.coalesce:
            self.engine.set_gradient_accumulation_boundary(last)
        if last and self.reduction is not None:
            self.reduction.start()
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Clip, update, and clear the gradients, which are averaged over the ranks already."""
        self.engine.step()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    @contextlib.contextmanager
    def gathered_parameters(self, *, changed: bool = False) -> Iterator[None]:
        """Hold every parameter whole on every rank inside the block (ZeRO 3 splits them).

        `changed` says that the block gives them new values, the same on all ranks.
        """
        if self.stage < 3:
            yield
            return
        deepspeed = _import_deepspeed()
        modifier = 0 if changed else None
        parameters: list[Any] = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier):
            # Each forward would split again what it used, and the next one gather it: a rank with
            # more batches than the others would wait for them for ever.
            for parameter in parameters:
                parameter.ds_active_sub_modules.add(_HELD)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_HELD)

    def dump_optimizer(self) -> dict[str, Tensor]:
        """Copy this rank's share of the optimizer's state to host memory; see `pieces`.

        Under ZeRO 0 all ranks hold all of it, and rank 0 alone gives it.
        """
        if self.stage == 0 and rank() > 0:
            return {}
        return dump_state(self._pieces(), self.engine.basic_optimizer)

    def load(self, weights: Mapping[str, Tensor], files: Sequence[Path]) -> None:
        """Take whole weights, and the optimizer's state out of all former ranks' `files`.

        For a fresh engine; the world size and stage may be others. Every rank calls this.
        """
        with self.gathered_parameters(changed=True):
            self.module.load_state_dict(weights)
        pieces = self._pieces()
        with torch.no_grad():
            for piece in pieces:  # ZeRO's own copies of the parameters
                values = weights[piece.name].view(-1)[piece.start : piece.start + piece.length]
                piece.within(piece.flat).copy_(values)
        load_state(pieces, self.engine.basic_optimizer, files)

    def _pieces(self) -> list[Piece]:
        return find_pieces(self.engine, self.module, stage=self.stage, rank=rank())


def _fetch_at_once(model: nn.Module) -> None:
    """Mark modules that read weights of the modules inside them, which are never called then."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) or getattr(module, "reads_inner", False):
            set_z3_leaf_module(module, True)


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its log lines and without compiling anything."""
    if world_size() == 1 and "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # The shared-memory operator serves inference only, and its build at first use needs a
    # compiler, ninja and half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    tell_collectives(deepspeed.comm)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # It still calls collectives that PyTorch has renamed: nothing that a user can mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated")
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out the warning at optimizers that DeepSpeed has not tested: our tests use SGD."""
    return "untested optimizer" not in record.getMessage()
