"""The names of ImageNet's classes and CLIP's templates, as timm and OpenCLIP ship them."""

from collections.abc import Sequence
from types import ModuleType

from dist_vse.common.errors import UserError

IMAGENET, CLIP = "imagenet", "clip"
_WHAT = "the names of ImageNet's classes and CLIP's templates need"


def imagenet_names(folders: Sequence[str]) -> dict[str, str]:
    """Return the name in words of each folder, which is named by its WordNet id (n01440764).

    The names are those that OpenAI wrote for CLIP. Raises UserError for a folder that is no class.
    """
    metadata = _metadata()
    from timm.data import ImageNetInfo

    numbers = {name: number for number, name in enumerate(ImageNetInfo().label_names())}
    unknown = [folder for folder in folders if folder not in numbers]
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is none of ImageNet's 1,000 classes: name the folders by WordNet id, "
            "such as n01440764, or give a file of names"
        )
    return {folder: metadata.IMAGENET_CLASSNAMES[numbers[folder]] for folder in folders}


def clip_templates() -> list[str]:
    """Return the 80 templates that CLIP was evaluated with, each with a `{}` for the name."""
    return [template("{}") for template in _metadata().OPENAI_IMAGENET_TEMPLATES]


def _metadata() -> ModuleType:
    try:
        from open_clip import zero_shot_metadata
    except ModuleNotFoundError as error:
        raise UserError(
            f"{_WHAT} the package {error.name}, which is not installed; "
            "pip install 'dist_vse[open_clip]'"
        ) from error
    module: ModuleType = zero_shot_metadata
    return module
