"""A configuration that came with the launcher, and where it contradicts the run's own.

`accelerate launch` hands its user's settings on in the environment, and DeepSpeed's JSON by its
path. The run's config alone counts; what differs is reported, never merged in silence.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import read_json

_AUTO = "auto"
_FIELDS = {  # accelerate's name of a field, its variable, DeepSpeed's name
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_optimization.stage"),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping"),
    "gradient_accumulation_steps": (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_accumulation_steps",
    ),
    "offload_optimizer_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "zero_optimization.offload_optimizer.device",
    ),
    "offload_param_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "zero_optimization.offload_param.device",
    ),
    "zero3_init_flag": ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag"),
    "zero3_save_16bit_model": (
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ),
}
_INSTEAD = {
    "zero_optimization.stage": "engine.zero_stage",
    "gradient_clipping": "optim.clip_norm",
    "gradient_accumulation_steps": "chunk_size",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "chunk_size",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.betas": "optim.beta1 and optim.beta2",
    "optimizer.params.momentum": "optim.momentum",
    "scheduler.type": "optim.schedule",
}
_CHANGES_NO_NUMBER = (  # DeepSpeed's own log, and how it cuts its messages
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.allgather_partitions",
    "zero_optimization.reduce_scatter",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
)


def conflicts(
    environment: Mapping[str, str], ours: Mapping[str, Any], *, fsdp2: bool = False
) -> list[str]:
    """Say, a line each, what the launcher asks for and the run does otherwise.

    `ours` describes the run as a DeepSpeed configuration would; "auto" in it is not known yet.
    `fsdp2` says that the run has FSDP2 and not DeepSpeed.
    Raises UserError if the launcher's file can't be read.
    """
    known = _flat(ours)
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(known.get("torch_autocast.dtype", ""))
    known |= {f"{name}.enabled": name == half for name in ("bf16", "fp16")}
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return _of_accelerate(environment, precision, half, fsdp2=fsdp2)
    asked = _asked(environment)
    if precision in ("bf16", "fp16"):
        asked[f"{precision}.enabled"] = True
    if _number(asked.get("gradient_accumulation_steps")) == 1:
        del asked["gradient_accumulation_steps"]  # in every file of `accelerate config`, no wish
    differences = []
    for name, value in sorted(asked.items()):
        used = known.get(name)
        if name in _CHANGES_NO_NUMBER or _same(value, used):
            continue
        does = "does without" if used is None else f"has {_plain(used)}"
        where = f"; set {_INSTEAD[name]} in its config" if name in _INSTEAD else ""
        differences.append(
            f"the launcher asks DeepSpeed for {name}={_plain(value)}, the run {does}{where}"
        )
    return differences + _of_accelerate(environment, "no", None, fsdp2=fsdp2)


def _of_accelerate(
    environment: Mapping[str, str], precision: str, half: str | None, *, fsdp2: bool
) -> list[str]:
    """Say what accelerate was asked for that it does by itself, without DeepSpeed."""
    engine = "PyTorch's FSDP2" if fsdp2 else "DeepSpeed's ZeRO"
    asked = {
        f"mixed precision {precision}": (
            precision not in ("no", half),
            f"has {half or 'fp32'}; set engine.precision in its config",
        ),
        "FSDP": (
            environment.get("ACCELERATE_USE_FSDP") == "true" and not fsdp2,
            f"has {engine}; set engine.name in its config",
        ),
        "Megatron-LM": (
            environment.get("ACCELERATE_USE_MEGATRON_LM") == "true",
            f"has {engine}; set engine.zero_stage in its config",
        ),
        f"dynamo backend {environment.get('ACCELERATE_DYNAMO_BACKEND', '').lower()}": (
            environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
            "does without; set model.compile in its config",
        ),
    }
    return [
        f"the launcher asks for {name}, the run {does}"
        for name, (differs, does) in asked.items()
        if differs
    ]


def _same(value: Any, used: Any) -> bool:
    """Return whether a value asks for nothing, or for what the run does anyway."""
    if value in (_AUTO, None, False, "none", "None", "false") and used in (None, False):
        return True
    if _AUTO in (value, used) or str(value).lower() == str(used).lower():
        return True
    return used is not None and _number(value) is not None and _number(value) == _number(used)


def _asked(environment: Mapping[str, str]) -> dict[str, Any]:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() != "none":
        try:
            return _flat(read_json(Path(path)))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the launcher's DeepSpeed config: {error}") from error
    given = environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    return {
        name: environment[variable]
        for field, (variable, name) in _FIELDS.items()
        if field in given and variable in environment
    }


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: list(node) if isinstance(node, tuple) else node}
    if node.get("enabled", True) in (False, _AUTO):  # what else it says is about nothing
        node = {"enabled": node["enabled"]}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in node.items())
    return {name: value for part in parts for name, value in part.items()}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
