"""What sharding is measured against, and the photographs that all of them read."""

import io
import json
import sys
from pathlib import Path

from PIL import Image

from benchmarks.support.photos import photographs

DISTINCT = 64  # photographs that are made; the files repeat them


def write_photographs(folder: Path, count: int) -> Path:
    """Write `count` JPEG photographs with a caption each; return `pairs.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    if pairs.is_file() and len(pairs.read_text().splitlines()) == count:
        return pairs
    encoded = [data for data, _ in photographs(min(count, DISTINCT))]
    lines = []
    for number in range(count):
        path = folder / f"{number:08d}.jpg"
        path.write_bytes(encoded[number % len(encoded)])
        line = {
            "image": path.name,
            "url": path.as_uri(),  # for img2dataset
            "caption": f"a photograph of nothing, number {number}",
        }
        lines.append(json.dumps(line) + "\n")
    pairs.write_text("".join(lines))
    return pairs


def shard_writer(pairs: Path, out: Path, max_side: int) -> None:
    """Write the pairs with webdataset.ShardWriter, as its documentation shows."""
    import webdataset

    out.mkdir(parents=True)
    pattern = str(out / "train-%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=500, verbose=0) as sink, pairs.open() as lines:
        for number, line in enumerate(lines):
            fields = json.loads(line)
            data = (pairs.parent / fields["image"]).read_bytes()
            if max_side:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=90)
                data = buffer.getvalue()
            meta = {"key": f"{number:08d}", "captions": [fields["caption"]]}
            sample = {"__key__": f"{number:08d}", "jpg": data, "json": meta}
            sink.write(sample | {"txt": fields["caption"]})


def img2dataset_command(program: str, pairs: Path, out: Path, max_side: int) -> list[str]:
    """Return img2dataset's command for the same: files as URLs, two processes."""
    resize = "keep_ratio_largest" if max_side else "no"
    return [
        program,
        f"--url_list={pairs}",
        "--input_format=jsonl",
        "--url_col=url",
        "--caption_col=caption",
        f"--output_folder={out}",
        "--output_format=webdataset",
        "--number_sample_per_shard=500",
        "--processes_count=2",
        "--thread_count=16",
        f"--resize_mode={resize}",
        f"--image_size={max_side or 256}",
        "--resize_only_if_bigger=True",
        f"--skip_reencode={not max_side}",
        "--encode_quality=90",
        "--enable_wandb=False",
    ]


if __name__ == "__main__":
    shard_writer(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
