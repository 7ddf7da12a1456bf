"""What both trainers read: shards, a vocabulary, and OpenCLIP's config of the same model.

In a folder: `train/` and `val/` (ours alone evaluates, before and after what is timed) are sharded
data sets; `words/` is our word tokenizer as a Hugging Face one, with the same ids; `peer/` holds
the model config that OpenCLIP's registry reads.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.photos import photographs
from benchmarks.support.tars import write_tars
from dist_vse.data.eval_stream import captions
from dist_vse.data.index import read_index
from dist_vse.models.tokenizer import END, PAD, SPECIALS, WordTokenizer, build_vocabulary

CONTEXT = 20  # tokens: the longest caption has as many, so that neither trainer pads more
SHARDS = 8  # OpenCLIP wants one a worker at least
HELD_OUT = 16
MODEL = "measured"  # the config's name in OpenCLIP's registry
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Model:
    """A timm image trunk and a text transformer, with linear heads."""

    image: str
    size: int  # pixels
    text_width: int
    text_depth: int
    dim: int


def write_data(folder: Path, model: Model, count: int) -> None:
    """Make the shards of `count` photographs and the vocabulary of their captions."""
    for name, sizes in (("train", [count // SHARDS] * SHARDS), ("val", [HELD_OUT])):
        (folder / name).mkdir(parents=True)
        write_tars(folder / name, photographs(sum(sizes)), "jpg", sizes)
    vocabulary = build_vocabulary(captions(read_index(folder / "train"), "train"), 1)
    words = WordTokenizer(vocabulary, CONTEXT)
    write_words(folder / "words", words)
    (folder / "peer").mkdir()
    config = peer_config(model, words.vocab_size, folder / "words")
    (folder / "peer" / f"{MODEL}.json").write_text(json.dumps(config), encoding="utf-8")


def tar_paths(folder: Path) -> list[str]:
    """Return the training shards that `write_data` wrote there."""
    index = read_index(folder / "train")
    return [str(index.root / shard.path) for shard in index.split("train").shards]


def peer_config(model: Model, vocab_size: int, words: Path) -> dict[str, object]:
    """Return OpenCLIP's config of the model.

    All but two things are alike: OpenCLIP's text transformer has a causal mask, its default, where
    ours masks padding; and it takes the last token's state where ours takes the tokens' mean.
    """
    return {
        "embed_dim": model.dim,
        "vision_cfg": {
            "timm_model_name": model.image,
            "timm_model_pretrained": False,
            "timm_pool": "",  # the trunk's own
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": model.size,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": str(words),
            "width": model.text_width,
            "heads": model.text_width // HEAD_WIDTH,
            "layers": model.text_depth,
            "pool_type": "eos",
            "eos_id": END,
            "pad_id": PAD,
            "proj_bias": True,
        },
    }


def write_words(folder: Path, words: WordTokenizer) -> None:
    """Write our word tokenizer as a folder that transformers' AutoTokenizer reads."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pad, start, end, unknown = SPECIALS
    assert words.vocabulary is not None
    ids = {word: number for number, word in enumerate([*SPECIALS, *words.vocabulary])}
    made = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pattern = Regex(r"\w+(?:['\x{2019}]\w+)*|[^\w\s]")
    made.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "unk_token": unknown}
    text = json.dumps({**config, "model_max_length": words.max_tokens})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
