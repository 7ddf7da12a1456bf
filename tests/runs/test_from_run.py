"""A run that starts from another run's weights: what it takes, and what is its own."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig, dump_config, load_config
from dist_vse.models.build import build_model
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.resolve import resolve
from dist_vse.runs.trained import build_start, load_trained, open_trained
from dist_vse.tools.report.page import write_report
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, read_lines, run, settings

MODEL = ("model.embed_dim=16", "model.image.name=test_vit", "model.image.size=32")
TEXT = ("model.text.width=64", "model.text.depth=1", "model.text.max_tokens=8")


class _Words:
    vocab_size, pad_id, vocabulary = 30, 0, None


def _write_run(folder: Path, *overrides: str) -> TrainConfig:
    """Write a run's config and one checkpoint of random weights."""
    config = load_config(None, [*MODEL, *TEXT, "seed=7", *overrides])
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    weights = build_model(config.model, config.loss, _Words(), seed=7).state_dict()
    weights["log_scale"] += 1
    weights["bias"] += 1
    path = folder / "checkpoints" / "step-000003"
    files = {"model.safetensors": weights, "rank-0.safetensors": {"x": torch.zeros(1)}}
    digests = checkpoint.write_files(path, files)
    more = {"world_size": 1, "zero_stage": 0, "score": None}
    checkpoint.write_manifest(path, Progress(3, 96, [[0, 0]]), digests, **more)
    return config


@pytest.mark.parametrize(
    ("before", "after", "scale_goes_on", "bias_goes_on"),
    [
        ("siglip true", "siglip true", True, True),
        ("siglip true", "siglip false", False, True),
        ("siglip true", "info_nce true", False, False),
    ],
)
def test_a_run_takes_the_weights_and_what_they_fit(
    tmp_path: Path, before: str, after: str, scale_goes_on: bool, bias_goes_on: bool
) -> None:
    name, learned = before.split()
    former = _write_run(tmp_path / "a", f"loss.name={name}", f"loss.learn_temperature={learned}")
    name, learned = after.split()
    own = [f"loss.name={name}", f"loss.learn_temperature={learned}", "model.image.frozen=true"]
    sizes = ["model.image.size=32", "model.text.max_tokens=8"]
    start = [f"model.from_run={tmp_path / 'a'}", f"output_dir={tmp_path / 'b'}"]
    config = resolve(load_config(None, [*start, *own, *sizes]))
    assert config.model.from_run == str(tmp_path / "a" / "checkpoints" / "step-000003")
    kept = replace(config.model, from_run=None, image=former.model.image)
    assert kept == former.model and config.model.image.frozen
    model = build_start(config, _Words()).state_dict()  # type: ignore[arg-type]
    saved = load_file(tmp_path / "a" / "checkpoints" / "step-000003" / "model.safetensors")
    unequal = {key for key in saved if not torch.equal(saved[key], model[key])}
    expected = {"log_scale": scale_goes_on, "bias": bias_goes_on}
    assert unequal == {key for key, goes_on in expected.items() if not goes_on}


def test_what_contradicts_the_run_is_named(tmp_path: Path) -> None:
    _write_run(tmp_path / "a")
    start = f"model.from_run={tmp_path / 'a'}"
    for wrong, said in (("model.embed_dim=64", "16"), ("model.text.kind=gru", "transformer")):
        key, value = wrong.split("=")
        with pytest.raises(UserError, match=rf"{key} \({value}\) is {said} in the run"):
            resolve(load_config(None, [start, wrong]))
    with pytest.raises(UserError, match="no run here"):
        resolve(load_config(None, [f"model.from_run={tmp_path / 'none'}"]))


def test_a_named_checkpoint_must_be_whole(tmp_path: Path) -> None:
    config = _write_run(tmp_path / "a")
    step = tmp_path / "a" / "checkpoints" / "step-000003"
    model = build_model(config.model, config.loss, _Words(), seed=0)
    assert load_trained(tmp_path / "a", model, step) == step
    weights = bytearray((step / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (step / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was written"):
        load_trained(tmp_path / "a", model, step)
    start = load_config(None, [f"model.from_run={step}", *MODEL, *TEXT])
    with pytest.raises(UserError, match="has changed since it was written; name another"):
        build_start(start, _Words())  # type: ignore[arg-type]


def test_reading_a_run_imports_no_loss_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_run(tmp_path / "a", "model.text.kind=gru")
    WordTokenizer([f"w{n}" for n in range(26)], 8).save(tmp_path / "a" / "vocabulary.json")
    path = tmp_path / "a" / "config.yaml"
    path.write_text(path.read_text().replace("name: convse\n", "name: evil:LOSS\n"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\nLOSS = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trained = open_trained(tmp_path / "a")
    assert trained.config.loss.name == "evil:LOSS" and not (tmp_path / "PWNED").exists()
    with pytest.raises(UserError, match="is a int, not a LossSpec"):
        build_start(trained.config, trained.tokenizer)  # a training imports it


def test_runs_of_adapters_that_start_from_each_other_are_one_line(tmp_path: Path) -> None:
    adapters = ["model.lora.rank=2", f"model.from_run={tmp_path / 'a'}"]
    config = load_config(None, [*MODEL, *TEXT, *adapters])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match=r"starts from other runs of adapters .* without an end"):
        build_start(config, _Words())  # type: ignore[arg-type]


def _two_runs(first: list[str], second: list[str]) -> list[int | str]:
    return [run(first), run(second)]


@pytest.mark.slow
def test_a_run_begins_where_the_other_ended_and_outlives_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 64, "val": 16}, captions=2)
    a, b = tmp_path / "a", tmp_path / "b"
    own = ["loss.name=info_nce", "global_batch_size=16", "optim.name=sgd", "optim.lr=0.01"]
    own += ["model.image.frozen=true", "total_steps=2", f"model.from_run={a}"]
    second = settings(tmp_path / "shards", b, *own)
    first = settings(tmp_path / "shards", a, "total_steps=3")
    assert run_distributed(_two_runs, 1, first, second) == [[0, 0]]
    before, after = ([line for line in read_lines(d) if line["kind"] == "eval"] for d in (a, b))
    assert {k: v for k, v in before[-1].items() if k.startswith(("i2t", "t2i"))} == {
        k: v for k, v in after[0].items() if k.startswith(("i2t", "t2i"))
    }
    assert (a / "vocabulary.json").read_bytes() == (b / "vocabulary.json").read_bytes()
    shutil.rmtree(a)
    again = resolve(load_config(CONFIG, second))
    assert again.model == load_config(b / "config.yaml").model
    page = write_report(b, None, tmp_path / "page.html").read_text()
    assert "a/checkpoints/step-000003" in page
