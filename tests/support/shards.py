"""Helpers for tests of the sharding tool: run it, and write its inputs."""

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from dist_vse.shards import cli
from tests.support.datasets import draw, encode

IMG2DATASET = {"url": "http://x/1.jpg", "status": "success", "width": 32, "height": 32}


def run_shard(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(a) for a in arguments]))


def write_pairs(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for i in range(count):
            (folder / f"{i}.png").write_bytes(encode(draw(i)))
            file.write(json.dumps({"image": f"{i}.png", "captions": ["a", "b"]}) + "\n")
    return path


def write_tar(path: Path, members: dict[str, bytes | str | dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            data = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_img2dataset(folder: Path, count: int = 7) -> list[Path]:
    """Write two tars as img2dataset does, with its notes beside them."""
    tars = []
    for shard in range(2):
        members: dict[str, bytes | str | dict[str, object]] = {}
        for i in range(shard * 100, shard * 100 + count):
            key, caption = f"{i:09d}", f"a drawing, number {i}"
            members[f"{key}.jpg"] = encode(draw(i), "JPEG")
            members[f"{key}.json"] = {**IMG2DATASET, "key": key, "caption": caption}
            members[f"{key}.txt"] = caption
        tars.append(write_tar(folder / f"{shard:05d}.tar", members))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return tars


def karpathy_sentences(imgid: int, captions: list[str]) -> dict[str, Any]:
    sentids = [imgid * 5 + i for i in range(len(captions))]
    sentences = [
        {"tokens": raw.lower().strip(" .").split(), "raw": raw, "imgid": imgid, "sentid": sentid}
        for raw, sentid in zip(captions, sentids, strict=True)
    ]
    return {"imgid": imgid, "sentids": sentids, "sentences": sentences}


COCO: dict[str, Any] = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000391895.jpg",
            "split": "test",
            "cocoid": 391895,
            **karpathy_sentences(0, [f"A man rides a motor bike, take {i}." for i in range(6)]),
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000522418.jpg",
            "split": "restval",
            "cocoid": 522418,
            **karpathy_sentences(1, [f" A woman cuts a cake, take {i}. " for i in range(7)]),
        },
        {
            "filepath": "train2014",
            "filename": "COCO_train2014_000000318219.jpg",
            "split": "train",
            "cocoid": 318219,
            **karpathy_sentences(2, [f"A boy with headphones {i}" for i in range(5)]),
        },
    ],
    "dataset": "coco",
}
