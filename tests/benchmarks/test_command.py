"""`python -m benchmarks`: its help, its errors, and that it stays out of the wheel."""

import subprocess
import sys

import pytest
from setuptools import find_packages
from setuptools.config.pyprojecttoml import read_configuration

from benchmarks.__main__ import main
from benchmarks.options import BENCHMARKS
from tests.support.paths import ROOT


def test_the_wheel_has_no_benchmarks_tests_or_demo() -> None:
    project = read_configuration(ROOT / "pyproject.toml", expand=False)
    chosen = project["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), **chosen)
    assert {name.split(".")[0] for name in packages} == {"dist_vse"}
    assert {"dist_vse.tools.bench", "dist_vse.launch", "dist_vse.shards.build"} <= set(packages)


def test_the_package_imports_no_benchmark() -> None:
    for folder in ("dist_vse", "launch", "shards"):
        for path in (ROOT / folder).rglob("*.py"):
            words = path.read_text(encoding="utf-8")
            assert "from benchmarks" not in words and "import benchmarks" not in words, path


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from benchmarks.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'numpy', 'deepspeed'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in (*BENCHMARKS, "render"))


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no benchmark 'losses'; there are loss, cache, ")
    assert error.count("\n") == 1
