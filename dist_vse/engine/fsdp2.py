"""PyTorch's FSDP2 (`fully_shard`) behind the `Engine` protocol.

Each rank holds a run of rows of every parameter, of its gradient and of the optimizer's state. A
unit's parameters are gathered before its forward, and again before its backward.

The optimizer steps the rank's rows as plain tensors. So any optimizer that works element by
element runs as under ZeRO, and checkpoints have the same form (`optimizer_state.py`).
"""

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dist_vse.common.random_state import own_generators
from dist_vse.config import EngineConfig
from dist_vse.distributed import all_reduce_sum, device, rank, world_size
from dist_vse.engine.finite import all_finite
from dist_vse.engine.loss_scale import LossScale, load_loss_scale
from dist_vse.engine.optimizer import set_learning_rate
from dist_vse.engine.optimizer_state import Fragment, dump_state, load_state
from dist_vse.engine.step_norms import StepNorms
from dist_vse.engine.weight_average import WeightAverage
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.layers import blocks
from dist_vse.models.precision import HALVES, autocast


class Fsdp2Engine:
    """Shards the model block by block, and reduces gradients once a step."""

    max_live_graphs: int | None = None  # a backward gathers what it needs, however many wait

    def __init__(
        self,
        module: DualEncoder,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        clip_norm: float = 0.0,
        average_samples: int = 0,
        float32_layers: Collection[nn.Module] = (),
    ) -> None:
        """Shard the model, whose parameters the optimizer has; see `float32_layers.py`.

        The weights are averaged over about `average_samples` samples; 0 keeps no average.
        """
        self.module = module
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.precision = config.precision
        self.stage = config.zero_stage
        self.coalesce = config.coalesce
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.norms = StepNorms(optimizer, split=True)
        self._norm = 0.0
        self._whole = _skeleton(module)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._units = _shard(module, config, float32_layers)
        self._root = cast(FSDPModule, module)
        for unit in self._units:  # only after its first gathering do a unit's rows stay in place
            unit.unshard()
            unit.reshard()
        self._sharded = cast(dict[str, DTensor], dict(module.named_parameters()))
        self._rows = {
            name: nn.Parameter(value.to_local().detach(), requires_grad=False)
            for name, value in self._sharded.items()
            if value.requires_grad and value.to_local().numel()
        }
        for group in optimizer.param_groups:
            found = (names[id(parameter)] for parameter in group["params"])
            group["params"] = [self._rows[name] for name in found if name in self._rows]
        self.average = (
            WeightAverage(self._fragments(), average_samples) if average_samples else None
        )

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward, which gathers parameters on the way."""
        with autocast(device(), self.precision):
            return self.module(**inputs)

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Let gradients add up; at the end, hand the averages of this rank's rows on."""
        yield
        for name, rows in self._rows.items():
            grad = cast(DTensor | None, self._sharded[name].grad)
            rows.grad = torch.zeros_like(rows) if grad is None else grad.to_local()
            self._sharded[name].grad = None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the last call of a step has them reduced."""
        self._root.set_requires_gradient_sync(last or not self.coalesce)
        self._root.set_is_last_backward(last)
        if self.stage < 3:
            self._root.set_reshard_after_backward(last)
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def all_finite(self) -> Tensor:
        """Return 1.0 if all averages are finite, else 0.0: on the device, alike on all ranks."""
        return all_finite(self._gradients())

    def step(self) -> None:
        """Clip the averaged gradients, update, and clear them."""
        gradients = self._gradients()
        if self.loss_scale is not None and gradients:
            torch._foreach_div_(gradients, self.loss_scale.value)
        if self.clip_norm > 0:
            self._clip(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self, gradients: list[Tensor]) -> None:
        """Shorten the gradient of all ranks' rows to `clip_norm`, as PyTorch does a whole one."""
        own = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device())
        norm = all_reduce_sum(own.square()).sqrt()
        if gradients:
            torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.norms.active:
            self._norm = float(norm)

    def skip(self) -> None:
        """Clear the gradients without an update."""
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step."""
        set_learning_rate(self.optimizer, rate)

    def step_norms(self) -> dict[str, float]:
        """Return `grad_norm`, before clipping, and `update_ratio` of a step that was measured."""
        found = self.norms.read()
        if self.clip_norm > 0 and found["grad_norm"]:  # 0: the step was skipped
            found["grad_norm"] = self._norm
        return found

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[DualEncoder]:
        """Return a model with all parameters, whole and in float32; every rank calls this.

        It is no FSDP module: the ranks may run different numbers of forwards in it.
        """
        empty = dict(self._whole.named_parameters())
        whole = {
            name: nn.Parameter(value.full_tensor(), requires_grad=value.requires_grad)
            for name, value in self._sharded.items()
        }
        _replace(self._whole, {id(empty[name]): value for name, value in whole.items()})
        try:
            yield self._whole
        finally:
            _replace(self._whole, {id(whole[name]): value for name, value in empty.items()})

    def update_average(self, samples_seen: int, batch: int) -> None:
        """Average the weights after a step of `batch` samples, if the engine keeps an average."""
        if self.average is not None:
            self.average.update(samples_seen, batch)

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[DualEncoder]:
        """Return a whole model of the averages, or else of the weights; every rank calls this."""
        averaged = contextlib.nullcontext() if self.average is None else self.average.exchanged()
        with averaged, self.gathered_parameters() as model:
            yield model

    def dump_optimizer(self) -> dict[str, Tensor]:
        """Copy the state of this rank's rows, and their averages, to host memory, by name."""
        state = dump_state(self._fragments(), self.optimizer)
        if self.loss_scale is not None and rank() == 0:
            state |= self.loss_scale.dump()
        if self.average is not None:
            state |= self.average.dump()
        return state

    def load(self, weights: Mapping[str, Tensor], files: Sequence[Path]) -> None:
        """Take whole weights, and the optimizer's state out of all former ranks' `files`.

        For a fresh engine; the checkpoint may come from ZeRO. Every rank calls this.
        """
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                whole = weights.get(name)
                if whole is None:
                    continue  # adapters come without their base
                if isinstance(value, DTensor):
                    own = value.to_local()
                    own.copy_(whole[_first_row(value) :][: len(own)])
                else:
                    value.copy_(whole)
        if self.loss_scale is not None:
            load_loss_scale(self.loss_scale, files)
        load_state(self._fragments(), self.optimizer, files)
        if self.average is not None:
            self.average.load(files)

    def _gradients(self) -> list[Tensor]:
        return [rows.grad for rows in self._rows.values() if rows.grad is not None]

    def _fragments(self) -> list[Fragment]:
        return [
            Fragment(name, _first_row(self._sharded[name]) * rows[0].numel(), rows.numel(), rows, 0)
            for name, rows in self._rows.items()
        ]


def _shard(
    model: DualEncoder, config: EngineConfig, float32_layers: Collection[nn.Module]
) -> list[FSDPModule]:
    """Shard a model in place, inner units first; return a module of each unit.

    A block of a trunk is a unit; what lies outside of blocks belongs to the last one, the model.
    In a half precision a block is gathered in it, as autocast would cast it, but for its norms
    and the like: they are a unit of their own in float32. All gradients travel in float32.
    """
    mesh = init_device_mesh(device().type, (world_size(),))
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.zero_stage == 3}
    half = MixedPrecisionPolicy(
        param_dtype=HALVES.get(config.precision),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does
    )
    units: list[FSDPModule] = []
    for block in (*blocks(model.image.trunk), *blocks(model.text.trunk)):
        inside: list[nn.Module] = [
            m for m in block.modules() if m in float32_layers and not isinstance(m, FSDPModule)
        ]
        if inside and block not in inside:
            fully_shard(inside, **how)
            units.append(cast(FSDPModule, inside[0]))
        if any(not isinstance(p, DTensor) for p in block.parameters()):
            policy = MixedPrecisionPolicy() if block in inside else half
            units.append(fully_shard(block, mp_policy=policy, **how))
    units.append(fully_shard(model, mesh=mesh, reshard_after_forward=False))
    if device().type == "cpu":
        for unit in units:  # the gloo of PyTorch 2.8 takes a sum for the average, without a word
            unit.set_force_sum_reduction_for_comms(True)
    # A frozen trunk runs outside of the model's forward.
    register_fsdp_forward_method(model, "prepare")
    return units


def _first_row(value: DTensor) -> int:
    """Return the first row of a parameter that this rank holds: as `torch.chunk` cuts."""
    return min(rank() * -(-len(value) // world_size()), len(value))


def _skeleton(model: DualEncoder) -> DualEncoder:
    """Copy a model without its parameters' memory; buffers and generators are the model's own."""
    kept = [*model.buffers(), *own_generators(model)]
    memo: dict[int, Any] = {id(one): one for one in kept}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _replace(model: nn.Module, new: Mapping[int, nn.Parameter]) -> None:
    """Put other parameters into a model, by the id of those that are there."""
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            setattr(module, name, new[id(parameter)])
