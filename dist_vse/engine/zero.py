"""DeepSpeed's ZeRO behind the `Engine` protocol: the sole owner of deepspeed.

Its configuration is built here from plain values; nobody writes its JSON by hand. Settings
that silently change the numbers are always set: `gradient_clipping` (its default is 1.0),
`gradient_accumulation_steps` (1: a step is a step; with K it would divide the loss by K).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.config import EngineConfig
from dist_vse.distributed import rank, world_size
from dist_vse.engine import deepspeed_internals as internals
from dist_vse.engine.deepspeed_start import import_deepspeed
from dist_vse.engine.finite import all_finite
from dist_vse.engine.gradient_reduction import GradientReduction
from dist_vse.engine.loss_scale import LossScale, load_loss_scale
from dist_vse.engine.optimizer import set_learning_rate
from dist_vse.engine.optimizer_state import (
    Fragment,
    dump_state,
    dump_whole_state,
    load_state,
    load_whole_state,
)
from dist_vse.engine.step_norms import StepNorms
from dist_vse.engine.weight_average import WeightAverage
from dist_vse.models.dual_encoder import DualEncoder

PERSISTENT = 100_000  # elements: ZeRO 3 keeps smaller parameters whole on every rank
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
        # The host waits for the device for it. By it DeepSpeed skips an overflow in float16.
        zero["compute_grad_norm"] = clip_norm > 0 or config.precision == "fp16"
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
    if config.precision == "fp16":
        # No module's gradients travel in float16, where the sum of the ranks' would overflow.
        described["torch_autocast"] = {
            "enabled": True,
            "dtype": "float16",
            "lower_precision_safe_modules": [],
        }
    return described


def max_live_graphs(config: EngineConfig) -> int | None:
    """Return how many chunks' graphs may stand at once; None is no bound.

    DeepSpeed's ZeRO 3 that reduces at every chunk gives wrong gradients, without a word, where two
    or more forwards wait for their backward.
    """
    return (
        1 if config.name == "deepspeed" and config.zero_stage == 3 and not config.coalesce else None
    )


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
        whole_tensors: bool = False,
        average_samples: int = 0,
    ) -> None:
        """Wrap the model; `whole_tensors` says that only stage 0 fits the optimizer.

        The weights are averaged over about `average_samples` samples; 0 keeps no average.
        """
        assert not whole_tensors or config.zero_stage == 0, config.zero_stage
        deepspeed = import_deepspeed()
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
        self.optimizer = optimizer
        self.whole_tensors = whole_tensors
        self.stage = stage
        self.clips = clip_norm > 0
        self._whole_norm = 0.0
        self.norms = StepNorms(optimizer, split=stage > 0)
        self.max_live_graphs = max_live_graphs(config)
        self.loss_scale = self._own_loss_scale() if config.precision == "fp16" else None
        # One reduction for all chunks, at the price of whole gradients in memory for the step,
        # which ZeRO 0 and 1 hold anyway.
        self.coalesce = config.coalesce or stage < 2
        self.reduction = self._own_reduction() if self.coalesce and stage < 3 else None
        self._check_state()
        self.average = (
            WeightAverage(self._fragments(), average_samples) if average_samples else None
        )

    def _own_reduction(self) -> GradientReduction | None:
        """Take the reduction over from DeepSpeed; None, with a line in the log, if that fails."""
        try:
            slices = internals.gradient_slices(self.engine, self.module, self.stage)
            internals.take_over_reduction(self.engine, self.stage)
        except internals.MissingInternalError as missing:
            if rank() == 0:
                logger.warning("%s: it reduces gradients by itself, after the backward", missing)
            return None
        return GradientReduction(slices)

    def _own_loss_scale(self) -> LossScale:
        """Take the loss scale over from DeepSpeed, whose stages have it in different places."""
        try:
            internals.take_over_loss_scale(self.engine, self.stage)
        except internals.MissingInternalError as missing:
            raise UserError(
                f"{missing}: engine.precision=fp16 needs it; set engine.precision=bf16, or install "
                f"deepspeed{internals.SUPPORTED}"
            ) from missing
        return LossScale()

    def _check_state(self) -> None:
        """Raise UserError if this DeepSpeed's state can't be read: better now than in an hour."""
        try:
            self._fragments()
            self._averaged_gradients()
            if self.stage == 3:
                with internals.keep_gathered(list(self.module.parameters())):
                    internals.forget_module_order(self.engine)
        except internals.MissingInternalError as missing:
            raise UserError(
                f"{missing}: checkpoints can't be written or read; "
                f"install deepspeed{internals.SUPPORTED}"
            ) from missing

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward (ZeRO 3 gathers parameters on the way)."""
        return self.engine(**inputs)

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Hold the gradients of a step's backward calls together; reduce them once, at the end."""
        with self._deferred_reduction():
            yield
            if self.reduction is not None:
                self.reduction.finish()

    def _deferred_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which DeepSpeed (ZeRO 1 to 3) reduces nothing before its end.

        Where the gradients are averages by then, it only puts them where its optimizer reads them.
        """
        if self.coalesce and self.stage > 0:
            deferred: contextlib.AbstractContextManager[None] = (
                self.engine.coalesce_grad_reduction()
            )
            return deferred
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the last call of a step lets them be reduced."""
        if self.reduction is not None:
            if last:
                self.reduction.start()
        elif not self.coalesce or self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(last)
        if self.loss_scale is not None:
            if self.stage > 0:  # DeepSpeed multiplies by it, and divides before it clips
                self.engine.optimizer.override_loss_scale(self.loss_scale.value)
            else:
                loss = loss * self.loss_scale.value
        self.engine.backward(loss, scale_wrt_gas=False)

    def all_finite(self) -> Tensor:
        """Return 1.0 if all averages are finite, else 0.0: on the device, alike on all ranks.

        DeepSpeed looks at them where it needs their norm, and skips the step without a word.
        """
        return all_finite(self._averaged_gradients())

    def step(self) -> None:
        """Clip the averaged gradients, update, and clear them."""
        if self.loss_scale is not None and self.stage == 0:
            torch._foreach_div_(self._averaged_gradients(), self.loss_scale.value)
        if self.clips and self.stage == 0 and self.norms.active:  # DeepSpeed keeps its norm
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._whole_norm = float(nn.utils.get_total_norm(gradients))
        self.engine.step()

    def skip(self) -> None:
        """Clear the gradients, of which one is not finite, without an update."""
        if self.stage == 0:
            self.engine.zero_grad()
            return
        self.engine.step()  # DeepSpeed finds their norm infinite, and clears all that it keeps
        assert not self.engine.was_step_applied()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step."""
        set_learning_rate(self.optimizer, rate)

    def step_norms(self) -> dict[str, float]:
        """Return `grad_norm`, before clipping, and `update_ratio` of a step that was measured.

        ZeRO 3 on several ranks has no ratio: DeepSpeed pads its partitions of the weights with
        memory that nobody has written to.
        """
        found = self.norms.read()
        if self.stage == 3 and world_size() > 1:
            del found["update_ratio"]
        if self.clips and found["grad_norm"]:  # 0: the step was skipped
            norm = self.engine.get_global_grad_norm() if self.stage > 0 else self._whole_norm
            found["grad_norm"] = float(norm)
        return found

    @contextlib.contextmanager
    def gathered_parameters(self, *, changed: bool = False) -> Iterator[DualEncoder]:
        """Return the model, with every parameter whole on every rank (ZeRO 3 splits them).

        `changed` says that the block gives them new values, the same on all ranks. The ranks may
        run different numbers of forwards in the block.
        """
        if self.stage < 3:
            yield self.module
            return
        deepspeed = import_deepspeed()
        modifier = 0 if changed else None
        parameters: list[Any] = list(self.module.parameters())
        # Without `keep_gathered` each forward would split again what it used, and the next one
        # gather it: a rank with more batches than the others would wait for them for ever.
        with (
            deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier),
            internals.keep_gathered(parameters),
        ):
            yield self.module
            internals.forget_module_order(self.engine)

    def update_average(self, samples_seen: int, batch: int) -> None:
        """Average the weights after a step of `batch` samples, if the engine keeps an average."""
        if self.average is not None:
            self.average.update(samples_seen, batch)

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[DualEncoder]:
        """Return the model, whole on every rank, with the averages, or else with the weights."""
        with self.gathered_parameters() as model:
            if self.average is None:
                yield model
            elif self.stage == 0:
                with self.average.exchanged():
                    yield model
            else:
                with self.average.copied_to(self._trainable()):
                    yield model

    def dump_optimizer(self) -> dict[str, Tensor]:
        """Copy this rank's fragments of the optimizer's state to host memory, by name.

        With those of the averaged weights. Under ZeRO 0 all ranks hold all of it, and rank 0 alone
        gives it, as it does a loss scale.
        """
        if self.stage == 0 and rank() > 0:
            return {}
        state = (
            dump_whole_state(self._trainable(), self.optimizer)
            if self.whole_tensors
            else dump_state(self._fragments(), self.optimizer)
        )
        if self.loss_scale is not None and rank() == 0:
            state |= self.loss_scale.dump()
        if self.average is not None:
            state |= self.average.dump()
        return state

    def load(self, weights: Mapping[str, Tensor], files: Sequence[Path]) -> None:
        """Take whole weights, and the optimizer's state out of all former ranks' `files`.

        For a fresh engine; the world size and stage may be others. Every rank calls this.
        """
        self._load_weights_and_optimizer(weights, files)
        if self.average is not None:
            self.average.load(files)

    def _load_weights_and_optimizer(
        self, weights: Mapping[str, Tensor], files: Sequence[Path]
    ) -> None:
        with self.gathered_parameters(changed=True):
            self.module.load_state_dict(weights, strict=False)  # adapters come without their base
        if self.loss_scale is not None:
            load_loss_scale(self.loss_scale, files)
        if self.whole_tensors:
            load_whole_state(self._trainable(), self.optimizer, files)
            return
        fragments = self._fragments()
        with torch.no_grad():
            for fragment in fragments:  # ZeRO's own copies of the parameters
                end = fragment.start + fragment.length
                values = weights[fragment.name].view(-1)[fragment.start : end]
                fragment.within(fragment.flat).copy_(values)
        load_state(fragments, self.optimizer, files)

    def _averaged_gradients(self) -> list[Tensor]:
        return internals.averaged_gradients(self.engine, self.module, self.stage)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _fragments(self) -> list[Fragment]:
        return internals.state_fragments(self.engine, self.module, self.stage, rank())


def _fetch_at_once(model: nn.Module) -> None:
    """Mark modules that read weights of the modules inside them, which are never called then."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) or getattr(module, "reads_inner", False):
            set_z3_leaf_module(module, True)
