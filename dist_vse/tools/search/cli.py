"""The options of `dist-vse search`, `embed`, `mine` and `zeroshot`."""

import argparse
from pathlib import Path

from dist_vse.common.consent import add_allow_pipe
from dist_vse.common.errors import UserError
from dist_vse.common.terminal import say

MODEL = "a trained run, a folder of its checkpoints, or an exported model"


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", type=Path, help=MODEL)


def _add_width(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="use the first N numbers of each embedding (models with loss.widths; default: all)",
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="sharded data set (default: the run's)")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    add_allow_pipe(parser)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add what to search, and for what."""
    _add_model(parser)
    _add_split(parser)
    parser.add_argument("--text", action="append", default=[], help="a query; may be repeated")
    parser.add_argument("--image", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument(
        "--index",
        type=Path,
        metavar="FILE",
        help="the split's features, as dist-vse embed wrote them to FILE.safetensors "
        "(default: compute them now)",
    )
    parser.add_argument("--top", type=int, default=10, help="answers a query (default: 10)")
    _add_width(parser)
    parser.add_argument(
        "--faiss", action="store_true", help="search in float32 with faiss, for large collections"
    )
    parser.add_argument("--sheet", type=Path, metavar="OUT", help="write them as .html or .png")


def run_search(args: argparse.Namespace) -> int:
    """Search; return 0."""
    if args.top < 1:
        raise UserError(f"--top ({args.top}) must be at least 1")

    from dist_vse.tools.search.found import Queries
    from dist_vse.tools.search.run import search

    search(
        args.model,
        Queries(args.text, args.image),
        data=args.data,
        split=args.split,
        top=args.top,
        sheet=args.sheet,
        faiss=args.faiss,
        index_file=args.index,
        width=args.width,
        allow_pipe=args.allow_pipe,
    )
    return 0


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Add what to embed, and where to."""
    _add_model(parser)
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a name that ends in .npy, .safetensors or .parquet"
    )
    _add_split(parser)
    _add_width(parser)
    parser.add_argument(
        "--precision",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="int8: a quarter of the size; binary: int8 and a bit a number, for a faster search; "
        "both as .safetensors, with the recall against float32 (default: float32)",
    )


def run_embed(args: argparse.Namespace) -> int:
    """Write a split's features; return 0. Every rank of a launcher may call this."""
    from dist_vse import distributed
    from dist_vse.common.files import check_output
    from dist_vse.evaluation.retrieval.checks import check_finite
    from dist_vse.evaluation.width import check_width
    from dist_vse.tools.search.codes import measured_recall
    from dist_vse.tools.search.embed import check_suffix, embed_split, open_data, open_model
    from dist_vse.tools.search.embed import write_embeddings as write
    from dist_vse.tools.search.gallery import origin

    with distributed.process_group():
        with distributed.raise_on_all_ranks():
            check_suffix(args.out, args.precision)
            index = open_data(args.model, args.data, allow_pipe=args.allow_pipe)
            index.split(args.split)
            model = open_model(args.model)
            check_width(args.width, model.dim)
            if distributed.is_main_process():
                check_output(args.out)
        found = embed_split(model, index, args.split, args.width)
        check_finite(found.image_features, found.text_features)
        with distributed.raise_on_all_ranks():
            if distributed.is_main_process():
                made_from = origin(model.model, index, args.split)
                files = write(found, args.out, made_from, precision=args.precision)
                say(f"wrote {', '.join(map(str, files))}")
                if args.precision != "float32":
                    say(measured_recall(found, args.precision))
    return 0


def add_mine(parser: argparse.ArgumentParser) -> None:
    """Add what to mine, and where to."""
    _add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new data set")
    parser.add_argument("--data", metavar="DIR", help="sharded data set (default: the run's)")
    parser.add_argument("--split", default="train", help="its split to mine for (default: train)")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="negatives an image (default: 5)"
    )
    parser.add_argument(
        "--ignore-above",
        type=float,
        metavar="M",
        help="leave out texts within M of the cosine of the image's nearest own caption, or above "
        "(default: none)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that write shards [1]"
    )
    add_allow_pipe(parser)


def run_mine(args: argparse.Namespace) -> int:
    """Mine; return 0. Every rank of a launcher may call this."""
    if args.top < 1 or args.workers < 1:
        raise UserError("--top and --workers take numbers from 1 on")

    from dist_vse.tools.search.mine import Mining, mine

    mine(
        args.model,
        args.out,
        Mining(args.split, args.top, args.ignore_above),
        data=args.data,
        workers=args.workers,
        allow_pipe=args.allow_pipe,
    )
    return 0


def add_zeroshot(parser: argparse.ArgumentParser) -> None:
    """Add the images, and what their classes are called."""
    _add_model(parser)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help="a folder of images for each class"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="lines FOLDER<TAB>NAME, or imagenet: folders named by WordNet id (default: the "
        "folders' names)",
    )
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help="lines with a {} for the name, or clip: CLIP's 80 (default: a photo of a {}.)",
    )
    parser.add_argument(
        "--top",
        type=int,
        nargs="+",
        metavar="K",
        help="fewer than there are classes (default: 1, and 5 where there are more classes)",
    )


def run_zeroshot(args: argparse.Namespace) -> int:
    """Classify; return 0."""
    if args.top is not None and min(args.top) < 1:
        raise UserError("--top takes numbers from 1 on")

    from dist_vse.tools.search.zeroshot import zeroshot

    how = {"data": args.data, "classes": args.classes, "templates": args.templates}
    zeroshot(args.model, **how, top=args.top)
    return 0
