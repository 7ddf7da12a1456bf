"""Does a change keep every number? Record what the system computes, and compare two records.

    python -m benchmarks.same_numbers record before.json     # in the checkout before the change
    python -m benchmarks.same_numbers record after.json      # in the one after it
    python -m benchmarks.same_numbers compare before.json after.json

A record holds the losses of 20 steps of configs/debug_cpu.yaml for every loss, 1 and 2 processes,
1 and 4 chunks and ZeRO 0 to 3, as they stand in metrics.jsonl; and the SHA-256 of a set of shards,
of what `eval` writes, and of the training batches of two epochs. About ten minutes on two cores.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

# Fixed, not the registry's: the same script also runs in checkouts from before it, and before dcl.
LOSSES = ("convse", "convse++", "info_nce", "vse0", "vse++", "siglip")
STEPS, BATCH, PAIRS = 20, 32, 96
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "debug_cpu.yaml"
IMPORTS = ["torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3", "timm"]


def main() -> int:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("out", type=Path)
    comparison = commands.add_parser("compare")
    comparison.add_argument("records", type=Path, nargs=2)
    args = parser.parse_args()
    if args.command == "record":
        args.out.write_text(json.dumps(record(), indent=1) + "\n")
        return 0
    before, after = (json.loads(path.read_text()) for path in args.records)
    different = compare(before, after)
    for line in different:
        print(line)
    print(f"{len(before)} and {len(after)} entries, {len(different)} differ")
    return 1 if different else 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each entry of two records that differs, or that only one of them has."""
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def record() -> dict[str, Any]:
    """Return everything, by name."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    multiprocessing.set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as tmp, _working_in(tmp):
        _write_pairs(Path("pairs"))
        _in_process(_shard, 1)
        found: dict[str, Any] = {"shards": _digest(sorted(Path("shards").glob("*.tar")))}
        _in_process(_hash_batches, 1)
        found["batches of two epochs"] = Path("batches.sha256").read_text()
        cells = list(product(LOSSES, (1, 4), (0, 1, 2, 3)))
        with ThreadPoolExecutor(2) as pool:
            alone = list(pool.map(lambda cell: _losses(1, *cell), cells))
        pairs = [_losses(2, *cell) for cell in cells]
        for world_size, losses in ((1, alone), (2, pairs)):
            for (name, chunks, stage), values in zip(cells, losses, strict=True):
                found[f"{name}, W={world_size}, {chunks} chunks, ZeRO {stage}"] = values
        _in_process(_evaluate, 1)
        found["eval"] = _digest([Path("W1-convse-1-1/eval-val.json")])
    return found


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _losses(world_size: int, name: str, chunks: int, stage: int) -> list[float]:
    folder = Path(f"W{world_size}-{name}-{chunks}-{stage}")
    _in_process(_train, world_size, str(folder), name, BATCH // world_size // chunks, stage)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def _in_process(fn: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call a function on every rank, each a process of its own."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as store:
        port = 20000 + int.from_bytes(os.urandom(2), "big") % 20000
        ranks = [
            context.Process(target=_rank, args=(fn, rank, world_size, port, os.getcwd(), args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        if any(process.exitcode != 0 for process in ranks):
            raise SystemExit(f"{fn.__name__}{args} failed: {[p.exitcode for p in ranks]} {store}")


def _rank(
    fn: Callable[..., None], rank: int, world_size: int, port: int, cwd: str, args: Sequence[Any]
) -> None:
    os.chdir(cwd)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    fn(*args)


def _train(folder: str, name: str, chunk_size: int, stage: int) -> None:
    from dist_vse.train import main as train

    code = train(
        [
            str(CONFIG),
            "data.index=shards",
            f"output_dir={folder}",
            f"loss.name={name}",
            f"chunk_size={chunk_size}",
            f"global_batch_size={BATCH}",
            f"engine.zero_stage={stage}",
            f"total_steps={STEPS}",
            "log_every=1",
        ]
    )
    sys.exit(code)


def _shard() -> None:
    from dist_vse.cli import main as command

    sys.exit(command(["shard", "folder", "pairs", "shards"]))


def _evaluate() -> None:
    from dist_vse.cli import main as command

    sys.exit(command(["eval", "W1-convse-1-1", "--split", "val"]))


def _hash_batches() -> None:
    import numpy as np
    import torch

    from dist_vse.config import DataConfig, ImageConfig
    from dist_vse.data.index import read_index
    from dist_vse.data.streams import TrainSet
    from dist_vse.data.train_stream import train_batches

    def tokenize(captions: Sequence[str]) -> torch.Tensor:
        rows = [(list(caption.encode()) + [0] * 12)[:12] for caption in captions]
        return torch.tensor(rows)

    tokenizer: Any = tokenize
    tokenizer.pad_id = 0
    batches = train_batches(
        [TrainSet(read_index("shards"), "train")],
        tokenizer,
        DataConfig(shuffle_window=16, num_workers=0, flip=True, color_jitter=0.2),
        ImageConfig(size=32),
        seed=3,
        global_batch_size=BATCH,
    )
    digest = hashlib.sha256()
    for _ in range(2 * PAIRS // BATCH):
        batch = next(batches)
        for x in (batch.images, batch.tokens, batch.image_ids, batch.text_ids, batch.origin):
            digest.update(np.ascontiguousarray(torch.as_tensor(x).numpy()).tobytes())
    Path("batches.sha256").write_text(digest.hexdigest())


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _write_pairs(folder: Path) -> None:
    """Draw rectangles whose captions say their colour and place."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    colours = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220)}
    for split, count in (("train", PAIRS), ("val", 24)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (48, 40, 3)).astype(np.uint8)
            name = list(colours)[i % 3]
            row, column = rng.integers(0, 24, 2)
            pixels[row : row + 16, column : column + 16] = colours[name]
            stem = folder / split / f"{i:04d}"
            Image.fromarray(pixels).save(stem.with_suffix(".png"))
            captions = [f"a {name} square {i}", f"a square at {row} {column}"]
            stem.with_suffix(".txt").write_text("\n".join(captions))


if __name__ == "__main__":
    sys.exit(main())
