"""`dist-vse search`: the images of a split that fit a text or another image best."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.files import check_output
from dist_vse.common.log import setup_logging
from dist_vse.common.terminal import plain
from dist_vse.evaluation.examples import NEIGHBOURS
from dist_vse.evaluation.retrieval import neighbours, top_k
from dist_vse.evaluation.retrieval.checks import check_finite
from dist_vse.evaluation.width import check_width
from dist_vse.losses.nested import first_features
from dist_vse.tools.report.images import thumbnails
from dist_vse.tools.report.neighbours import Neighbours, all_keys
from dist_vse.tools.search.embed import embed_split, open_data, open_model
from dist_vse.tools.search.faiss_index import check_faiss, faiss_top_k
from dist_vse.tools.search.found import Found, Queries
from dist_vse.tools.search.gallery import Gallery, gallery_of, origin, read_gallery
from dist_vse.tools.search.sheet import write_sheet


# More than eight parameters: each is an option of the command.
def search(
    location: Path,
    queries: Queries,
    *,
    data: str | None,
    split: str,
    top: int,
    sheet: Path | None,
    faiss: bool = False,
    index_file: Path | None = None,
    allow_pipe: bool = False,
    width: int | None = None,
) -> list[Found]:
    """Search a split, print a table a query, and write the sheet if one is asked for.

    The search is exact, in float64; with `faiss` in float32. The images' features are read from
    `index_file`, which `dist-vse embed` wrote, or else computed now. Features in int8 or bits are
    searched as such. `width` takes the first numbers of each feature.
    Raises UserError where nothing is asked, a file cannot be read or written, or features are not
    finite.
    """
    setup_logging()
    if not queries.names:
        raise UserError("nothing to search for; give --text or --image")
    if sheet is not None and sheet.suffix not in (".html", ".png"):
        raise UserError(f"{sheet}: give a sheet that ends in .html or .png")
    find = faiss_top_k if faiss else top_k
    with distributed.process_group():
        with distributed.raise_on_all_ranks():
            if faiss:
                check_faiss()
            index = open_data(location, data, allow_pipe=allow_pipe)
            index.split(split)
            model = open_model(location)
            if sheet is not None and distributed.is_main_process():
                check_output(sheet)
            check_width(width, model.dim)
            by_text = model.encode_texts(queries.texts)
            by_image = model.encode_images(queries.images)
            check_finite(by_image, by_text)
            gallery = None
            if index_file:
                gallery = read_gallery(index_file, origin(model.model, index, split))
                gallery = gallery.at_width(width)
                if faiss and gallery.codes is not None:
                    raise UserError(f"{index_file}: --faiss is for float32; leave it out")
        if gallery is None:
            gallery = gallery_of(embed_split(model, index, split, width))
        if gallery.width < model.dim:
            by_text, by_image = (first_features(x, gallery.width) for x in (by_text, by_image))
        if gallery.codes is None:
            check_finite(gallery.features, by_text)
            scores, rows = find(torch.cat([by_text, by_image]), gallery.features, top)
        else:
            scores, rows = gallery.search_codes(by_text, by_image, top)
        found = [
            Found(
                name,
                [gallery.keys[row] for row in best],
                similar,
                [gallery.captions[row] for row in best],
            )
            for name, similar, best in zip(
                queries.names, scores.tolist(), rows.tolist(), strict=True
            )
        ]
        with distributed.raise_on_all_ranks():
            if distributed.is_main_process():
                _show(found)
                if sheet is not None:
                    near = _neighbours(found, gallery) if sheet.suffix == ".html" else {}
                    names = dict(zip(gallery.keys, gallery.captions, strict=True))
                    pictures = thumbnails(index, split, all_keys(near) | _keys(found))
                    asked = set(map(str, queries.images))
                    write_sheet(sheet, found, pictures, asked, near, names)
                    Console().print(plain(f"wrote {sheet}"), soft_wrap=True)
    return found


def _show(found: list[Found]) -> None:
    console = Console()
    for answers in found:
        table = Table("", "key", "cosine", "caption", title=plain(answers.query))
        rows = zip(answers.keys, answers.scores, answers.captions, strict=True)
        for place, (key, score, caption) in enumerate(rows, 1):
            table.add_row(str(place), plain(key), f"{score:.3f}", plain(caption))
        console.print(table)


def _keys(found: Sequence[Found]) -> set[str]:
    return {key for answers in found for key in answers.keys}


def _neighbours(found: Sequence[Found], gallery: Gallery) -> Neighbours:
    """Return the nearest others of each image that was found."""
    shown = _keys(found)
    rows = [row for row, key in enumerate(gallery.keys) if key in shown]
    near = neighbours(gallery.features, rows, NEIGHBOURS)
    return {
        gallery.keys[row]: [{"key": gallery.keys[other], "score": score} for other, score in each]
        for row, each in zip(rows, near, strict=True)
    }
