"""Five losses at four batch sizes, three seeds each, on real pairs: the table of docs/results.md.

    python demo/openmoji.py runs/results && python -m demo.mixed runs/results
    python demo/weights.py runs/results/weights
    dist-vse shard jsonl runs/results/mixed.jsonl runs/results/shards
    python -m demo.results runs/results

The trunks are frozen (EfficientNet-Lite0 at 224 pixels, MiniLM), so that their outputs are computed
once and kept in memory; only the heads are trained, by the losses of `dist_vse.contrast`. Every run
sees the same number of pairs; the learning rate grows with the root of the batch. A run that is in
`results.jsonl` already is not run again. `--rate` tries other learning rates, kept apart.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from demo.results_table import table
from dist_vse.config import ImageConfig, OptimConfig, TextConfig
from dist_vse.data.eval_stream import eval_batches
from dist_vse.data.index import image_id, read_index
from dist_vse.evaluation.retrieval import RECALLS, content_pairs, rank_all, summary
from dist_vse.losses.global_loss import global_loss
from dist_vse.models.build import build_head
from dist_vse.models.image import build_image_trunk
from dist_vse.models.text import build_text_trunk
from dist_vse.models.tokenizer import PretrainedTokenizer
from dist_vse.training.schedule import learning_rate

LOSSES = {  # temperature, learned
    "convse": (0.1, False),
    "convse++": (0.1, False),
    "vse++": (0.1, False),
    "info_nce": (0.07, True),
    "siglip": (0.1, True),
}
BATCHES = (128, 512, 2048, 8192)
SEEDS = (0, 1, 2)
SPLITS = ("train", "val", "test")
SIZE, TOKENS = 224, 32
DIM, HIDDEN, DROPOUT = 256, 1024, 0.1
RATES = {"convse": 3e-3, "convse++": 1e-3, "vse++": 1e-3, "info_nce": 3e-3, "siglip": 3e-3}
RATE_BATCH = 512
PAIRS = 26 * 8192  # 25 epochs of the 8,435 images, and a multiple of every batch
KEY = ("loss", "batch", "seed", "pairs", "rate")  # of a run


@dataclass(frozen=True)
class Data:
    """A split's trunk outputs: n images, m captions."""

    images: Tensor  # (n, 1280)
    texts: Tensor  # (m, 384)
    image_of_text: Tensor  # (m,), rising
    image_ids: Tensor  # (n,)
    text_ids: Tensor  # (m,)


@torch.inference_mode()
def compute(folder: Path) -> dict[str, Data]:
    """Run both trunks over all splits, or read what an earlier call kept."""
    weights, path = folder / "weights", folder / "features.pt"
    index = read_index(folder / "shards")
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["fingerprint"] == index.fingerprint():
            return {split: Data(**kept[split]) for split in SPLITS}
    tokenizer = PretrainedTokenizer(weights / "minilm", TOKENS)
    image_config = ImageConfig(
        name="tf_efficientnet_lite0",
        weights=str(weights / "efficientnet_lite0.safetensors"),
        size=SIZE,
    )
    text_config = TextConfig(kind="pretrained", weights=str(weights / "minilm"), max_tokens=TOKENS)
    image_trunk = build_image_trunk(image_config, grad_checkpointing=False).eval()
    text_trunk = build_text_trunk(
        text_config,
        tokenizer,
        grad_checkpointing=False,
    ).eval()
    found: dict[str, Any] = {"fingerprint": index.fingerprint()}
    for split in SPLITS:
        images: list[Tensor] = []
        texts: list[Tensor] = []
        rows: list[Tensor] = []
        image_ids: list[Tensor] = []
        captions: list[str] = []
        for batch in eval_batches(index, split, tokenizer, ImageConfig(size=SIZE), batch_size=64):
            rows.append(batch.image_of_text + sum(len(part) for part in images))
            images.append(image_trunk(batch.images))
            texts.append(text_trunk(batch.tokens))
            image_ids.append(batch.image_ids)
            captions += batch.captions
        found[split] = {
            "images": torch.cat(images),
            "texts": torch.cat(texts),
            "image_of_text": torch.cat(rows),
            "image_ids": torch.cat(image_ids),
            "text_ids": torch.tensor([image_id(caption) for caption in captions]),
        }
        print(
            f"{split}: {len(found[split]['images']):,} images, {len(captions):,} captions",
            flush=True,
        )
    torch.save(found, path)
    return {split: Data(**found[split]) for split in SPLITS}


def draw(counts: Tensor, total_pairs: int) -> tuple[Tensor, Tensor]:
    """Draw the images of all steps, (total_pairs,), epoch after epoch, and a caption for each.

    Each epoch holds each image once; its captions (`counts` of them) take turns from a random one
    on. Captions are numbered image after image.
    """
    n = len(counts)
    epochs = math.ceil(total_pairs / n)
    rows = torch.cat([torch.randperm(n) for _ in range(epochs)])[:total_pairs]
    epoch = torch.arange(total_pairs) // n
    start = (torch.rand(n) * counts).long()
    first = counts.cumsum(0) - counts
    return rows, first[rows] + (start[rows] + epoch) % counts[rows]


def train(
    data: Data, loss: str, *, batch_size: int, total_pairs: int, seed: int, rate: float
) -> nn.ModuleList:
    """Train both heads; return them in eval mode.

    `rate` is the peak learning rate at a batch of 512. The heads compute in bfloat16 (autocast),
    the loss in float32. A batch holds an image twice only where an epoch ends, as in the stream.
    """
    torch.manual_seed(seed)
    heads = nn.ModuleList(
        build_head(x.shape[1], DIM, HIDDEN, DROPOUT) for x in (data.images, data.texts)
    )
    temperature, learned = LOSSES[loss]
    scale = nn.Parameter(torch.tensor([-math.log(temperature)]), requires_grad=learned)
    bias = nn.Parameter(torch.tensor([-10.0]), requires_grad=loss == "siglip")
    peak = rate * math.sqrt(batch_size / RATE_BATCH)
    groups = [
        {"params": list(heads.parameters()), "weight_decay": 0.1},
        {"params": [p for p in (scale, bias) if p.requires_grad], "weight_decay": 0.0},
    ]
    optim = OptimConfig(lr=peak, warmup_samples=total_pairs // 20)
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, fused=True)
    rows, texts = draw(data.image_of_text.bincount(), total_pairs)
    for start in range(0, total_pairs, batch_size):
        i, t = rows[start : start + batch_size], texts[start : start + batch_size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(start, optim, total_samples=total_pairs)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = heads[0](data.images[i]), heads[1](data.texts[t])
        image_features, text_features = (normalize(x.float(), dim=1) for x in outputs)
        output = global_loss(
            loss,
            image_features,
            text_features,
            scale.clamp(max=math.log(100)),
            bias,
            image_ids=data.image_ids[i],
            text_ids=data.text_ids[t],
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return heads.eval()


@torch.inference_mode()
def test(data: Data, heads: nn.ModuleList) -> dict[str, Any]:
    """Return the metrics on a split, and what each image adds to rsum."""
    images, texts = (
        normalize(head(x), dim=1) for head, x in zip(heads, (data.images, data.texts), strict=True)
    )
    pairs = content_pairs(data.image_of_text, data.image_ids, data.text_ids)
    i2t, t2i = rank_all(images, texts, pairs)
    hits, text_hits = (torch.stack([r.hits(k) for k in RECALLS]).sum(0) for r in (i2t, t2i))
    of_texts = torch.zeros(len(images), dtype=torch.float64)
    of_texts.index_add_(0, data.image_of_text, text_hits)
    rows = {
        "image_hits": hits.tolist(),
        "text_hits": of_texts.tolist(),
        "captions": data.image_of_text.bincount(minlength=len(images)).tolist(),
    }
    return {"metrics": summary(i2t, t2i), "of_images": rows}


def main() -> int:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="Losses by batch sizes on real pairs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="seen by every run [%(default)s]")
    parser.add_argument("--rate", type=float, help="at a batch of 512 [each loss's own]")
    parser.add_argument("--losses", nargs="+", choices=[*LOSSES], default=[*LOSSES])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    odd = [batch for batch in args.batches if args.pairs % batch]
    if odd:
        parser.error(f"--pairs ({args.pairs}) must be a multiple of every batch ({odd[0]})")
    data = compute(args.folder)
    path = args.folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {tuple(result[key] for key in KEY) for result in results}
    rates = {loss: args.rate or RATES[loss] for loss in args.losses}
    # A whole table a seed: the first one is there soon.
    for seed, batch, loss in itertools.product(args.seeds, args.batches, args.losses):
        setting = dict(zip(KEY, (loss, batch, seed, args.pairs, rates[loss]), strict=True))
        if tuple(setting.values()) not in done:
            results.append(setting | _run(data, **setting))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    wanted = {(loss, args.pairs, rate) for loss, rate in rates.items()}
    of_these = [r for r in results if (r["loss"], r["pairs"], r["rate"]) in wanted]
    print(table(of_these, args.losses, args.batches))
    return 0


def _run(
    data: dict[str, Data], *, loss: str, batch: int, seed: int, pairs: int, rate: float
) -> dict[str, Any]:
    started = time.process_time()
    how = {"batch_size": batch, "total_pairs": pairs, "seed": seed}
    heads = train(data["train"], loss, rate=rate, **how)
    result: dict[str, Any] = {split: test(data[split], heads) for split in ("val", "test")}
    result["core_seconds"] = time.process_time() - started
    rsum = {split: result[split]["metrics"]["rsum"] for split in ("val", "test")}
    print(
        f"{loss} {batch} seed {seed} rate {rate:g}: rsum {rsum['test']:.1f} "
        f"(val {rsum['val']:.1f}), {result['core_seconds']:.0f} s of a core",
        flush=True,
    )
    return result


if __name__ == "__main__":
    raise SystemExit(main())
