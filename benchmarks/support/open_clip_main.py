"""OpenCLIP's own trainer with a model config of ours, which its command line has no option for.

`torchrun ... -m benchmarks.support.open_clip_main FOLDER [options]`: FOLDER
holds the config; everything after it goes to OpenCLIP's `main` as it is.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.support.open_clip_pipeline import mend_reader


def main(arguments: list[str]) -> None:
    """Register the config, mend what fails here, and train."""
    import open_clip
    from open_clip_train.main import main as train

    folder, *options = arguments
    open_clip.add_model_config(Path(folder))
    mend_reader()
    torch.nn.parallel.DistributedDataParallel = _without_device  # type: ignore[assignment,misc]
    train(options)


def _without_device(model: nn.Module, device_ids: Any = None, **options: Any) -> nn.Module:
    """Wrap as OpenCLIP 3.3.0 does, which names the device: PyTorch refuses that for a CPU."""
    return DistributedDataParallel(model, **options)


if __name__ == "__main__":
    main(sys.argv[1:])
