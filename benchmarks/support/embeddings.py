"""Write a file of many embeddings as `dist-vse embed` does, or search in it."""

import sys
from pathlib import Path

import torch

from dist_vse.evaluation.evaluate import Embedded
from dist_vse.evaluation.retrieval import top_k
from dist_vse.tools.search.embed import write_embeddings
from dist_vse.tools.search.gallery import read_gallery

CAPTIONS = 5
ORIGIN = {"weights": "none", "data": "none", "split": "test"}


def main(what: str, path: Path, num_captions: int, dim: int) -> None:
    """Do it; the captions have some 80 letters."""
    if what == "search":
        gallery = read_gallery(path, ORIGIN)
        top_k(torch.nn.functional.normalize(torch.randn(1, dim)), gallery.features, 10)
        return
    num_images = num_captions // CAPTIONS
    found = Embedded(
        [f"{row:09d}" for row in range(num_images)],
        [f"caption {row:09d} " + "of eighty letters, " * 3 for row in range(num_captions)],
        torch.rand(num_images, dim),
        torch.rand(num_captions, dim),
        torch.arange(num_captions) // CAPTIONS,
        torch.zeros(num_images, dtype=torch.int64),
        torch.zeros(num_captions, dtype=torch.int64),
    )
    write_embeddings(found, path, ORIGIN)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
