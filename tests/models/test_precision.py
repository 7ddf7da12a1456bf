"""Float32 means float32, and no float16 in a bf16 run."""

from collections.abc import Iterator

import pytest
import torch

from dist_vse.models.precision import evaluation_autocast, use_precision

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _flags() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def _allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)]
)
def test_tf32_is_used_where_it_was_asked_for(precision: str, tf32: bool) -> None:
    use_precision(GPU, precision)
    assert _allowed() == (tf32, tf32)


def test_a_cpu_is_left_alone() -> None:
    before = _allowed()
    use_precision(CPU, "tf32")
    assert _allowed() == before


def test_a_gpu_evaluates_in_the_precision_of_the_run_and_a_cpu_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        with evaluation_autocast(CPU, precision):
            assert not torch.is_autocast_enabled("cpu")
    # PyTorch turns autocast off where it finds no GPU: so what is asked for is looked at.
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    asked: object = evaluation_autocast(GPU, "bf16")
    assert asked == ("cuda", torch.bfloat16, True)
