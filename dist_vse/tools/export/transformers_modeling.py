"""An image encoder of timm and a text encoder of transformers into one space of unit vectors.

A copy of this file lies in each folder that `dist-vse export --format transformers` writes. It
needs torch, transformers and timm.
"""

from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel


class DualEncoderConfig(PretrainedConfig):  # type: ignore[misc]
    """The shapes of both encoders and heads."""

    model_type = "dist_vse"

    def __init__(self, **given: Any) -> None:
        self.image_model = given.pop("image_model", "")
        self.image_size = given.pop("image_size", 224)
        self.image_mean = given.pop("image_mean", [0.5] * 3)
        self.image_std = given.pop("image_std", [0.5] * 3)
        self.text_config = given.pop("text_config", {})
        self.text_pooling = given.pop("text_pooling", "mean")
        self.head_widths = given.pop("head_widths", [])
        super().__init__(**given)


class DualEncoderModel(PreTrainedModel):  # type: ignore[misc]
    """Images (b, 3, h, w), normalised, and tokens (b, l) to unit vectors (b, d)."""

    config_class = DualEncoderConfig

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        try:
            size = {"img_size": config.image_size}
            self.image = timm.create_model(config.image_model, num_classes=0, **size)
        except TypeError:  # a convolutional net takes any size
            self.image = timm.create_model(config.image_model, num_classes=0)
        text = dict(config.text_config)
        self.text = AutoModel.from_config(AutoConfig.for_model(text.pop("model_type"), **text))
        self.image_head, self.text_head = map(_head, config.head_widths)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave all as it is: the weights are loaded."""

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """Return unit vectors of normalised images."""
        return nn.functional.normalize(self.image_head(self.image(pixel_values)), dim=-1)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Return unit vectors of tokens; without a mask, all that are not padding count."""
        if attention_mask is None:
            attention_mask = (input_ids != self.text.config.pad_token_id).long()
        states = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.text_pooling == "cls":
            pooled = states[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(self.text_head(pooled), dim=-1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the features of images and texts."""
        texts = self.get_text_features(input_ids, attention_mask)
        return self.get_image_features(pixel_values), texts


def _head(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)
