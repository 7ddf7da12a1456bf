"""The run's folder: its config, its vocabulary, and the model that it holds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_text
from dist_vse.common.log import logger
from dist_vse.config import TrainConfig, dump_config, flat_config, load_config
from dist_vse.config.checks import AUTO
from dist_vse.config.sections import LEAST_LEARNED
from dist_vse.data.eval_stream import captions
from dist_vse.data.index import read_index
from dist_vse.data.streams import TrainSet
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.pretrained import pretrained_tokenizer, read_start
from dist_vse.models.tokenizer import Tokenizer, WordTokenizer, build_tokenizer
from dist_vse.runs import checkpoint
from dist_vse.runs.files import CHECKPOINTS, CONFIG_NAME, METRICS_NAME, VOCABULARY_NAME

_MAY_CHANGE = (
    "total_steps",
    "log_every",
    "trackers",
    "project",
    "eval_every",
    "checkpoint_every",
    "checkpoint_samples",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best",
    "profile",
    "engine.zero_stage",
    "engine.coalesce",
    "data.num_workers",
    "data.max_bad",
    "cache.keep_graphs",
    "cache.memory_gib",
)
"""Settings of a run that a later attempt may change without changing what was learned so far."""


def prepare_run_dir(config: TrainConfig) -> Path:
    """Make the run's folder and write the config into it; rank 0 calls this.

    Raises UserError if the folder holds a run of another config.
    """
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CONFIG_NAME
    if not (run_dir / METRICS_NAME).is_file():  # nothing was trained yet
        (run_dir / VOCABULARY_NAME).unlink(missing_ok=True)
    elif path.is_file():
        old = load_config(path)
        if config.chunk_size == AUTO:  # tried at the run's start
            config = replace(config, chunk_size=old.chunk_size)
        changed = _differences(old, config)
        if changed:
            raise UserError(
                f"{run_dir} holds a run of another config ({'; '.join(changed)}): give another "
                "output_dir, or remove that folder"
            )
    write_config(config)
    return run_dir


def write_config(config: TrainConfig) -> None:
    """Write the config into the run's folder; rank 0 calls this."""
    write_text(Path(config.output_dir) / CONFIG_NAME, dump_config(config))


def _differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Say what differs, as `loss.name: convse -> convse++`."""
    before, after = flat_config(old), flat_config(new)
    ignored = {*_MAY_CHANGE, "output_dir"}  # the folder itself may have been moved
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if key not in ignored and before[key] != after[key]
    ]


def open_train_sets(config: TrainConfig) -> list[TrainSet]:
    """Read the indexes of the data sets to train on.

    Raises UserError for a missing one, or one without the split.
    """
    sets = [TrainSet(read_index(s.index), s.split, s.weight) for s in config.data.train_sets()]
    for a_set in sets:
        a_set.index.split(a_set.split)
    return sets


def with_start(config: TrainConfig) -> TrainConfig:
    """Fill in what the checkpoint of `model.pretrained` decides, where there is one.

    Raises UserError if it cannot be read.
    """
    if config.model.pretrained is None:
        return config
    start = read_start(config.model.pretrained)
    temperature = start.temperature
    if config.loss.learn_temperature:
        temperature = max(LEAST_LEARNED, temperature)
    bias = config.loss.bias if start.bias is None else start.bias
    logger.info(
        "%s: %s, %d pixels, %d tokens, %d dimensions, temperature %.4g",
        *(config.model.pretrained, start.kind, start.image_size),
        *(start.max_tokens, start.embed_dim, temperature),
    )
    image = replace(
        config.model.image,
        size=start.image_size,
        squash=start.squash,
        resampling=start.resampling,
    )
    text = replace(config.model.text, max_tokens=start.max_tokens)
    model = replace(config.model, image=image, text=text, embed_dim=start.embed_dim)
    loss = replace(config.loss, temperature=temperature, bias=bias)
    return replace(config, model=model, loss=loss)


def run_tokenizer(config: TrainConfig, run_dir: Path, *, build: bool) -> Tokenizer:
    """Return the run's tokenizer; `build` makes the vocabulary where there is none yet.

    The vocabulary comes from the training splits alone, so that evaluation can't leak into it.
    """
    if config.model.pretrained is not None:
        return pretrained_tokenizer(config.model.pretrained)
    path = run_dir / VOCABULARY_NAME
    if path.is_file():
        return WordTokenizer.load(path)
    if config.model.text.kind != "pretrained" and not build:
        raise UserError(f"{path}: the run's vocabulary is missing; train the run first")

    def train_captions() -> Iterator[str]:
        for a_set in open_train_sets(config):
            yield from captions(a_set.index, a_set.split)

    tokenizer = build_tokenizer(config.model.text, train_captions, None)
    if isinstance(tokenizer, WordTokenizer):
        tokenizer.save(path)
    return tokenizer


def run_model(config: TrainConfig, tokenizer: Tokenizer) -> DualEncoder:
    """Build the run's model with its initial weights."""
    return build_model(
        config.model,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        temperature=config.loss.temperature,
        learn_temperature=config.loss.learn_temperature,
        bias=config.loss.bias,
        learn_bias=config.loss.name == "siglip",
        seed=config.seed,
    )


def open_run(run_dir: Path) -> TrainConfig:
    """Return the config of a run's folder. Raises UserError if it isn't one."""
    if not (run_dir / CONFIG_NAME).is_file():
        raise UserError(f"{run_dir}: no run here ({CONFIG_NAME} is missing)")
    return load_config(run_dir / CONFIG_NAME)


def find_run(location: Path) -> tuple[Path, Path | None]:
    """Return a run's folder, and the checkpoint where `location` is one of its checkpoints."""
    if location.resolve().parent.name == CHECKPOINTS:
        return location.resolve().parent.parent, location
    return location, None


def load_trained(run_dir: Path, model: DualEncoder, asked: Path | None = None) -> Path:
    """Load the newest checkpoint's weights into the model, or those asked for; return its folder.

    Raises UserError if there is no such checkpoint, or if it doesn't fit the model.
    """
    path = asked or checkpoint.latest(run_dir / CHECKPOINTS)
    if path is None:
        raise UserError(f"{run_dir / CHECKPOINTS}: no whole checkpoint yet; train the run first")
    checkpoint.load_weights(path, model)
    return path
