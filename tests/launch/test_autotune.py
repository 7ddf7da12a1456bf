"""Shapes of the kernels' tiles: timed, kept, and read again. In the interpreter, small."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vse.launch.gpu_checks import autotune
from dist_vse.launch.gpu_checks.autotune import Factors
from dist_vse.losses import kernel_choice
from dist_vse.losses.kernel_choice import INTERPRETED, blocks_of, blocks_on
from dist_vse.losses.tuned_blocks import Blocks, cache_path, key, read_blocks, write_blocks

pytest.importorskip("triton", reason="Triton is not installed: autotuning is NOT tested")
CPU = torch.device("cpu")
SMALL, WRONG = Blocks(16, 16, 16, 1, 1), Blocks(16, 48, 16, 1, 1)  # 48 is no power of two


def test_the_fastest_shape_that_is_right_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "KERNELS", {"softmax_sums": "convse"})
    path = tmp_path / "blocks" / "gpu.json"
    kinds = {
        "fp32": Factors(shapes=[SMALL, INTERPRETED, WRONG]),
        "tf32": Factors(tf32=True, shapes=[SMALL]),
    }
    found = autotune.tune(CPU, path, {"fp32": kinds["fp32"]}, 20, 16)
    assert found.ok, found
    seconds = found.figures["seconds"]["softmax_sums float32"]
    assert isinstance(seconds[str(tuple(WRONG))], str)
    timed = {shape: seconds[str(tuple(shape))] for shape in (SMALL, INTERPRETED)}
    name = key("softmax_sums", torch.float32, tf32=False)
    first = {name: min(timed, key=lambda shape: timed[shape])}
    assert read_blocks(path) == first
    assert not kernel_choice.TRIED
    # Another kind joins what is there.
    assert autotune.tune(CPU, path, {"tf32": kinds["tf32"]}, 20, 16).ok
    assert read_blocks(path) == {**first, "softmax_sums tf32": SMALL}


def test_nothing_is_written_where_nothing_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "KERNELS", {"softmax_sums": "convse"})
    kinds = {"fp32": Factors(close=-1.0, shapes=[INTERPRETED])}
    found = autotune.tune(CPU, tmp_path / "gpu.json", kinds, 5, 16)
    assert not found.ok and "wrong" in str(found.figures["seconds"])
    assert not (tmp_path / "gpu.json").exists()


def test_a_gpu_takes_what_was_timed_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    path = cache_path("NVIDIA H100 80GB HBM3")
    assert path.parent == tmp_path / "dist_vse" / "blocks" and path.name.startswith("NVIDIA-H100")
    assert cache_path("NVIDIA A100") != path
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    default = blocks_of("hardest", bf16, (9, 0))
    assert blocks_on("hardest", bf16, gpu, tf32=True) == default
    float32 = torch.float32
    timed = {key("hardest", bf16, tf32=False): SMALL, key("hardest", float32, tf32=True): SMALL}
    write_blocks(path, timed)
    assert blocks_on("hardest", bf16, gpu, tf32=True) == SMALL
    assert blocks_on("hardest", float32, gpu, tf32=True) == SMALL
    assert blocks_on("weights", bf16, gpu, tf32=True) == blocks_of("weights", bf16, (9, 0))
    default = blocks_of("hardest", float32, (9, 0))
    assert blocks_on("hardest", float32, gpu, tf32=False) == default


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [1, 2]}', '{"a": [0, 1, 1, 1, 1]}'])
def test_a_damaged_cache_counts_as_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    found: dict[str, Any] = read_blocks(path)
    assert found == {}
