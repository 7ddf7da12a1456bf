"""Five losses at four batch sizes, three seeds each, on real pairs: the table of docs/results.md.

    python demo/openmoji.py runs/results && python -m demo.mixed runs/results
    python demo/weights.py runs/results/weights
    dist-vse shard jsonl runs/results/mixed.jsonl runs/results/shards
    python -m demo.results runs/results

The trunks are frozen (EfficientNet-Lite0 at 224 pixels, MiniLM), so that their outputs are computed
once and kept in memory; only the heads are trained, by the losses of `dist_vse.contrast`. Every run
sees the same number of pairs; the learning rate grows with the root of the batch. A run that is in
`results.jsonl` already is not run again.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dist_vse.config import ImageConfig, TextConfig
from dist_vse.contrast import global_loss
from dist_vse.index import image_id, read_index
from dist_vse.models.build import build_head
from dist_vse.models.image import build_image_trunk
from dist_vse.models.text import build_text_trunk
from dist_vse.models.tokenizer import PretrainedTokenizer
from dist_vse.retrieval import content_pairs, intervals, rank_all, summary
from dist_vse.schedule import learning_rate
from dist_vse.stream import eval_batches

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
RATE, RATE_BATCH = 1e-3, 512


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
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        grad_checkpointing=False,
    ).eval()
    found: dict[str, Any] = {"fingerprint": index.fingerprint()}
    for split in SPLITS:
        images: list[Tensor] = []
        texts: list[Tensor] = []
        rows: list[Tensor] = []
        image_ids: list[Tensor] = []
        captions: list[str] = []
        for batch in eval_batches(
            index, tokenizer, split=split, batch_size=64, size=SIZE, rank=0, world_size=1
        ):
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


def train(data: Data, loss: str, *, batch_size: int, total_pairs: int, seed: int) -> nn.ModuleList:
    """Train both heads; return them in eval mode.

    A batch holds an image twice only where an epoch ends.
    """
    torch.manual_seed(seed)
    heads = nn.ModuleList(
        build_head(x.shape[1], DIM, HIDDEN, DROPOUT) for x in (data.images, data.texts)
    )
    temperature, learned = LOSSES[loss]
    scale = nn.Parameter(torch.tensor([-math.log(temperature)]), requires_grad=learned)
    bias = nn.Parameter(torch.tensor([-10.0]), requires_grad=loss == "siglip")
    rate = RATE * math.sqrt(batch_size / RATE_BATCH)
    groups = [
        {"params": list(heads.parameters()), "weight_decay": 0.1},
        {"params": [p for p in (scale, bias) if p.requires_grad], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate)
    counts = data.image_of_text.bincount()
    first = counts.cumsum(0) - counts
    order = torch.empty(0, dtype=torch.int64)
    for step in range(math.ceil(total_pairs / batch_size)):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(data.images))])
        rows, order = order[:batch_size], order[batch_size:]
        texts = first[rows] + (torch.rand(batch_size) * counts[rows]).long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step * batch_size,
                peak=rate,
                schedule="cosine",
                warmup_samples=total_pairs // 20,
                total_samples=total_pairs,
            )
        image_features = normalize(heads[0](data.images[rows]), dim=1)
        text_features = normalize(heads[1](data.texts[texts]), dim=1)
        output = global_loss(
            loss,
            image_features,
            text_features,
            scale.clamp(max=math.log(100)),
            bias,
            image_ids=data.image_ids[rows],
            text_ids=data.text_ids[texts],
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return heads.eval()


@torch.inference_mode()
def test(data: Data, heads: nn.ModuleList) -> dict[str, Any]:
    """Return the metrics on a split, with 95 % bootstrap intervals over its images."""
    images, texts = (
        normalize(head(x), dim=1) for head, x in zip(heads, (data.images, data.texts), strict=True)
    )
    pairs = content_pairs(data.image_of_text, data.image_ids, data.text_ids)
    ranks = rank_all(images, texts, pairs)
    bands = intervals([(*ranks, data.image_of_text)], resamples=1000)
    return {"metrics": summary(*ranks), "intervals": bands}


def table(results: list[dict[str, Any]], batches: list[int]) -> str:
    """Write rsum as Markdown: the mean over seeds, its deviation, and the first seed's interval."""
    lines = ["| loss | " + " | ".join(f"batch {batch:,}" for batch in batches) + " |"]
    lines.append("| --- |" + " ---: |" * len(batches))
    for loss in LOSSES:
        cells = []
        for batch in batches:
            found = [r for r in results if r["loss"] == loss and r["batch"] == batch]
            sums = [r["test"]["metrics"]["rsum"] for r in found]
            if not sums:
                cells.append("")
                continue
            spread = statistics.stdev(sums) if len(sums) > 1 else 0.0
            low, high = found[0]["test"]["intervals"]["rsum"]
            cells.append(f"{statistics.mean(sums):.1f} ± {spread:.1f} [{low:.0f}, {high:.0f}]")
        lines.append(f"| {loss} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="Losses by batch sizes on real pairs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--pairs", type=int, default=500_000, help="seen by every run [%(default)s]"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    data = compute(args.folder)
    path = args.folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(r["loss"], r["batch"], r["seed"], r["pairs"]) for r in results}
    for seed in args.seeds:  # a whole table a seed: the first one is there soon
        for batch in args.batches:
            for loss in LOSSES:
                if (loss, batch, seed, args.pairs) in done:
                    continue
                started = time.perf_counter()
                heads = train(
                    data["train"], loss, batch_size=batch, total_pairs=args.pairs, seed=seed
                )
                result = {"loss": loss, "batch": batch, "seed": seed, "pairs": args.pairs}
                result |= {split: test(data[split], heads) for split in ("val", "test")}
                result["seconds"] = time.perf_counter() - started
                results.append(result)
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                rsum = result["test"]["metrics"]["rsum"]
                print(
                    f"{loss} {batch} seed {seed}: rsum {rsum:.1f}, {result['seconds']:.0f} s",
                    flush=True,
                )
    of_these = [r for r in results if r["pairs"] == args.pairs]
    print(table(of_these, args.batches))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
