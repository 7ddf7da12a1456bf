"""A package that an extra would bring is missing: one line names the extra."""

import sys
from importlib.metadata import packages_distributions
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools.config.pyprojecttoml import read_configuration

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.common.extras import TRAIN, needs_train, run_module
from tests.support.paths import ROOT


def test_the_extra_has_these_packages() -> None:
    project = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
    lines = project["optional-dependencies"]["train"]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    installed = packages_distributions()
    assert {canonicalize_name(installed[name][0]) for name in TRAIN} == declared


def test_a_command_without_its_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    assert cli.main(["train", "demo"]) == 2
    assert capsys.readouterr().err == (
        "error: dist-vse train needs the package omegaconf, which is not installed; "
        "pip install 'dist_vse[train]'\n"
    )


def test_any_other_missing_module_is_no_extras_matter() -> None:
    with pytest.raises(ModuleNotFoundError), needs_train("this"):
        import no_such_module  # noqa: F401
    with pytest.raises(UserError, match=r"this needs the package deepspeed"), needs_train("this"):
        raise ModuleNotFoundError("No module", name="deepspeed.comm")


def test_a_module_without_its_package_is_one_line_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise ModuleNotFoundError("No module", name="deepspeed.comm")

    monkeypatch.setitem(sys.modules, "toy_module", SimpleNamespace(main=main))
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run_module("toy_module") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == lines
        assert not lines or said.startswith("error: python -m toy_module needs the package deepspe")
    monkeypatch.setitem(sys.modules, "toy_module", SimpleNamespace(main=lambda: 130))
    assert run_module("toy_module") == 130
