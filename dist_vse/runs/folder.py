"""A run's folder: finding it, and the config in it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.errors import UserError, unknown_name
from dist_vse.common.files import write_text
from dist_vse.common.log import logger
from dist_vse.config import TrainConfig, dump_config, flat_config, load_config
from dist_vse.runs.files import CHECKPOINTS, CONFIG_NAME, METRICS_NAME, VOCABULARY_NAME

_MAY_CHANGE = (
    "total_steps",
    "total_samples",
    "epochs",
    "log_every",
    "trackers",
    "project",
    "eval_every",
    "checkpoint_every",
    "checkpoint_samples",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best",
    "eval_sets",
    "eval_loss",
    "best_metric",
    "patience",
    "profile",
    "batch_report",
    "engine.name",
    "engine.zero_stage",
    "engine.coalesce",
    "data.num_workers",
    "data.max_bad",
    "data.allow_pipe",
    "resume.allow",
    "resume.verify_shards",
    "cache.keep_graphs",
    "cache.memory_gib",
    "loss.kernels",
)
"""Settings of a run that a later attempt may change without changing what was learned so far."""


def prepare_run_dir(config: TrainConfig) -> Path:
    """Make the run's folder and write the resolved config into it; rank 0 calls this.

    Raises UserError if the folder holds a run of another config.
    """
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / METRICS_NAME).is_file():  # nothing was trained yet
        (run_dir / VOCABULARY_NAME).unlink(missing_ok=True)
    earlier = find_earlier_start(run_dir)
    changed = _differences(earlier, config) if earlier is not None else {}
    _check_allow(config)
    refused = [key for key in changed if not _is_allowed(key, config.resume.allow)]
    if refused:
        differences = "; ".join(changed[key] for key in refused)
        raise UserError(
            f"{run_dir} holds a run of another config ({differences}): "
            f"give another output_dir, or continue it with resume.allow=[{','.join(refused)}]"
        )
    for text in changed.values():
        logger.warning("%s goes on with %s", run_dir, text)
    if earlier is not None:
        _tell_new_end(earlier, config)
    write_config(config)
    return run_dir


def _check_allow(config: TrainConfig) -> None:
    """Raise UserError for a name in `resume.allow` that is no setting and no section."""
    keys = [*flat_config(config), "data", "vocabulary"]
    for name in config.resume.allow:
        if not any(_is_allowed(key, [name]) for key in keys):
            raise unknown_name("resume.allow", name, keys)


def _is_allowed(key: str, allow: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def _tell_new_end(earlier: TrainConfig, config: TrainConfig) -> None:
    """Warn where another end of the run moves what runs towards it."""
    before, now = earlier.total_steps, config.total_steps
    moved = ["learning rate"] if config.optim.schedule != "constant" else []
    moved += ["temperature"] if config.loss.temperature_end is not None else []
    if before != now and moved:
        logger.warning(
            "total_steps: %d -> %d: the %s now runs to the new end, and jumps where the run goes "
            "on (optim.schedule=%s)",
            *(before, now, " and the ".join(moved), config.optim.schedule),
        )


def find_earlier_start(run_dir: Path) -> TrainConfig | None:
    """Return the config of a start that has trained; None where there is none."""
    path = run_dir / CONFIG_NAME
    if not path.is_file() or not (run_dir / METRICS_NAME).is_file():
        return None
    return load_config(path)


@distributed.main_process_only
def write_config(config: TrainConfig) -> None:
    """Write the config into the run's folder; every rank may call it, rank 0 writes."""
    write_text(Path(config.output_dir) / CONFIG_NAME, dump_config(config))


def _differences(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """Say by its key what differs, as `loss.name: convse -> convse++`."""
    before, after = flat_config(old), flat_config(new)
    # Both folders may have been moved; the data's fingerprint is compared when the run goes on.
    ignored = {*_MAY_CHANGE, "output_dir", "data.index"}
    return {
        key: f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**after, **before}  # those of optim.options differ
        if key not in ignored and before.get(key) != after.get(key)
    }


def open_run(run_dir: Path) -> TrainConfig:
    """Return the config of a run's folder. Raises UserError if it isn't one.

    Somebody else may have made the folder: its consent to run commands is not the user's.
    """
    if not (run_dir / CONFIG_NAME).is_file():
        raise UserError(f"{run_dir}: no run here ({CONFIG_NAME} is missing)")
    config = load_config(run_dir / CONFIG_NAME)
    return replace(config, data=replace(config.data, allow_pipe=False))


def find_run(location: Path) -> tuple[Path, Path | None]:
    """Return a run's folder, and the checkpoint where `location` is one of its checkpoints."""
    if location.resolve().parent.name == CHECKPOINTS:
        return location.resolve().parent.parent, location
    return location, None
