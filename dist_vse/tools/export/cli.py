"""The options of `dist-vse export`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to export and where to."""
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="a trained run, or a folder of its checkpoints"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--onnx", action="store_true", help="add image.onnx and text.onnx (extra onnx)"
    )


def run(args: argparse.Namespace) -> int:
    """Export; return 0."""
    from dist_vse.tools.export.write import export_run

    print(f"wrote {export_run(args.run_dir, args.out, onnx=args.onnx)}")
    return 0
