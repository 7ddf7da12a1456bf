"""The authors' parameters by our names.

Their image encoder is `cnn` (a ResNet within DataParallel), `fc` and, where ConVSE's MLP is used,
`g_I`; their text encoder is `embed`, `rnn` and `g_T`. VSE++ has the same without the MLPs. An image
encoder of precomputed features is `fc` alone.
https://github.com/anuragjain96/ConVsepp, https://github.com/fartashf/vsepp
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, ModelConfig, TextConfig

State = Mapping[str, Tensor]


def is_precomputed(image: State) -> bool:
    """Return whether an image encoder takes precomputed features."""
    return not any(name.startswith("cnn.") for name in image)


def model_shape(image: State, text: State, cnn: str) -> ModelConfig:
    """Return the model that these weights are of; `cnn` is the trunk's name, such as resnet152.

    Raises UserError for weights of another model.
    """
    for state, names in ((image, ("fc.weight", "fc.bias")), (text, ("embed.weight",))):
        for name in names:
            if name not in state:
                raise UserError(f"{name} is missing: not a checkpoint of VSE++ or ConVSE")
    has_mlp = "g_I.0.weight" in image
    if has_mlp != ("g_T.0.weight" in text):
        raise UserError("one encoder has an MLP and the other has none: not a checkpoint of ConVSE")
    size, numbers = image["fc.weight"].shape
    if is_precomputed(image):
        ours = ImageConfig(kind="vectors", size=numbers)
    elif any(name.startswith("cnn.module.") for name in image):
        ours = ImageConfig(
            name=cnn,
            crop_share=0.875,
            resampling="bilinear",
            normalize=True,
            projection=size if has_mlp else 0,
        )
    else:
        raise UserError("it holds no ResNet (cnn.module.*): checkpoints of VGG can't be imported")
    width = text["rnn.weight_hh_l0"].shape[1]
    return ModelConfig(
        image=ours,
        text=TextConfig(
            kind="gru",
            word_dim=text["embed.weight"].shape[1],
            width=width,
            depth=sum(name.startswith("rnn.weight_hh_l") for name in text),
            words="treebank",
            min_count=4,
            max_tokens=100,
        ),
        embed_dim=image["g_I.2.weight"].shape[0] if has_mlp else size,
        head_hidden=image["g_I.0.weight"].shape[0] if has_mlp else 0,
        head_bias=not has_mlp,
    )


def renamed(image: State, text: State) -> dict[str, Tensor]:
    """Return both encoders' weights by the names of our model of the same shape.

    VSE++ has no head behind the GRU; ours is then the identity, which changes no number.
    """
    ours: dict[str, Tensor] = {}
    for name, value in image.items():
        if name.startswith("cnn.module."):
            ours[name.replace("cnn.module.", "image.trunk.backbone.")] = value
    has_mlp = "g_I.0.weight" in image
    # Behind the normalisation: the map, hidden layer, ReLU, dropout, last layer; or dropout, map.
    places = {"fc": 1, "g_I.0": 2, "g_I.2": 5} if has_mlp else {"fc": 2}
    if is_precomputed(image):  # their features are not normalised: dropout, map
        places = {"fc": 1}
    layers = {f"image.head.{place}": (image, name) for name, place in places.items()}
    if has_mlp:
        layers |= {"text.head.0": (text, "g_T.0"), "text.head.3": (text, "g_T.2")}
    for ours_name, (state, name) in layers.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                ours[f"{ours_name}.{kind}"] = state[f"{name}.{kind}"]
    ours["text.trunk.words.weight"] = text["embed.weight"]
    for name, value in text.items():
        if name.startswith("rnn."):
            ours[name.replace("rnn.", "text.trunk.gru.")] = value
    if not has_mlp:
        width = text["rnn.weight_hh_l0"].shape[1]
        ours["text.head.1.weight"] = torch.eye(width)
        ours["text.head.1.bias"] = torch.zeros(width)
    return ours
