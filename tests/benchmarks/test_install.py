"""`python -m benchmarks install` counts each package that an extra needs, once."""

import pytest

from benchmarks.install import distributions, needed_by, size_of
from dist_vse.common.errors import UserError


def test_the_losses_need_torch_and_no_deepspeed() -> None:
    base, train = distributions([]), distributions(["train"])
    assert {"torch", "numpy", "tqdm", "sympy"} <= base  # sympy: torch's own
    assert not {"deepspeed", "transformers", "dist-vse"} & base
    assert base < train and {"deepspeed", "hjson"} <= train
    assert distributions(["demo"]) >= train
    assert needed_by("tqdm") == {"tqdm"}
    with pytest.raises(UserError, match="no extra 'trian'"):
        distributions(["trian"])


def test_the_size_is_that_of_the_files() -> None:
    assert 10**7 < size_of("numpy") < 10**9
