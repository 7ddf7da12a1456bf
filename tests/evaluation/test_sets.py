"""Further sets, zero-shot folders and the validation loss, measured while a run trains."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig
from dist_vse.config.evaluation import EvalSetConfig, score_of
from dist_vse.data.index import read_index
from dist_vse.evaluation.class_folder import read_class_folder
from dist_vse.evaluation.zeroshot import accuracies
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.models.class_names import clip_templates, imagenet_names
from dist_vse.runs import checkpoint
from dist_vse.tools.search.embed import embed_split, open_model
from dist_vse.tools.search.zeroshot import zeroshot
from dist_vse.training.early_stop import read_early_stop
from tests.support.datasets import describe, draw, write_dataset
from tests.support.distributed import run_distributed
from tests.support.runs import read_lines, run, settings

CLASS = {"name": "a", "zeroshot": "images"}


def write_classes(folder: Path, each: int = 4) -> Path:
    """Write a folder a shape, of a few pictures each."""
    made: dict[str, int] = {}
    for number in range(60):
        shape = describe(number)[0]
        made[shape] = made.get(shape, 0) + 1
        if made[shape] <= each:
            (folder / shape).mkdir(parents=True, exist_ok=True)
            draw(number, seed=9).save(folder / shape / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_sets": [{"split": "val"}]}, "needs a name"),
        ({"eval_sets": [{"name": "a/b", "split": "val"}]}, "without a slash"),
        ({"eval_sets": [{"name": "a"}]}, "either a split .* or a folder"),
        ({"eval_sets": [{**CLASS, "split": "val"}]}, "either a split .* or a folder"),
        ({"eval_sets": [{"name": "a", "split": "x", "classes": "y"}]}, "are for a folder"),
        ({"eval_sets": [{**CLASS, "protocol": "coco-5k"}]}, "index and protocol are for a split"),
        ({"eval_sets": [CLASS, CLASS]}, r"names must differ \(a, a\)"),
        ({"best_metric": "val_loss"}, "needs eval_loss=true"),
        ({"best_metric": "b/top1", "eval_sets": [CLASS]}, "is not measured; choose .* a/top1"),
        ({"best_metric": "a/rsum", "eval_sets": [CLASS]}, "is not measured"),
        ({"best_metric": "top1", "eval_sets": [CLASS]}, "is not measured"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        sets = [EvalSetConfig(**item) for item in settings.pop("eval_sets", [])]  # type: ignore[attr-defined]
        TrainConfig(eval_sets=sets, **settings)  # type: ignore[arg-type]


def test_a_lower_loss_is_better_and_a_line_without_the_metric_is_no_score(tmp_path: Path) -> None:
    assert score_of("val_loss", {"val_loss": 2.0}) == -2.0
    assert score_of("a/top1", {"a/top1": 2.0, "rsum": 1.0}) == 2.0
    assert score_of("a/top1", {"rsum": 1.0}) is None
    lines: list[dict[str, float]] = [{"rsum": 1.0}, {"val_loss": 3.0}, {"val_loss": 4.0}]
    text = "".join(json.dumps({"kind": "eval", "step": 1, **line}) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_early_stop(tmp_path, "val_loss", 1).ends
    assert not read_early_stop(tmp_path, "val_loss", 2).ends


@pytest.mark.slow
def test_names_and_templates_come_from_a_library(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra `open_clip`")
    assert len(clip_templates()) == 80 and clip_templates()[0] == "a bad photo of a {}."
    names = imagenet_names(["n01440764", "n02123394"])
    assert names == {"n01440764": "tench", "n02123394": "Persian cat"}
    with pytest.raises(UserError, match="'cat' is none of ImageNet's"):
        imagenet_names(["cat"])
    for name in names:
        (tmp_path / name).mkdir()
        draw(0).save(tmp_path / name / "a.png")
    folder = read_class_folder(tmp_path, "imagenet", "clip")
    assert folder.names == ["tench", "Persian cat"]
    assert len(folder.texts) == 160 and folder.texts[80] == "a bad photo of a Persian cat."


@pytest.mark.slow
def test_accuracies_of_ten_classes_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra `suites`")
    generator = torch.Generator().manual_seed(0)
    weights = normalize(torch.randn(10, 16, generator=generator), dim=1)
    sizes = [3, 9, 1, 4, 7, 2, 8, 5, 6, 3]
    right = torch.repeat_interleave(torch.arange(10), torch.tensor(sizes))
    noise = torch.randn(len(right), 16, generator=generator)
    features = normalize(weights[right] + 0.9 * noise, dim=1)
    found = accuracies(features.split(sizes), weights, top=None)
    scores = (features.double() @ weights.double().T).numpy()
    for k in (1, 5):
        theirs = metrics.top_k_accuracy_score(right.numpy(), scores, k=k)
        assert found[f"top{k}"] == pytest.approx(100 * theirs) and found[f"top{k}"] < 100
    theirs = metrics.balanced_accuracy_score(right.numpy(), scores.argmax(1))
    assert found["mean_per_class"] == pytest.approx(100 * theirs) != pytest.approx(found["top1"])
    assert found["chance"] == 10


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_number_of_ranks_measures_the_same_and_the_best_is_kept(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", {"train": 48, "val": [20, 30]})
    write_dataset(tmp_path / "other", {"dev": 14}, captions=3)
    classes = write_classes(tmp_path / "images")
    sets = (
        f"eval_sets=[{{name: other, index: {tmp_path / 'other'}, split: dev}}, "
        f"{{name: shapes, zeroshot: {classes}}}]"
    )
    more = [sets, "eval_loss=true", "best_metric=val_loss", "keep_best=1", "keep_checkpoints=1"]
    more += ["global_batch_size=24", "chunk_size=4", "data.num_streams=6", "loss.name=info_nce"]
    more += ["eval_every=2", "checkpoint_every=2", "total_steps=4", "optim.lr=1e-2"]
    lines = []
    for world_size in (1, 2, 3):
        run_dir = tmp_path / f"run{world_size}"
        overrides = settings(tmp_path / "shards", run_dir, *more)
        assert run_distributed(run, world_size, overrides) == [0] * world_size
        lines.append([line for line in read_lines(run_dir) if line["kind"] == "eval"])
    first, *others = (json.dumps(found[0]) for found in lines)  # before any step
    assert others == [first, first]
    assert '"other/rsum"' in first and '"shapes/top1"' in first and '"val_loss"' in first

    run_dir, last = tmp_path / "run1", lines[0][-1]
    by_command = zeroshot(run_dir, data=classes, classes=None, templates=None, top=None)
    assert {key: last[f"shapes/{key}"] for key in by_command} == pytest.approx(by_command)
    assert last["val_loss"] == pytest.approx(_val_loss(run_dir, tmp_path / "shards"), rel=1e-5)
    losses = {line["step"]: line["val_loss"] for line in lines[0] if line["step"] > 0}
    kept = {int(path.name[5:]) for path in checkpoint.steps(run_dir / "checkpoints")}
    assert kept == {4, min(losses, key=losses.__getitem__)}


def _val_loss(run_dir: Path, shards: Path) -> float:
    """Compute it by the dense formula: two batches of 24 of the 50 images."""
    model = open_model(run_dir)
    found = embed_split(model, read_index(str(shards)), "val")
    texts = torch.tensor([found.image_of_text.tolist().index(row) for row in range(50)])
    losses = [
        dense_loss(
            "info_nce",
            found.image_features[rows],
            found.text_features[texts[rows]],
            model.model.log_scale.detach(),
            model.model.bias.detach(),
            image_ids=found.image_ids[rows],
            text_ids=found.text_ids[texts[rows]],
        )
        for rows in (slice(0, 24), slice(24, 48))
    ]
    return float(torch.stack(losses).mean())
