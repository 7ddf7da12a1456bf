"""The configuration of a run."""

from dist_vse.config.encoders import ImageConfig, LoraConfig, TextConfig
from dist_vse.config.load import dump_config, flat_config, load_config, load_yaml
from dist_vse.config.optimizers import OptimConfig
from dist_vse.config.schema import TrainConfig
from dist_vse.config.sections import (
    CacheConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    MixConfig,
    ModelConfig,
)

__all__ = [
    "CacheConfig",
    "DataConfig",
    "EngineConfig",
    "ImageConfig",
    "LoraConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "TextConfig",
    "TrainConfig",
    "dump_config",
    "flat_config",
    "load_config",
    "load_yaml",
]
