"""The memory that a rank needs for a step, predicted for whoever asks whether a config fits."""

from dataclasses import dataclass

from dist_vse.config import TrainConfig
from dist_vse.tools.plan.count import count_work
from dist_vse.tools.plan.memory import Place, fullest, moments
from dist_vse.tools.plan.settings import settings_of
from dist_vse.tools.plan.work import FP32


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a rank."""

    states: float
    """Of weights, gradients and optimizer states, without the engine's buffers."""
    peak: float
    """At the fullest moment of a step, with the activations of a chunk if these are known."""


def step_memory(
    config: TrainConfig,
    world_size: int,
    *,
    parameters: tuple[int, int],
    vocabulary: int,
    on_cpu: bool,
) -> StepMemory:
    """Predict the memory of each of `world_size` ranks.

    `parameters` are the model's and those of them that learn. Activations are unknown for the
    model of a checkpoint (`model.pretrained`): its peak is `states`. Raises UserError for a world
    size that the config can't have.
    """
    config.check_world_size(world_size, on_gpu=not on_cpu)
    states = _states(config, world_size, *parameters)
    if config.model.pretrained is not None:
        return StepMemory(states, states)
    settings = settings_of(
        config, global_batch=config.global_batch_size, world_size=world_size, on_cpu=on_cpu
    )
    if config.asked_chunk_size(on_gpu=not on_cpu) is None:  # the smallest that may be chosen
        settings = settings.changed(chunk_size=1)
    work = count_work(config, vocabulary=vocabulary)
    peak = fullest(moments(work, settings, Place(on_cpu=on_cpu))).total
    return StepMemory(states, max(states, peak))


def _states(config: TrainConfig, world_size: int, whole: int, trained: int) -> float:
    weights, gradients, optimizer = (
        world_size if config.engine.zero_stage >= stage else 1 for stage in (3, 2, 1)
    )
    kept = 1 + config.state_tensors  # with a copy of the weights
    return FP32 * (whole / weights + trained / gradients + trained * kept / optimizer)
