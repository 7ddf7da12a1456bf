"""Compile the fused kernels for a GPU that is not here, and say what their programs take.

python -m tests.support.compile_ahead 80|90 bf16|fp16|fp32 [KERNEL ...]

Prints a line of JSON for each kernel: registers, bytes of the stack (spilled registers lie there)
and of shared memory. Must run without TRITON_INTERPRET. Exits with 3 where Triton can't compile
ahead.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

try:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    print(f"this Triton ({triton.__version__}) compiles nothing ahead: {error}", file=sys.stderr)
    sys.exit(3)

from dist_vse.losses import fused, fused_kernels, kernel_choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What is compiled: a kernel, the loss whose it is (where it has several) and what duplicates are.
VARIANTS = {
    "softmax_sums": ("softmax_sums", None, "POSITIVE"),
    "hardest": ("hardest", None, "MASK"),
    "weights_softmax": ("weights", "SOFTMAX", "MASK"),
    "weights_sigmoid": ("weights", "SIGMOID", "MASK"),
    "weights_hinges": ("weights", "HINGES", "MASK"),
    "pair_sums_sigmoid": ("pair_sums", "SIGMOID", "POSITIVE"),
    "pair_sums_hinges": ("pair_sums", "HINGES", "MASK"),
    "mark": ("mark", None, None),
}
INTEGERS = ("rows", "columns", "total", "d", "offset", "start")
OTHER_TYPES = (
    {"codes": "*i32", "marks": "*u8", "tolerance": "fp32"}
    | {name: "*i32" for name in ("row_index", "column_index")}
    | {name: "*i64" for name in ("order", "first", "last")}
)


def cuobjdump() -> Path | None:
    """Return the tool that reads a compiled kernel, which Triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.is_file() else None


def compile_ahead(variant: str, dtype: str, capability: int, **blocks: int) -> dict[str, Any]:
    """Return what a compiled kernel takes; `blocks` are in place of the table's."""
    name, loss, duplicates = VARIANTS[variant]
    tiled = "weights" if name == "mark" else name  # it marks the tiles of every kernel alike
    shape = kernel_choice.blocks_of(tiled, DTYPES[dtype], divmod(capability, 10))._replace(**blocks)
    kernel = getattr(fused_kernels, name)
    constants: dict[str, Any] = {"height": shape.height, "width": shape.width}
    if duplicates is None:
        shape = shape._replace(warps=4, stages=3)  # Triton's own, for it is started without any
        constants["size"] = fused.MARKED_ROWS
    else:
        constants |= {
            "duplicates": getattr(fused_kernels, duplicates).value,
            "kinds": 0 if duplicates == "NONE" else 2,
            "precision": "tf32x3" if dtype == "fp32" else "tf32",
            "depth": shape.depth,
        }
    if loss is not None:
        constants["loss"] = getattr(fused_kernels, loss).value
    signature = {x: _type(x, dtype, constants) for x in kernel.arg_names}
    places = {x: (place,) for place, x in enumerate(kernel.arg_names)}
    aligned = [x for x, kind in signature.items() if kind[0] == "*" or x == "d"]
    source = ASTSource(
        kernel,
        signature,
        constexprs={places[x]: value for x, value in constants.items()},
        attrs={places[x]: [["tt.divisibility", 16]] for x in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )
    return {
        "kernel": variant,
        "blocks": tuple(shape),
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
    }


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("images", "captions", "out"):
        return f"*{dtype}"
    return OTHER_TYPES.get(name, "i32" if name in INTEGERS else "*fp32")


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack + local}


if __name__ == "__main__":
    if cuobjdump() is None:
        print(f"Triton {triton.__version__} comes without cuobjdump", file=sys.stderr)
        sys.exit(3)
    for variant in sys.argv[3:] or VARIANTS:
        print(json.dumps(compile_ahead(variant, sys.argv[2], int(sys.argv[1]))), flush=True)
