"""The benchmarks by name, and the options of each; nothing heavy is imported here."""

import argparse
from collections.abc import Callable
from pathlib import Path


def _add_loss(loss: argparse.ArgumentParser) -> None:
    loss.description = (
        "Time the losses forward and backward in processes of one thread on this machine (gloo), "
        "in turn with OpenCLIP's loss and with bare matrix products and "
        "collectives; count the bytes that are sent, and compare the gradients with float64. With "
        "--memory, measure a rank's peak memory as well."
    )
    loss.add_argument("--processes", type=int, default=2, help="ranks on this machine (default: 2)")
    loss.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: one rank of eight on one GPU, without a network; wall and device time, memory",
    )
    loss.add_argument(
        "--rows",
        type=int,
        nargs="*",
        default=[4096],
        metavar="B",
        help="pairs a rank, one table each; none skips the timing (default: 4096)",
    )
    loss.add_argument("--dim", type=int, default=512, help="embedding size (default: 512)")
    loss.add_argument(
        "--repeats", type=int, default=5, help="timed rounds, the median counts (default: 5)"
    )
    loss.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="global batches whose peak memory to measure",
    )
    loss.add_argument(
        "--memory-dim",
        type=int,
        default=100,
        help="embedding size there; a multiple of 5, as the sides of tiles are not (default: 100)",
    )


def _add_cache(cache: argparse.ArgumentParser) -> None:
    cache.add_argument("--processes", type=int, default=2, help="ranks on this machine [2]")
    cache.add_argument("--batch", type=int, default=2048, help="global batch [2048]")
    cache.add_argument("--chunks", type=int, default=8, help="chunks a rank [8]")
    cache.add_argument("--repeats", type=int, default=3, help="timed rounds; 0 times nothing [3]")
    cache.add_argument("--image", default="vit_tiny_patch16_224", help="timm trunk [%(default)s]")
    cache.add_argument("--size", type=int, default=48, help="side of an image, pixels [48]")
    cache.add_argument("--text-width", type=int, default=128, help="of the text transformer [128]")
    cache.add_argument("--text-depth", type=int, default=2, help="of the text transformer [2]")
    cache.add_argument("--tokens", type=int, default=16, help="tokens a caption [16]")
    cache.add_argument("--dim", type=int, default=256, help="embedding size [256]")
    cache.add_argument(
        "--grad-cache", type=Path, metavar="DIR", help="a checkout of luyug/GradCache, to compare"
    )
    cache.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="batches to measure",
    )
    cache.add_argument("--chunk", type=int, default=64, help="pairs a chunk there [64]")


def _add_eval(evaluation: argparse.ArgumentParser) -> None:
    evaluation.add_argument("--images", type=int, default=5000, help="of 5 captions (5000)")
    evaluation.add_argument("--dim", type=int, default=1024, help="embedding size (default: 1024)")
    evaluation.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")


def _add_data(data: argparse.ArgumentParser) -> None:
    data.add_argument(
        "--workers", type=int, nargs="*", default=[1, 2], help="decoding processes (default: 1 2)"
    )
    data.add_argument("--photographs", type=int, default=512, help="of 640x480 (default: 512)")
    data.add_argument("--batch-size", type=int, default=64, help="pairs a batch (default: 64)")
    data.add_argument(
        "--min-crop-area", type=float, default=0.9, help="as OpenCLIP's default (default: 0.9)"
    )
    data.add_argument("--seconds", type=float, default=6, help="of a round (default: 6)")
    data.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")


def _add_peers(peers: argparse.ArgumentParser) -> None:
    peers.description = (
        "Train with OpenCLIP's own main and with ours, in turn, on the same shards and model "
        "(CPU, gloo): pairs a second, peak memory, exactness, and the largest batches that fit."
    )
    peers.add_argument("--processes", type=int, default=2, help="ranks on this machine [2]")
    peers.add_argument("--workers", type=int, default=1, help="data workers a rank [1]")
    peers.add_argument("--batch", type=int, default=256, help="global batch [256]")
    peers.add_argument("--chunks", type=int, default=8, help="chunks a rank, accum_freq [8]")
    peers.add_argument("--steps", type=int, default=5, help="timed steps of a training [5]")
    peers.add_argument("--warm-up", type=int, default=2, help="steps before them [2]")
    peers.add_argument("--rounds", type=int, default=3, help="trainings of each; 0 times none [3]")
    peers.add_argument("--image", default="vit_tiny_patch16_224", help="timm trunk [%(default)s]")
    peers.add_argument("--size", type=int, default=112, help="side of an image, pixels [112]")
    peers.add_argument("--text-width", type=int, default=256, help="of the text transformer [256]")
    peers.add_argument("--text-depth", type=int, default=4, help="of the text transformer [4]")
    peers.add_argument("--dim", type=int, default=256, help="embedding size [256]")
    peers.add_argument("--photographs", type=int, default=512, help="of 640x480 [512]")
    peers.add_argument("--limit-gib", type=float, default=4.0, help="of a rank's memory [4]")
    peers.add_argument("--chunk", type=int, default=16, help="pairs a chunk within it [16]")
    peers.add_argument(
        "--max-ratio",
        type=int,
        default=8,
        metavar="N",
        help="end the search at N times OpenCLIP's largest batch; 0 searches none [8]",
    )
    peers.add_argument("--timeout", type=float, default=600, help="of a training, seconds [600]")


def _add_conformance(conformance: argparse.ArgumentParser) -> None:
    conformance.add_argument("--processes", type=int, default=2, help="ranks on this machine [2]")


def _add_shard(shard: argparse.ArgumentParser) -> None:
    shard.add_argument("folder", metavar="DIR", type=Path, help="for the files, some GB")
    shard.add_argument("--images", type=int, default=20_000, help="untouched (default: 20000)")
    shard.add_argument("--resized", type=int, default=3_000, help="shrunk (default: 3000)")
    shard.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    shard.add_argument("--img2dataset", metavar="PROGRAM", help="path of its command, if installed")


def _add_order(order: argparse.ArgumentParser) -> None:
    order.add_argument(
        "--ranks", type=int, nargs="*", default=[1, 2, 3, 4], help="(default: 1 2 3 4)"
    )
    order.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="a rank (default: 0 1 2)"
    )
    order.add_argument(
        "--memory-samples",
        type=int,
        default=0,
        metavar="N",
        help="measure a worker's memory over an epoch of N samples (default: not)",
    )


def _add_recipes(recipes: argparse.ArgumentParser) -> None:
    recipes.add_argument("--processes", type=int, default=2, help="ranks on this machine [2]")
    recipes.add_argument("--batch", type=int, default=128, help="global batch [128]")
    recipes.add_argument("--chunk", type=int, default=32, help="pairs a chunk [32]")
    recipes.add_argument("--rounds", type=int, default=3, help="measurements of every case [3]")
    recipes.add_argument("--steps", type=int, default=1, help="timed steps of each [1]")


def _add_install(install: argparse.ArgumentParser) -> None:
    install.add_argument(
        "--extras",
        nargs="*",
        default=[
            "train",
            "open_clip",
            "lora",
            "suites",
            "onnx",
            "faiss",
            "parquet",
            "remote",
            "wandb",
            "mlflow",
            "dev",
        ],
        help="extras to measure (default: all for users, and dev)",
    )


def _add_batch(batch: argparse.ArgumentParser) -> None:
    batch.add_argument("folder", metavar="RUNS", help="the folder of `benchmarks.batch_search`")
    batch.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[64, 256, 512, 1024, 2048, 4096],
        help="[%(default)s]",
    )
    batch.add_argument(
        "--target",
        type=float,
        nargs="+",
        default=[100.0, 150.0],
        help="values of rsum until which samples are counted [100 150]",
    )
    batch.add_argument("--picture", metavar="FILE", help="write the curve as SVG")


def _add_large(large: argparse.ArgumentParser) -> None:
    large.description = (
        "Time the commands that read many or large files, with their peak memory. The inputs are "
        "made in DIR first, and kept there for the next time. A size of 0 leaves a case out."
    )
    large.add_argument("folder", metavar="DIR", type=Path, help="for the inputs, some GB")
    large.add_argument("--runs", type=int, default=10_000, help="runs of a sweep [10000]")
    large.add_argument("--metrics-mib", type=int, default=1024, help="of metrics.jsonl [1024]")
    large.add_argument("--captions", type=int, default=2_000_000, help="embedded ones [2000000]")
    large.add_argument("--dim", type=int, default=256, help="embedding size [256]")
    large.add_argument("--shards", type=int, default=3_000, help="of a data set [3000]")
    large.add_argument("--samples", type=int, default=20, help="of a shard [20]")


BENCHMARKS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "loss": ("the losses over the batch, and OpenCLIP's", _add_loss),
    "cache": ("gradient caching, OpenCLIP's and GradCache's", _add_cache),
    "eval": ("retrieval by tiles, and VSE++'s way", _add_eval),
    "data": ("the stream's speed, and OpenCLIP's", _add_data),
    "order": ("what an epoch misses and repeats", _add_order),
    "peers": ("OpenCLIP's trainer and ours, end to end", _add_peers),
    "batch": ("rsum against batch for each loss, from trainings", _add_batch),
    "recipes": ("a step's time and memory with each option of training", _add_recipes),
    "install": ("what dist_vse and its extras take on disk", _add_install),
    "conformance": ("gradients of OpenCLIP, sentence-transformers, GradCache", _add_conformance),
    "large": ("commands that read many or large files", _add_large),
    "shard": ("sharding, tar, ShardWriter and img2dataset", _add_shard),
}
"""Benchmark NAME is `run` in `benchmarks.NAME`."""
