"""A config is a file, or a name of one that comes with the package."""

from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig, load_config
from dist_vse.config.named import find_config, named_configs
from dist_vse.launch.cluster import load_cluster
from tests.support.paths import CONFIGS


def test_every_file_has_a_name() -> None:
    files = {path for path in CONFIGS.rglob("*") if path.is_file()}
    assert {path.resolve() for path in named_configs().values()} == files


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("demo", "demo.yaml"),
        ("clusters/local", "clusters/local.yaml"),
        ("local", "clusters/local.yaml"),
        ("a100_80g", "hardware/a100_80g.yaml"),
        ("accelerate/cpu_2proc", "accelerate/cpu_2proc.yaml"),
        ("accelerate.sbatch", "clusters/accelerate.sbatch"),
    ],
)
def test_a_name_means_a_file_of_the_package(empty: Path, name: str, file: str) -> None:
    (empty / name).parent.mkdir(exist_ok=True)
    assert find_config(name).resolve() == CONFIGS / file


def test_a_name_works_where_a_path_does(empty: Path) -> None:
    assert load_config("demo") == load_config(CONFIGS / "demo.yaml") != TrainConfig()
    assert load_cluster("local") == load_cluster(CONFIGS / "clusters" / "local.yaml")


def test_a_local_file_wins_and_a_local_folder_does_not(empty: Path) -> None:
    (empty / "demo").mkdir()
    assert load_config("demo").seed == load_config(CONFIGS / "demo.yaml").seed
    (empty / "demo").rmdir()
    (empty / "demo").write_text("seed: 77\n")
    assert load_config("demo").seed == 77


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("coco_papr", "did you mean 'coco_paper'"),
        ("slurm_8xh10", "did you mean 'clusters/slurm_8xh100'"),
        ("cluster/local", "did you mean 'clusters/local'"),
        ("configs/demo.yaml", "did you mean 'demo'"),
        ("mine.yml", "did you mean 'mine.yaml'"),
        ("/nowhere/at/all.yaml", "`dist-vse config list`"),
    ],
)
def test_an_unknown_name_gives_the_nearest(empty: Path, given: str, hint: str) -> None:
    (empty / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=hint) as caught:
        find_config(given)
    assert "\n" not in str(caught.value)
