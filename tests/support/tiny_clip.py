"""Random CLIP and SigLIP models of a few thousand parameters, saved as their libraries do."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from dist_vse.config import TrainConfig, load_config
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.runs.resolve import with_start
from dist_vse.runs.trained import run_tokenizer

KINDS = [(library, kind) for library in ("hf", "open_clip") for kind in ("clip", "siglip")]
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "green", "square", "circle", "on")
LENGTH = 12
SIDE = 32


def write_all(root: Path) -> Path:
    """Save a checkpoint of each library and kind, `LIBRARY-KIND`; return the folder of all."""
    for library, kind in KINDS:
        write = {"hf": write_hf, "open_clip": write_open_clip}[library]
        write(root / f"{library}-{kind}", kind)
    return root


def starting_from(folder: Path, *overrides: str) -> TrainConfig:
    """Return the config of a run that starts from the checkpoint."""
    return with_start(load_config(None, [f"model.pretrained={folder}", *overrides]))


def build(folder: Path, *overrides: str) -> DualEncoder:
    """Build our model with the checkpoint's weights."""
    config = starting_from(folder, *overrides)
    tokenizer = run_tokenizer(config, folder, build=False)
    return build_model(config.model, config.loss, tokenizer).eval()


def write_hf(folder: Path, kind: str) -> Path:
    """Save a random `clip` or `siglip` of transformers with tokenizer and preprocessing."""
    text = {"vocab_size": 64, "max_position_embeddings": LENGTH}
    specials = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": SIDE, "patch_size": 8}
    width = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    how = {"text_config": text | specials | width, "vision_config": vision | width}
    side = {"height": SIDE, "width": SIDE}
    pixels: CLIPImageProcessor | SiglipImageProcessor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(**how, projection_dim=16))
            pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side)
        else:
            model = SiglipModel(SiglipConfig(**how))
            model.logit_bias.data.fill_(-7.5)
            pixels = SiglipImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.4] * 3)
        model.logit_scale.data.fill_(3.25)
    model.save_pretrained(folder)
    pixels.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, **specials)


def write_open_clip(folder: Path, kind: str) -> Path:
    """Save a random model of OpenCLIP: `clip` (as .bin) or `siglip` (as .safetensors)."""
    import open_clip
    from safetensors.torch import save_file

    size = {"layers": 2, "width": 32}
    text = {**size, "heads": 2, "context_length": LENGTH, "vocab_size": 49408}
    vision = {**size, "head_width": 16, "patch_size": 8, "image_size": SIDE}
    if kind == "siglip":
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    pixels = {"mean": [0.5] * 3, "std": [0.4] * 3}
    if kind == "siglip":
        model |= {"init_logit_bias": -7.5, "custom_text": True}
        pixels |= {"resize_mode": "squash", "interpolation": "bilinear"}  # type: ignore[dict-item]
    config = {"model_cfg": model, "preprocess_cfg": pixels}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = open_clip.create_model(f"local-dir:{folder}")
    whole.logit_scale.data.fill_(3.25)
    state = {name: x.clone().contiguous() for name, x in whole.state_dict().items()}
    if kind == "siglip":
        save_file(state, folder / "open_clip_model.safetensors")
    else:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder
