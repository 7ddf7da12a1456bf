"""False negatives: pairs that are nearly as similar as their image's or caption's own pair.

The margin of NV-Retriever (https://arxiv.org/abs/2407.15831) over the global batch, judged by the
model's own similarities, or by a teacher's as in GISTEmbed (https://arxiv.org/abs/2402.16829).
Which pairs these are counts as a constant: no gradient passes through the comparison.

b rows (images) on this rank, N columns (captions) on all ranks and M negatives behind them.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_vse.losses.layout import Layout
from dist_vse.losses.matmul import Matmul
from dist_vse.losses.tiles import Tile
from dist_vse.losses.transport import Block

ROUNDINGS = 16  # similarities closer than that are equal: so that copies count as equal


class NearPairs:
    """Pairs (i, j) whose similarity is above that of own pair i or j, less a margin.

    They are no negatives of each other, either way. A text without an image has no own pair; it is
    compared with its row's alone. Similarities are those of the tiles, or `by_teacher` those of
    another model's features: blocks bring its captions, and none of texts without an image.
    """

    def __init__(
        self,
        matmul: Matmul,
        captions: Tensor,
        layout: Layout,
        negatives: int,
        *,
        margin: float,
        unit: Tensor,
        by_teacher: bool,
    ) -> None:
        """Take what is compared of rows and own captions (b, ...): cosines times a unit (1,)."""
        self.matmul, self.captions, self.by_teacher = matmul, captions, by_teacher
        # As the tiles have them, in the precision of their products.
        own = torch.linalg.vecdot(matmul.rows.to(captions), matmul.operand(captions).to(captions))
        self.rows = own - (margin + ROUNDINGS * torch.finfo(own.dtype).eps) * unit  # limits (b,)
        self.columns = pad(layout.gather(self.rows), (0, negatives), value=torch.inf)  # (N + M,)
        self.count = torch.zeros((), dtype=torch.int64, device=own.device)
        """Pairs of this rank's rows that were left out; each tile that is computed adds its own."""

    def hide(self, tile: Tile, block: Block) -> None:
        """Make the similarities of a block's tile -inf where they are false negatives."""
        judged = tile.values
        if self.by_teacher:
            if block.teacher is None:
                return
            columns = self.matmul.operand(block.teacher[block.within(tile.columns)])
            judged = self.matmul.similarities(tile.rows, columns)
        limits = torch.minimum(self.rows[tile.rows].unsqueeze(1), self.columns[tile.columns])
        near = (judged > limits) & (tile.values > -torch.inf)
        if tile.duplicates is not None:
            near[tile.duplicates] = False  # they are positives
        self.count += near.sum()
        tile.values.masked_fill_(near, -torch.inf)
