"""The options of `dist-vse import`."""

import argparse
from pathlib import Path

from dist_vse.common.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be imported, and where to."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    convse = kinds.add_parser("convse", help="a checkpoint of ConVSE's or VSE++'s code, as a run")
    convse.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="their .pth.tar file")
    convse.add_argument("out", metavar="OUT", type=Path, help="the run's folder to write")
    convse.add_argument(
        "--vocabulary",
        metavar="FILE",
        type=Path,
        required=True,
        help="their pickled vocabulary, or what `import vocabulary` made of it",
    )
    convse.add_argument("--data", metavar="DIR", default="", help="the run's sharded data set")
    words = kinds.add_parser("vocabulary", help="their pickled vocabulary, as JSON")
    words.add_argument("pickle", metavar="FILE", type=Path, help="such as coco_vocab.pkl")
    words.add_argument("out", metavar="OUT", type=Path, help="for model.text.vocabulary")


def run(args: argparse.Namespace) -> int:
    """Import; return 0."""
    if args.kind == "vocabulary":
        from dist_vse.tools.convse.vocabulary import MAX_TOKENS, read_vocabulary, tokenizer_of

        tokenizer_of(read_vocabulary(args.pickle), MAX_TOKENS).save(args.out)
    else:
        from dist_vse.tools.convse.checkpoint import import_checkpoint

        import_checkpoint(args.checkpoint, args.out, vocabulary=args.vocabulary, data=args.data)
    say(f"wrote {args.out}")
    return 0
