"""Everything that we assume about DeepSpeed beyond its documentation.

Each function below is one assumption, read in the source of DeepSpeed 0.19.8, and has a test of
its own in `tests/engine/test_deepspeed_*.py`. No other module touches an attribute of
DeepSpeed that is not documented. An attribute that must be there is read by `_private` or set by
`_replace`, so a version that lacks it raises `MissingInternalError`, which `ZeroEngine` answers.
`wire_dtype` and `whole_shape` read marks whose absence is an answer.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.engine.collective_timing import timed
from dist_vse.engine.gradient_reduction import GradientSlice
from dist_vse.engine.optimizer_state import Fragment

SUPPORTED = ">=0.19.8,<0.20"
"""As in pyproject.toml. 0.19.8 was read and tried; no later minor promises to keep any of this."""

_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "allgather_fn",
    "broadcast",
    "reduce",
    "reduce_scatter_fn",
    "reduce_scatter_tensor",
)
_OUR_MODULE = -1  # DeepSpeed numbers modules from 0


class MissingInternalError(Exception):
    """The installed DeepSpeed has no such attribute."""


def _private(owner: Any, name: str) -> Any:
    """Return an undocumented attribute. Raises MissingInternalError."""
    if not hasattr(owner, name):
        import deepspeed

        kind = type(owner).__name__
        raise MissingInternalError(f"DeepSpeed {deepspeed.__version__} has no {kind}.{name}")
    return getattr(owner, name)


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set an undocumented attribute of one object. Raises MissingInternalError if it is new."""
    _private(owner, name)
    setattr(owner, name, value)


# Reduction of gradients. Without one of these, DeepSpeed reduces by itself.


def take_over_reduction(engine: Any, stage: int) -> None:
    """Have DeepSpeed average no gradients (ZeRO 0, 1, 2): they are averages already.

    ZeRO 0 (runtime/engine.py): `backward` reduces only where `enable_backward_allreduce` is set,
    and the optimizer reads `.grad`.
    ZeRO 1 and 2 (runtime/zero/stage_1_and_2.py): `average_tensor(bucket, dtype)` divides a bucket
    by W and reduces it in place. Nothing else in a step communicates gradients, and what follows
    only copies the bucket to where the optimizer reads it. This holds with DeepSpeed's defaults
    `contiguous_gradients` and `reduce_scatter`, and gradients of the parameters' own type.
    """
    if stage == 0:
        _replace(engine, "enable_backward_allreduce", False)
    else:
        _replace(engine.optimizer, "average_tensor", lambda bucket, dtype: None)


def gradient_slices(engine: Any, module: nn.Module, stage: int) -> list[GradientSlice]:
    """List what is reduced under ZeRO 0, 1 or 2, in the order of the model's parameters.

    ZeRO 1 and 2 lay all parameters of a group end to end and cut them into W equal partitions, so
    a parameter may have several owners. `param_to_partition_ids[group][parameter]` lists them, and
    `grad_start_offset[group][owner][parameter]` is the parameter's first element that an owner has.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if stage == 0:
        return [GradientSlice(p, 0, p.numel(), None, p.dtype) for p in trainable]
    zero, slices = engine.optimizer, dict[int, list[GradientSlice]]()
    for number, group in enumerate(_private(zero, "bit16_groups")):
        all_owners = _private(zero, "param_to_partition_ids")[number]
        all_starts = _private(zero, "grad_start_offset")[number]
        for parameter in group:
            key, dtype = _private(zero, "get_param_id")(parameter), wire_dtype(parameter)
            starts = sorted((all_starts[owner][key], owner) for owner in all_owners[key])
            ends = [start for start, _ in starts[1:]] + [parameter.numel()]
            slices[id(parameter)] = [
                GradientSlice(parameter, start, end - start, owner, dtype)
                for (start, owner), end in zip(starts, ends, strict=True)
            ]
    return [item for parameter in trainable for item in slices[id(parameter)]]


def averaged_gradients(engine: Any, module: nn.Module, stage: int) -> list[Tensor]:
    """List the averages that this rank's optimizer will read, once all gradients are reduced.

    ZeRO 0: all, in `.grad`. ZeRO 1 to 3: `averaged_gradients` has a list for each parameter group
    (runtime/zero/stage_1_and_2.py) or sub-group (runtime/zero/stage3.py), with None after a step.
    """
    if stage == 0:
        return [p.grad for p in module.parameters() if p.grad is not None]
    groups = _private(engine.optimizer, "averaged_gradients").values()
    return [gradient for group in groups if group is not None for gradient in group]


def take_over_loss_scale(engine: Any, stage: int) -> None:
    """Have DeepSpeed choose no loss scale in a float16 run.

    With `torch_autocast` in float16 it makes a GradScaler: `torch_autocast_z0_gradscaler` of the
    engine under ZeRO 0 (runtime/engine.py), `torch_autocast_gradscaler` of the optimizer under the
    others. Where there is none, ZeRO 1 to 3 take what `override_loss_scale` was given, and skip a
    step whose gradients' norm is not finite.
    """
    if stage == 0:
        _replace(engine, "torch_autocast_z0_gradscaler", None)
    else:
        _private(engine.optimizer, "override_loss_scale")
        _replace(engine.optimizer, "torch_autocast_gradscaler", None)


def wire_dtype(parameter: Tensor) -> torch.dtype:
    """Return the type in which DeepSpeed sends a parameter's gradient (ZeRO 1 to 3).

    With `torch_autocast`, `comm_dtype` marks the parameters of linear and convolutional layers
    (runtime/torch_autocast.py); all others are sent as they are.
    """
    dtype: torch.dtype = getattr(parameter, "comm_dtype", parameter.dtype)
    return dtype


# The optimizer's state, and parameters that ZeRO 3 splits. There is no way round these.


def state_fragments(engine: Any, module: nn.Module, stage: int, rank: int) -> list[Fragment]:
    """List the fragments of parameters that this rank's optimizer updates.

    At every stage the optimizer that DeepSpeed was given steps tensors that DeepSpeed put into its
    parameter groups, and keeps its state for these.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if stage == 0:
        return [Fragment(name, 0, p.numel(), p, 0) for name, p in trainable.items()]
    if stage == 3:
        return [_split_fragment(engine.optimizer, name, p, rank) for name, p in trainable.items()]
    return _flat_fragments(engine.optimizer, {id(p): name for name, p in trainable.items()})


def _flat_fragments(zero: Any, names: dict[int, str]) -> list[Fragment]:
    """List the fragments under ZeRO 1 and 2 (utils/tensor_fragment.py).

    `single_partition_of_fp32_groups` holds a flat tensor for each group. A parameter's
    `_hp_mapping` says where it meets that tensor: `lp_fragment_address` counts in the parameter,
    `hp_fragment_address` in the tensor. It is None where other ranks have all of the parameter.
    """
    flats = _private(zero, "single_partition_of_fp32_groups")
    found = []
    for group, flat in zip(_private(zero, "bit16_groups"), flats, strict=True):
        for parameter in group:
            mapping = _private(parameter, "_hp_mapping")
            if mapping is not None:
                here = _private(mapping, "lp_fragment_address")
                there = _private(mapping, "hp_fragment_address")
                name = names[id(parameter)]
                found.append(Fragment(name, here.start, here.numel, flat, there.start))
    return found


def _split_fragment(zero: Any, name: str, parameter: nn.Parameter, rank: int) -> Fragment:
    """Return a parameter's fragment under ZeRO 3 (runtime/zero/stage3.py).

    Each parameter is cut into W equal parts, the last of them padded. `grad_position` maps it to
    (index of a flat tensor, offset in that tensor, length of a part); the flat tensors are
    `fp32_partitioned_groups_flat`. `ds_shape` is the shape of the whole parameter.
    """
    key = _private(zero, "get_param_id")(parameter)
    index, offset, size = _private(zero, "grad_position")[key]
    length = max(0, min(size, _private(parameter, "ds_shape").numel() - rank * size))
    flat = _private(zero, "fp32_partitioned_groups_flat")[index]
    return Fragment(name, rank * size, length, flat, offset)


@contextlib.contextmanager
def keep_gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let no forward in the block split the parameters again that were gathered before (ZeRO 3).

    A parameter is split again when the last module in its `ds_active_sub_modules` is done
    (runtime/zero/partitioned_param_coordinator.py): we add a module that never is.
    """
    held = [_private(parameter, "ds_active_sub_modules") for parameter in parameters]
    for modules in held:
        modules.add(_OUR_MODULE)
    try:
        yield
    finally:
        for modules in held:
            modules.discard(_OUR_MODULE)


def forget_module_order(engine: Any) -> None:
    """Have ZeRO 3 record again in which order modules run; call it alike on every rank.

    A rank that runs other modules than it has recorded drops its record (`_invalidate_trace` in
    runtime/zero/partitioned_param_coordinator.py), and checks the next one with all ranks. A rank
    that ran none keeps its record, and gathers parameters ahead instead: each waits for ever for
    the other's collective.
    """
    coordinator = _private(_private(engine.optimizer, "parameter_offload"), "param_coordinator")
    if not _private(coordinator, "is_invalid_trace")():
        _private(coordinator, "_invalidate_trace")()


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return a tensor's shape; of a parameter that ZeRO 3 has split, that of the whole.

    Such a parameter is empty; its `ds_shape` is that of the whole
    (runtime/zero/partition_parameters.py).
    """
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


# Convenience. Where these fail, a run is slower to start, or its log says more.


def time_collectives(comm: Any) -> None:
    """Have the step timer see the collectives of `deepspeed.comm`; call it as often as you like.

    DeepSpeed looks its collectives up in that module at every call (`dist.all_reduce`).
    """
    for name in _COLLECTIVES:
        if hasattr(comm, name):
            setattr(comm, name, timed(getattr(comm, name)))


def skip_shared_memory_operator() -> None:
    """Keep DeepSpeed from building an operator at its first collective on a CPU.

    The operator serves inference only, and its build needs a compiler, ninja and half a minute.
    `comm/torch.py` builds it where `deepspeed.ops.__compatible_ops__` says that it can be built.
    """
    with contextlib.suppress(ImportError, TypeError):  # then it is built: slower, not wrong
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False


def quiet_log() -> None:
    """Leave DeepSpeed's logger its warnings, but for one at optimizers that it has not tested.

    The logger's name is "DeepSpeed", and that warning has the words "untested optimizer".
    """
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_news)


def quiet_warnings() -> None:
    """Ignore warnings at DeepSpeed's doing that a user can do nothing about."""
    # It still calls collectives that PyTorch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated")
    # A GRU's weights lie in its flat buffers, and not as cuDNN would have them; every rank said so.
    warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()
