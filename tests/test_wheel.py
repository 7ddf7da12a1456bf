"""The wheel alone, installed into an empty environment and used in an empty folder."""

import email
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.install import distributions
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

# What the build reads; a copy of it, so that nothing of an earlier build in the checkout counts.
SOURCES = ("dist_vse", "launch", "shards", "configs")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
SMALL = ("global_batch_size=8", "chunk_size=4", "total_steps=2", "log_every=1")

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("circle", "square", "star", "line", "cross", "moon", "house", "tree")

IMPORT = (
    "import sys, time; t = time.perf_counter(); import dist_vse; print(time.perf_counter() - t); "
    "assert not {'torch', 'numpy'} & sys.modules.keys()"
)
LOSS = """
import torch
from dist_vse.evaluation import retrieval
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.training import grad_cache
rows = torch.eye(4)
print(float(GlobalLoss("info_nce")(rows, rows, torch.zeros(1), torch.zeros(1)).loss))
"""
USERS_FILE = """
import torch
from torch import Tensor, nn
import dist_vse


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    criterion = dist_vse.GlobalContrastiveLoss("convse", temperature=0.1)
    loss: Tensor = dist_vse.cached_step(model, criterion, batch, chunk_size=4)
    loss.add_(criterion(loss, loss))
    return dist_vse.retrieval_metrics(loss, loss, torch.arange(4))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    """The wheel of this checkout."""
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return _build("wheel", source, folder / "dist")


@pytest.fixture(scope="module")
def command(wheel: Path, folder: Path) -> Path:
    """`dist-vse` of an environment that has our dependencies, and of us only the wheel."""
    return _install(wheel, folder / "venv", Path(sysconfig.get_path("purelib")))


@pytest.fixture(scope="module")
def empty(folder: Path) -> Path:
    """An empty folder to work in."""
    path = folder / "work"
    path.mkdir()
    return path


def test_the_wheel_holds_one_package_with_configs_and_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dist_vse"}
    assert {"dist_vse/py.typed", "dist_vse/configs/clusters/local.yaml"} <= {*names}
    assert not [name for name in names if "__pycache__" in name]
    files = {path.relative_to(ROOT) for name in SOURCES for path in (ROOT / name).rglob("*.py")}
    assert len([name for name in names if name.endswith(".py")]) == len(files)


def test_its_metadata_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
    assert (found["Name"], found["Version"]) == ("dist_vse", "0.1.0")
    assert found["License-Expression"] == "Apache-2.0" and found["License-File"] == "LICENSE"
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    needs = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[><=]", line)[0] for line in needs} == {"torch", "numpy", "tqdm"}


def test_the_sdist_builds_the_same_wheel(wheel: Path, folder: Path) -> None:
    sdist = _build("sdist", folder / "source", folder / "dist")
    with tarfile.open(sdist) as tar:
        assert not [member for member in tar if not (member.isfile() or member.isdir())]
        tar.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    again = _build("wheel", source, folder / "again")
    assert again.name == wheel.name
    assert _contents(again) == _contents(wheel)


@pytest.mark.timeout(400)  # seven commands, some of which import torch and DeepSpeed
def test_every_step_works_in_an_empty_folder(command: Path, empty: Path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(
            [command, *words], cwd=empty, env=_env(), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    _write_pairs(empty / "pictures")
    run("shard", "jsonl", "pictures/pairs.jsonl", "shards")
    assert "clusters/local" in run("config", "list")
    assert "global_batch_size" in run("config", "show", "demo")
    run("config", "copy", "debug_cpu", "mine.yaml")
    run("train", "mine.yaml", "data.index=shards", "output_dir=run", *SMALL)
    assert "R@1" in run("eval", "run", "--split", "val")
    assert "A100" in run("plan", "coco_paper", "--gpus", "8")
    shown = run("submit", "coco_paper", "--cluster", "slurm_8xa100", "--dry-run")
    assert "#SBATCH --nodes=1" in shown
    assert {path.name for path in empty.iterdir()} == {"pictures", "shards", "mine.yaml", "run"}


@pytest.mark.timeout(300)  # `make lint` leaves a cache; without it mypy reads all of torch
def test_mypy_is_strict_about_a_users_file(command: Path, empty: Path, tmp_path: Path) -> None:
    """Types reach users through the wheel and the lazy names; a wrong argument is found."""
    files = tmp_path / "good.py", tmp_path / "bad.py"
    files[0].write_text(USERS_FILE)
    files[1].write_text(USERS_FILE.replace("chunk_size=4", 'chunk_size="4"'))
    cache = ROOT / ".mypy_cache"
    if cache.is_dir():  # a copy: what mypy finds out about the wheel is nothing for `make lint`
        shutil.copytree(cache, tmp_path / "cache")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", f"--cache-dir={tmp_path / 'cache'}"),
            f"--python-executable={command.parent / 'python'}",
            f"--config-file={ROOT / 'pyproject.toml'}",
            *files,
        ],
        cwd=tmp_path,
        env=_env(),
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and "bad.py:9" in errors[0], done.stdout + done.stderr
    assert 'Argument "chunk_size"' in errors[0]


def test_without_extras_there_is_the_loss_and_a_line_for_the_rest(wheel: Path, empty: Path) -> None:
    packages = _links(empty.parent / "base-packages", distributions([]))
    command = _install(wheel, empty.parent / "base", packages)

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=empty, env=_env(), capture_output=True, text=True)

    python = command.parent / "python"
    times = [run(python, "-c", IMPORT) for _ in range(3)]
    assert all(not done.returncode for done in times), times
    assert min(float(done.stdout) for done in times) < 0.1
    loss = run(python, "-c", LOSS)
    assert loss.returncode == 0, loss.stderr
    assert float(loss.stdout) == pytest.approx(math.log(math.e + 3) - 1, rel=1e-5)
    for words in (("--help",), ("train", "--help"), ("config", "show", "demo")):
        assert run(command, *words).returncode == 0
    for words in (("train", "demo"), ("shard", "folder", "pictures", "out"), ("eval", "run")):
        done = run(command, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "pip install 'dist_vse[train]'" in done.stderr
    for module in ("train", "tools.verify", "launch.requeued"):
        done = run(python, "-m", f"dist_vse.{module}", "demo")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: python -m dist_vse.{module}")
        assert "pip install 'dist_vse[train]'" in done.stderr


def _install(wheel: Path, environment: Path, dependencies: Path) -> Path:
    """Make an environment of the wheel and a folder of other packages; return its dist-vse."""
    make = (sys.executable, "-m", "venv", "--without-pip", environment)
    subprocess.run(make, check=True, timeout=60)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, timeout=60)
    # Python reads no .pth file of a folder that a .pth file adds: an editable dist_vse stays out.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    where = "import dist_vse, dist_vse.launch, dist_vse.shards; print(dist_vse.launch.__file__)"
    done = subprocess.run(
        [python, "-c", where], cwd=environment, env=_env(), capture_output=True, text=True
    )
    assert done.stdout.startswith(str(site / "dist_vse")), done.stdout + done.stderr
    return environment / "bin" / "dist-vse"


def _links(folder: Path, packages: set[str]) -> Path:
    """Return a folder with links to what these packages have installed, and nothing else."""
    folder.mkdir()
    for package in packages:
        distribution = metadata.distribution(package)
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def _build(kind: str, source: Path, dest: Path) -> Path:
    """Build as pip does, with the setuptools that is here."""
    program = f"from setuptools import build_meta as b; b.build_{kind}({str(dest)!r})"
    dest.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, env=_env(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = dest.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def _env() -> dict[str, str]:
    """Return the environment without what would lead to the checkout, or to the network."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return ours | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write_pairs(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for i in range(32):
        pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        split = "val" if i % 5 == 0 else "train"
        captions = [f"{COLOURS[i % 4]} {SHAPES[i // 4]}"]
        lines.append(json.dumps({"image": f"{i}.jpg", "captions": captions, "split": split}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
