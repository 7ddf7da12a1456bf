"""Which texts are right, by content and by the protocols of the field."""

import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.evaluation.retrieval import content_pairs, own_pairs, tasks_of


def test_right_by_content() -> None:
    rows = torch.tensor([0, 0, 1, 2, 2, 3])
    assert content_pairs(rows, torch.arange(4), torch.arange(6)).equal(own_pairs(rows))
    # Images 0 and 3 are one file; texts 1 (of image 0) and 2 (of image 1) are one caption.
    pairs = content_pairs(rows, torch.tensor([7, 8, 9, 7]), torch.tensor([1, 5, 5, 3, 4, 6]))
    found = {(int(i), int(j)) for i, j in pairs.T}
    assert len(found) == pairs.shape[1]
    of_file = {(image, text) for image in (0, 3) for text in (0, 1, 2, 5)}
    assert found == of_file | {(1, 1), (1, 2), (2, 3), (2, 4)}


def test_too_many_pairs_by_content() -> None:
    rows = torch.arange(9000)
    with pytest.raises(UserError, match=r"captions are classes; .*data\.eval_split"):
        content_pairs(rows, rows, torch.zeros(9000, dtype=torch.int64))


def test_coco_1k_is_the_mean_of_consecutive_fifths() -> None:
    counts = torch.full((5000,), 5)
    counts[:7] = 7  # as some images of COCO have
    rows = torch.arange(5000).repeat_interleave(counts)
    ids = torch.arange(5000), torch.arange(len(rows))
    (whole,) = tasks_of("coco-5k", rows, *ids)
    assert len(whole.texts) == 25_000
    assert whole.texts[:12].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 14, 15]
    folds = tasks_of("coco-1k", rows, *ids)
    assert [fold.images for fold in folds] == [slice(s, s + 1000) for s in range(0, 5000, 1000)]
    assert torch.cat([fold.texts for fold in folds]).equal(whole.texts)
    for fold in folds:
        assert fold.pairs[0].equal(torch.arange(5000) // 5)
        assert fold.pairs[1].equal(torch.arange(5000))


@pytest.mark.parametrize(
    ("protocol", "images", "captions", "message"),
    [
        ("coco", 10, 5, "'coco' is unknown; choose from plain, coco-5k"),
        ("flickr-1k", 1014, 5, "defined on 1,000 images, this split has 1,014"),
        ("flickr-1k", 1000, 4, "needs 5 captions an image; 1000 images have fewer"),
    ],
)
def test_a_split_that_is_not_the_protocols(
    protocol: str, images: int, captions: int, message: str
) -> None:
    rows = torch.arange(images * captions) // captions
    with pytest.raises(UserError, match=message):
        tasks_of(protocol, rows, torch.arange(images), torch.arange(len(rows)))
