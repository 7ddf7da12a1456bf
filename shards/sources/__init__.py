"""Where samples come from: one function a format, from a path to records.

To add a source, write `read_x(path, *, ...) -> Iterator[Record]` and name it in `SOURCES`
with a line of help. Its keyword parameters are the command's options that it understands
(`dist_vse.shards.options`). A heavy import belongs into the function: `dist-vse --help` reads this
dict.
"""

from collections.abc import Callable, Iterator

from dist_vse.shards.record import Record
from dist_vse.shards.sources.coco import read_coco
from dist_vse.shards.sources.flickr import read_flickr
from dist_vse.shards.sources.folder import read_folder
from dist_vse.shards.sources.jsonl import read_jsonl
from dist_vse.shards.sources.karpathy import read_karpathy
from dist_vse.shards.sources.precomp import read_precomp
from dist_vse.shards.sources.reshard import read_tars
from dist_vse.shards.sources.table import read_csv, read_parquet, read_tsv
from dist_vse.shards.sources.urls import read_urls

SOURCES: dict[str, tuple[str, Callable[..., Iterator[Record]]]] = {
    "folder": ("images with a .txt beside each, one caption a line", read_folder),
    "jsonl": ('lines of {"image": path, "captions": [...]}', read_jsonl),
    "karpathy": ("Karpathy's dataset_coco.json or dataset_flickr30k.json", read_karpathy),
    "coco": ("COCO's own captions_train2017.json", read_coco),
    "flickr": (
        "Flickr's results_20130124.token, or Kaggle's results.csv or captions.txt",
        read_flickr,
    ),
    "csv": ("a CSV file with a header", read_csv),
    "tsv": ("a tab-separated file with a header", read_tsv),
    "parquet": ("a Parquet file, or a folder of them", read_parquet),
    "urls": ("a list of URLs to download: .csv, .tsv, .parquet or .jsonl", read_urls),
    "precomp": ("train_ims.npy and train_caps.txt, features as VSE++ stores them", read_precomp),
    "reshard": ("existing tars, WebDataset's or img2dataset's", read_tars),
}
