"""A DeepSpeed configuration that came with the launcher, and where it contradicts the run's own.

`accelerate launch` hands its user's settings on in the environment, and DeepSpeed's JSON by its
path. The run's config alone counts; what differs is told, never merged in silence.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_vse.errors import UserError

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
}
_INSTEAD = {
    "zero_optimization.stage": "engine.zero_stage",
    "gradient_clipping": "optim.clip_norm",
    "gradient_accumulation_steps": "chunk_size",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "chunk_size",
}


def conflicts(environment: Mapping[str, str], ours: Mapping[str, Any]) -> list[str]:
    """Say, a line each, what the launcher asks for and the run does otherwise.

    `ours` is DeepSpeed's configuration as the run builds it. Raises UserError if the launcher's
    file can't be read.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return []
    asked = _asked(environment)
    known = _flat(ours)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16"):
        asked[f"{precision}.enabled"] = True
    known |= {"bf16.enabled": bool(ours.get("torch_autocast")), "fp16.enabled": False}
    told = []
    for name, value in sorted(asked.items()):
        used = known.get(name)
        if value == _AUTO or str(value).lower() in ("none", str(used).lower()):
            continue
        if used is not None and _number(value) is not None and _number(value) == _number(used):
            continue
        does = "does without" if used is None else f"has {_plain(used)}"
        where = f"; set {_INSTEAD[name]} in its config" if name in _INSTEAD else ""
        told.append(
            f"the launcher asks DeepSpeed for {name}={_plain(value)}, the run {does}{where}"
        )
    return told


def _asked(environment: Mapping[str, str]) -> dict[str, Any]:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() != "none":
        try:
            return _flat(json.loads(Path(path).read_text(encoding="utf-8")))
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
        return {prefix: node}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in node.items())
    return {name: value for part in parts for name, value in part.items()}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
