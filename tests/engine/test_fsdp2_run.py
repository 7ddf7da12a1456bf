"""Whole runs with FSDP2, from the config to a search: each equals the run of one process."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_vse import cli, distributed, load
from dist_vse.config import load_config
from dist_vse.runs import checkpoint
from dist_vse.runs.trained import Trained, build_start, open_trained
from dist_vse.tools.export.write import export_run
from dist_vse.tools.verify.checks import Result, check, describe
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import read_lines, run, settings
from tests.support.tiny import tiny_batch
from tests.support.tiny_clip import write_hf

W = 4
EVERY = [
    "global_batch_size=32",
    "log_every=1",
    "eval_every=1",
    "eval_loss=true",
    "data.crop=center",
]
TEXT = ["model.text.kind=transformer"]
SGD = ["optim.name=sgd", "optim.momentum=0.9", "optim.clip_norm=0.5"]
OWN = [
    *TEXT, *SGD, "loss.name=convse++", "loss.transport=ring", "chunk_size=2", "ema.samples=64",
    "cache.keep_graphs=3", "model.grad_checkpointing=true", "loss.widths=[8]", "optim.lr=0.5",
    "loss.ignore_above=0.05", "optim.layer_decay=0.5", "total_steps=4",
]  # fmt: skip
ADAPTERS = [
    *TEXT, *SGD, "loss.name=siglip", "chunk_size=4", "model.lora.rank=4", "ema.samples=64",
    "model.image.name=resnet18", "model.image.size=224", "model.text.max_tokens=32",
    "model.embed_dim=256", "optim.lr=0.5", "total_steps=2",
]  # fmt: skip
FURTHER = [
    *TEXT, "loss.name=info_nce", "chunk_size=4", "model.image.frozen=true", "optim.lr=1e-2",
    "optim.options={eps: 1.0e-3}", "loss.learn_temperature=true", "engine.coalesce=false",
    "total_steps=2",
]  # fmt: skip
RUNS = {"own": OWN, "adapters": ADAPTERS, "further": FURTHER}
LAST = {"own": 4, "adapters": 2, "further": 2, "changing": 4}
STAGES = {"own": 3, "adapters": 3, "further": 2}
FSDP2 = "engine.name=fsdp2"
VERIFIED = [
    ["engine.zero_stage=3", "loss.name=convse++", "loss.transport=ring", "optim.clip_norm=2"],
    ["engine.zero_stage=2", "engine.precision=fp16", "model.grad_checkpointing=true"],
]


def _overrides(folder: Path, run_dir: Path, name: str, *more: str) -> list[str]:
    own = [*EVERY, *RUNS[name], *more]
    if name == "adapters":
        own.append(f"model.pretrained={folder / 'clip'}")
    if name == "further":
        own.append(f"model.from_run={run_dir.parent / 'own'}")
    return settings(folder / "shards", run_dir, *own)


def _train_alone(folder: Path) -> list[int | str]:
    """Train the runs, and the first step of the one whose engine changes."""
    codes = [run(_overrides(folder, folder / "alone" / name, name)) for name in RUNS]
    first = _overrides(folder, folder / "ranks" / "changing", "own", "total_steps=1")
    return [*codes, run(first)]


def _train_together(folder: Path) -> tuple[list[int | str], list[Result]]:
    codes = []
    for name, stage in STAGES.items():
        more = [FSDP2, f"engine.zero_stage={stage}"]
        codes.append(run(_overrides(folder, folder / "ranks" / name, name, *more)))
    for more in ([FSDP2, "engine.zero_stage=3", "total_steps=3"], ["engine.zero_stage=3"]):
        codes.append(run(_overrides(folder, folder / "ranks" / "changing", "own", *more)))
    assert distributed.world_size() == W
    return codes, [check(load_config(None, [FSDP2, *case])) for case in VERIFIED]


def _start(trained: Trained) -> dict[str, Tensor]:
    start = build_start(trained.config, trained.tokenizer)
    return {name: p.detach() for name, p in start.named_parameters() if p.requires_grad}


def _error(
    found: Mapping[str, Tensor], right: Mapping[str, Tensor], start: dict[str, Tensor]
) -> float:
    """Return |difference| / |movement| of what learns."""
    a, b, c = (
        torch.cat([x[name].detach().flatten() for name in start]) for x in (found, right, start)
    )
    assert (b - c).norm() > 1e-3
    return float((a - b).norm() / (b - c).norm())


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_runs_on_four_ranks_equal_those_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of two images in the split, two of four ranks evaluate none.
    write_dataset(tmp_path / "shards", {"train": 64, "val": 2}, captions=2)
    write_hf(tmp_path / "clip", "clip")
    assert run_distributed(_train_alone, 1, tmp_path, timeout=200) == [[0] * 4]
    for codes, results in run_distributed(_train_together, W, tmp_path, timeout=200):
        assert codes == [0] * 5
        for result in results:
            assert result.code == 0, describe(result)
    for name in (*RUNS, "changing"):
        of_one = tmp_path / "alone" / name.replace("changing", "own")
        _same_metrics(tmp_path / "ranks" / name, of_one)
        found, right = (open_trained(r) for r in (tmp_path / "ranks" / name, of_one))
        start = _start(right)
        averages = (dict(each.model.named_parameters()) for each in (found, right))
        assert _error(*averages, start) < 1e-4, name
        weights = (load_file(each.checkpoint / checkpoint.WEIGHTS) for each in (found, right))
        assert _error(*weights, start) < 1e-4, name
        assert found.checkpoint.name == f"step-{LAST[name]:06d}"
    assert checkpoint.read_manifest(found.checkpoint)["zero_stage"] == 3
    for name in RUNS:
        _serves(tmp_path / "ranks" / name, tmp_path / "exported" / name, capsys)


def _same_metrics(run_dir: Path, of_one: Path) -> None:
    """Compare what training and evaluations logged, but for times and sampled statistics."""
    found, right = read_lines(run_dir), read_lines(of_one)
    assert [(x["kind"], x["step"]) for x in found] == [(x["kind"], x["step"]) for x in right]
    names = ("loss", "grad_norm", "update_ratio", "val_loss", "rsum", "t2i_r1", "temperature")
    for a, b in zip(found, right, strict=True):
        for name in names & b.keys() & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (run_dir, name, b)


def _serves(run_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluate, search and export a run's checkpoint; the export embeds as the run does."""
    for arguments in (["eval", "--split", "val"], ["search", "--split", "val", "--text", "red"]):
        assert cli.main([arguments[0], str(run_dir), *arguments[1:]]) == 0
    last = [line for line in read_lines(run_dir) if line["kind"] == "eval"][-1]
    result = json.loads((run_dir / "eval-val.json").read_text())
    assert result["trained"]["rsum"] == pytest.approx(last["rsum"])
    capsys.readouterr()
    export_run(run_dir, folder, merge=run_dir.name == "adapters")
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for source, path in zip((run_dir, folder), paths, strict=True):
        data = ["--split", "val", "--data", str(run_dir.parents[1] / "shards")]
        assert cli.main(["embed", str(source), str(path), *data]) == 0
    a, b = map(load_file, paths)
    for side in ("image_features", "text_features"):
        torch.testing.assert_close(a[side], b[side], rtol=0, atol=1e-5)
    images, _ = tiny_batch(2, 0)
    assert load(folder).model.encode_images(images).isfinite().all()
