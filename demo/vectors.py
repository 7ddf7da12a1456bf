"""Run the demo's frozen encoders over a sharded data set once, for trainings that take seconds.

    python -m demo.vectors SHARDS WEIGHTS OUT_DIR

`SHARDS` come from `dist-vse shard`, `WEIGHTS` from `demo/weights.py`; each image needs one caption.
`OUT_DIR/precomp` gets the images' vectors and their captions in VSE++'s layout, `OUT_DIR/shards`
the same as shards (`model.image.kind: vectors`), and `OUT_DIR/texts` the captions' vectors
(`model.text.kind: vectors`).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from dist_vse.cli import main as dist_vse
from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, write_text
from dist_vse.data.eval_stream import captions
from dist_vse.data.index import read_index

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
LAYOUT = {"train": "train", "val": "dev", "test": "test"}  # VSE++'s name of each split


def write_vectors(shards: Path, weights: Path, out: Path) -> None:
    """Write all that is missing.

    Raises UserError where a command fails, or an image has several captions.
    """
    settings = [
        f"data.index={shards}",
        "data.crop=center",
        f"model.image.weights={weights / 'efficientnet_lite0.safetensors'}",
        f"model.text.weights={weights / 'minilm'}",
    ]
    if (out / "shards").resolve() == shards.resolve():
        raise UserError(f"{out}: its shards would replace {shards}; give another folder")
    index, precomp = read_index(shards), out / "precomp"
    precomp.mkdir(parents=True, exist_ok=True)
    for split, name in LAYOUT.items():
        folder = out / "features" / split
        of_split = [f"data.train_split={split}", f"data.features={folder}"]
        run("features", str(CONFIG), *settings, *of_split)
        array = np.concatenate([np.load(path) for path in sorted(folder.glob("features-*.npy"))])
        lines = [caption.replace("\n", " ") for caption in captions(index, split)]
        if len(lines) != len(array):
            raise UserError(f"{shards}: {split} has several captions an image; this needs one")
        with atomic_write(precomp / f"{name}_ims.npy") as path, path.open("wb") as file:
            np.save(file, array)
        write_text(precomp / f"{name}_caps.txt", "".join(f"{line}\n" for line in lines))
    run("features", str(CONFIG), *settings, "--texts", str(out / "texts"))
    run("shard", "precomp", str(precomp), str(out / "shards"))


def run(*command: str) -> None:
    """Run a command of `dist-vse`. Raises UserError if it fails."""
    if code := dist_vse(list(command)):
        raise UserError(f"dist-vse {' '.join(command)}: exit code {code}")


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Store what the demo's frozen encoders put out.")
    parser.add_argument("shards", metavar="SHARDS", type=Path)
    parser.add_argument("weights", metavar="WEIGHTS", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    args = parser.parse_args()
    try:
        write_vectors(args.shards, args.weights, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
