"""The losses over the global batch: exact on any number of ranks, in linear memory."""

from dist_vse.contrast.ahead import Ahead
from dist_vse.contrast.objective import LossOutput, global_loss
from dist_vse.contrast.telemetry import collapsed

__all__ = ["Ahead", "LossOutput", "collapsed", "global_loss"]
