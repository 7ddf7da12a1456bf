"""The tokenizer and the model that a run's folder holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.config import LoraConfig, TrainConfig
from dist_vse.data.eval_stream import captions
from dist_vse.data.streams import open_train_sets
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.lora import add_adapters, base_digest, remove_adapters
from dist_vse.models.positions import fit_positions
from dist_vse.models.pretrained import pretrained_tokenizer
from dist_vse.models.tokenizer import Tokenizer, WordTokenizer, build_tokenizer
from dist_vse.runs import checkpoint
from dist_vse.runs.files import CHECKPOINTS, VOCABULARY_NAME
from dist_vse.runs.folder import find_run, open_run

MAX_STARTS = 32
"""Runs of adapters, each the start of the next."""


@dataclass(frozen=True)
class Trained:
    """A run with the weights of one of its checkpoints."""

    run_dir: Path
    config: TrainConfig
    tokenizer: Tokenizer
    model: DualEncoder
    checkpoint: Path


def open_trained(location: Path) -> Trained:
    """Open a run's newest checkpoint, or the one that `location` is.

    Raises UserError if there is no such checkpoint, or if it doesn't fit the model.
    """
    run_dir, asked = find_run(location)
    config = open_run(run_dir)
    tokenizer = run_tokenizer(config, run_dir, build=False)
    model = build_for_checkpoint(config, tokenizer)
    return Trained(run_dir, config, tokenizer, model, load_trained(run_dir, model, asked))


def build_for_checkpoint(config: TrainConfig, tokenizer: Tokenizer) -> DualEncoder:
    """Build a run's model, whose weights a checkpoint is to replace.

    A checkpoint of adapters needs the start of the run below them. Raises UserError as
    `build_start` does.
    """
    if config.model.lora.rank:
        return build_start(config, tokenizer, trains=False)
    return build_model(config.model, config.loss, tokenizer, seed=config.seed, trains=False)


def build_start(config: TrainConfig, tokenizer: Tokenizer, *, trains: bool = True) -> DualEncoder:
    """Build a run's model as it is before the first step, with the weights of `model.from_run`.

    A temperature goes on where both runs learn it for the same loss, a bias where the loss is the
    same; else they are the config's. Positions are resampled to the config's sizes. Raises
    UserError if the weights can't be read or don't fit.
    """
    whole = replace(config.model, lora=LoraConfig())
    model = build_model(whole, config.loss, tokenizer, seed=config.seed, trains=trains)
    if config.model.from_run is not None:
        _take_weights(model, Path(config.model.from_run), config)
    if config.model.lora.rank:
        add_adapters(model, config.model, seed=config.seed)
        model.base_digest = base_digest(model)
    return model


def _take_weights(model: DualEncoder, path: Path, config: TrainConfig) -> None:
    """Load the checkpoint of `model.from_run`, its adapters merged."""
    _check_chain(path)
    before, loss = open_run(find_run(path)[0]), config.loss
    own = {"log_scale": model.log_scale.detach().clone(), "bias": model.bias.detach().clone()}
    same = before.loss.name == loss.name
    if same:
        del own["bias"]
    if same and before.loss.learn_temperature and loss.learn_temperature:
        del own["log_scale"]
    if before.model.lora.rank:
        former = open_trained(path).model
        remove_adapters(former, merge=True)
        weights = fit_positions(former.state_dict(), model)
        checkpoint.check_fit(weights, model, path)
        model.load_state_dict(weights)
    else:
        checkpoint.check_whole(path)
        checkpoint.load_weights(path, model, fit=fit_positions)
    model.load_state_dict(own, strict=False)


def _check_chain(path: Path) -> None:
    """Raise UserError for runs of adapters that start from each other, or from too many others."""
    first, passed = path, set[Path]()
    while True:
        run_dir = find_run(path)[0].resolve()
        if run_dir in passed or len(passed) == MAX_STARTS:
            raise UserError(
                f"model.from_run={first}: its run starts from other runs of adapters (model.lora) "
                f"without an end ({run_dir}); export one with `dist-vse export --merge`"
            )
        passed.add(run_dir)
        model = open_run(run_dir).model
        if not model.lora.rank or model.from_run is None:
            return
        path = Path(model.from_run)


def run_tokenizer(config: TrainConfig, run_dir: Path, *, build: bool) -> Tokenizer:
    """Return the run's tokenizer; `build` makes the vocabulary where there is none yet.

    The vocabulary comes from the training splits alone, so that evaluation can't leak into it.
    """
    if config.model.pretrained is not None:
        return pretrained_tokenizer(config.model.pretrained, config.model.text.asked_tokens)
    path = run_dir / VOCABULARY_NAME
    if build and not path.is_file() and config.model.from_run is not None:
        former = find_run(Path(config.model.from_run))[0] / VOCABULARY_NAME
        if former.is_file():
            of_run = WordTokenizer.load(former)
            words, max_tokens = of_run.vocabulary or [], config.model.text.max_tokens
            WordTokenizer(words, max_tokens, of_run.rule).save(path)
    if path.is_file():
        return WordTokenizer.load(path)
    if not config.model.text.spec.tokenizer and not build:
        raise UserError(f"{path}: the run's vocabulary is missing; train the run first")

    def train_captions() -> Iterator[str]:
        for a_set in open_train_sets(config.data):
            # A word of negatives alone would else be <unk>, which tells them from captions.
            yield from captions(a_set.index, a_set.split, negatives=config.data.negatives > 0)

    tokenizer = build_tokenizer(config.model.text, train_captions, None)
    if isinstance(tokenizer, WordTokenizer):
        tokenizer.save(path)
    return tokenizer


def load_trained(run_dir: Path, model: DualEncoder, asked: Path | None = None) -> Path:
    """Load the newest checkpoint's weights into the model, or those asked for; return its folder.

    Raises UserError if there is no such checkpoint, or if it doesn't fit the model.
    """
    if asked is not None:
        checkpoint.check_whole(asked)
    path = asked or checkpoint.latest(run_dir / CHECKPOINTS)
    if path is None:
        raise UserError(f"{run_dir / CHECKPOINTS}: no whole checkpoint yet; train the run first")
    checkpoint.load_weights(path, model)
    return path
