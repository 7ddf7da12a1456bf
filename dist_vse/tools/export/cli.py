"""The options of `dist-vse export`."""

import argparse
from pathlib import Path

from dist_vse.common.terminal import say
from dist_vse.tools.export.options import FORMS, OWN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to export and where to."""
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="a trained run, or a folder of its checkpoints"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--format",
        choices=FORMS,
        default=OWN,
        help="the library that is to load the folder (default: dist_vse.load)",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/MODEL",
        help="upload the folder to huggingface.co, or to HF_ENDPOINT, as a private model",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="add image.onnx and text.onnx (extra onnx)"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add the adapters of model.lora to the weights of their layers; else they stay apart",
    )


def run(args: argparse.Namespace) -> int:
    """Export; return 0."""
    from dist_vse.tools.export.write import export_run

    path = export_run(
        args.run_dir,
        args.out,
        onnx=args.onnx,
        form=args.format,
        name=args.push,
        merge=args.merge,
    )
    say(f"wrote {path}")
    if args.push is not None:
        from dist_vse.tools.export.hub import push

        say(f"uploaded {push(path, args.push)}")
    return 0
