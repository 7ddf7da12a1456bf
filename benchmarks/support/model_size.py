"""How alike the two models of `peers` are: parameters, and FLOPs of a forward."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.trainer_data import CONTEXT, MODEL
from benchmarks.support.trainers import OURS, PEER, STREAMS, Setting, Task, write_our_config
from dist_vse.config import load_config
from dist_vse.data.eval_stream import captions
from dist_vse.data.streams import open_train_sets
from dist_vse.models.build import build_model
from dist_vse.models.tokenizer import build_tokenizer

Size = dict[str, int]


def model_sizes(setting: Setting) -> dict[str, Size]:
    """Return the parameters and a pair's FLOPs (forward, matrix products) of each trainer's model.

    Both are built by their own builders from the files that the trainings read.
    """
    images = torch.zeros(1, 3, setting.model.size, setting.model.size)
    tokens = torch.ones(1, CONTEXT, dtype=torch.int64)
    models = {PEER: _peer_model(setting), OURS: _our_model(setting)}
    return {name: _size(model, images, tokens) for name, model in models.items()}


def _size(model: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> Size:
    with FlopCounterMode(display=False) as counter:
        model.train()(images, tokens)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": parameters, "forward_flops": counter.get_total_flops()}


def _peer_model(setting: Setting) -> nn.Module:
    import open_clip

    open_clip.add_model_config(setting.folder / "peer")
    model: nn.Module = open_clip.create_model(MODEL, force_image_size=setting.model.size)
    return model


def _our_model(setting: Setting) -> nn.Module:
    path = setting.folder / "config.yaml"
    write_our_config(path, setting, Task(OURS, STREAMS, 1, 1))
    config = load_config(path)
    (a_set,) = open_train_sets(config.data)
    words = build_tokenizer(config.model.text, lambda: captions(a_set.index, a_set.split), None)
    return build_model(config.model, config.loss, words, seed=config.seed)
