"""The losses in fused kernels: what they find for the losses' terms.

Forward, no similarity is written to memory: the kernels write what a term takes of a tile, a number
a row and a column. Backward, similarities are computed again and their gradient is written a strip
at a time, for two products. `TiledLoss` runs either this or its tiles; the terms are the same.

b rows (images) on this rank, N columns (captions) on all ranks, c columns in a strip, d embedding.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dist_vse.losses.decoupled import Decoupled
from dist_vse.losses.hardest import Best, Hardest, hardest_terms
from dist_vse.losses.kernel_choice import blocks_on
from dist_vse.losses.matmul import Matmul
from dist_vse.losses.pairwise import Hinges, Sigmoid, hinge_terms, sigmoid_terms
from dist_vse.losses.positives import Positives
from dist_vse.losses.softmax import RunningSoftmax
from dist_vse.losses.tiled import TermInputs, Terms
from dist_vse.losses.tiles import ranges
from dist_vse.losses.transport import Block
from dist_vse.losses.tuned_blocks import Blocks

FORWARD_COLUMNS = 2**14  # of which partial results are in memory at a time
GRADIENT_ROWS, GRADIENT_COLUMNS = 2**14, 2**13  # of which the gradient is
MARKED_ROWS = 32  # of a program that marks duplicates


class Epilogue(Protocol):
    """What kernels find for a term."""

    def accumulate(self, tiles: "Tiles", strip: Block) -> None:
        """Take a strip of columns into the term's statistics."""


class DenseEpilogue(Epilogue, Protocol):
    """The same for a term whose gradient touches every pair."""

    def gradient(self, tiles: "Tiles", rows: slice, strip: Block) -> Tensor:
        """Return the gradient in the similarities (rows, c) of rows with a strip."""


class Epilogues(NamedTuple):
    """A loss's terms, with an epilogue for each of them. A sparse term finds its own gradient."""

    terms: Terms
    dense: DenseEpilogue | None = None
    sparse: Epilogue | None = None


class Tiles:
    """Runs a kernel over all tiles of this rank's rows with a strip of columns.

    `duplicates` is what pairs of equal id are: NONE where there are none of them, or they are left
    out (MASK), or they are candidates and no negatives (POSITIVE).
    """

    def __init__(self, rows: Tensor, positives: Positives, *, candidates: bool) -> None:
        self.kernels = _kernels()
        self.rows = _operand(rows)  # (b, d)
        self.total = positives.layout.total
        self.offset = positives.layout.own.start
        self.all_rows = slice(0, len(rows))
        self.tf32 = torch.backends.cuda.matmul.allow_tf32
        self.duplicates = self.kernels.NONE.value
        self._codes = torch.empty(0, dtype=torch.int32, device=rows.device)  # (kinds, N)
        self._families: list[tuple[Tensor, ...]] = []
        if positives.duplicates:
            self.duplicates = (self.kernels.POSITIVE if candidates else self.kernels.MASK).value
            ids = positives.duplicates.ids.T.contiguous()  # (kinds, N)
            ordered, order = ids.sort(dim=1, stable=True)
            # Where an id's first one lies, and its last, among the ordered: equal if ids are.
            first = torch.searchsorted(ordered, ids)
            last = torch.searchsorted(ordered, ids, right=True)
            self._codes = first.int().to(rows.device)
            own = positives.layout.own
            self._families = [
                tuple(x.to(rows.device) for x in (where, begin[own], end[own]))
                for where, begin, end in zip(order, first, last, strict=True)
            ]

    def run(
        self, kernel: str, rows: slice, strip: Block, *arguments: Any,
        tolerance: float | None = None, **constants: int,
    ) -> None:  # fmt: skip
        """Run a kernel; `arguments` are its pointers."""
        blocks = self.blocks(kernel)
        images, captions = self.rows[rows], _operand(strip.features)
        (b, d), c = images.shape, len(captions)
        grid = _cdiv(b, blocks.height) * _cdiv(c, blocks.width)
        if not grid:
            return
        getattr(self.kernels, kernel)[(grid,)](
            images, captions, self._codes, self._marks(rows, strip, blocks), *arguments,
            b, c, self.total, d, self.offset + rows.start, strip.columns.start,
            *(() if tolerance is None else (tolerance,)),
            **constants, duplicates=self.duplicates, kinds=len(self._codes),
            precision="tf32" if self.tf32 or images.dtype != torch.float32 else "tf32x3",
            height=blocks.height, width=blocks.width, depth=blocks.depth,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    def parts(
        self, kernel: str, strip: Block, of_rows: Sequence[torch.dtype],
        of_columns: Sequence[torch.dtype],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """Return memory for what tiles leave of rows (tiles, b) and of columns (tiles, c)."""
        blocks, b, c = self.blocks(kernel), len(self.rows), len(strip.features)
        wide, tall, new = _cdiv(c, blocks.width), _cdiv(b, blocks.height), self.rows.new_empty
        return [new((wide, b), dtype=x) for x in of_rows], [
            new((tall, c), dtype=x) for x in of_columns
        ]

    def blocks(self, kernel: str) -> Blocks:
        """Return a kernel's."""
        return blocks_on(kernel, self.rows.dtype, self.rows.device, tf32=self.tf32)

    def _marks(self, rows: slice, strip: Block, blocks: Blocks) -> Tensor:
        """Return which tiles hold duplicates: the others pay for none."""
        b, c = rows.stop - rows.start, len(strip.features)
        tiles = _cdiv(b, blocks.height) * _cdiv(c, blocks.width) if self._families else 0
        marks = torch.zeros(tiles, dtype=torch.uint8, device=self.rows.device)
        for order, first, last in self._families:
            self.kernels.mark[(_cdiv(b, MARKED_ROWS),)](
                order, first[rows], last[rows], marks, b, c, strip.columns.start,
                height=blocks.height, width=blocks.width, size=MARKED_ROWS,
            )  # fmt: skip
        return marks


class FusedPass:
    """Runs a loss's epilogues over blocks of columns, for `TiledLoss`.

    `candidates` says that duplicates are; see `Tiles`.
    """

    def __init__(
        self, epilogues: Epilogues, matmul: Matmul, positives: Positives, *, candidates: bool
    ) -> None:
        self.epilogues = epilogues
        self.matmul = matmul
        self.tiles = Tiles(matmul.rows, positives, candidates=candidates)

    def accumulate(self, block: Block) -> None:
        """Take a block of columns into the terms' statistics."""
        if not len(self.matmul.rows):
            return
        for strip in _strips(block, self.matmul.operand(block.features), FORWARD_COLUMNS):
            for epilogue in (self.epilogues.dense, self.epilogues.sparse):
                if epilogue is not None:
                    epilogue.accumulate(self.tiles, strip)

    def dense_gradients(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the dense term's gradient of a block in the rows (b, d) and its columns (c, d)."""
        assert self.epilogues.dense is not None
        operand = self.matmul.operand(block.features)
        sums = self.matmul.gradient_sums(operand, strip=GRADIENT_COLUMNS)
        for rows in ranges(0, len(self.matmul.rows), GRADIENT_ROWS):
            for strip in _strips(block, operand, GRADIENT_COLUMNS):
                gradient = self.epilogues.dense.gradient(self.tiles, rows, strip)
                sums.add(rows, block.within(strip.columns), gradient)
        return sums.finish()


class SoftmaxEpilogue:
    """Log-sum-exps with running maxima: softmax over the candidates, or the negatives alone."""

    def __init__(self, term: RunningSoftmax | Decoupled) -> None:
        self.term = term

    def accumulate(self, tiles: Tiles, strip: Block) -> None:
        float32, sums = torch.float32, self.term.sums
        of_rows, of_columns = tiles.parts("softmax_sums", strip, [float32] * 3, [float32] * 2)
        tiles.run("softmax_sums", tiles.all_rows, strip, *of_rows, *of_columns)
        maxima, powers, largest = of_rows
        _join_powers(sums.row_max, sums.row_sums, maxima, powers)
        columns = strip.columns
        _join_powers(sums.column_max[columns], sums.column_sums[columns], *of_columns)
        candidates = tiles.duplicates == tiles.kernels.POSITIVE.value
        _join_maxima(sums.largest, largest if candidates else maxima)

    def gradient(self, tiles: Tiles, rows: slice, strip: Block) -> Tensor:
        levels = self.term.row_logs[rows], self.term.column_logs[strip.columns]
        return _weights(tiles, tiles.kernels.SOFTMAX, rows, strip, levels)


class SigmoidEpilogue:
    """Softplus of every pair."""

    def __init__(self, term: Sigmoid) -> None:
        self.term = term
        self.level = (-term.bias).expand(term.row_sums.shape).contiguous()  # (b,)

    def accumulate(self, tiles: Tiles, strip: Block) -> None:
        float32 = torch.float32
        (largest, softplus), _ = tiles.parts("pair_sums", strip, [float32] * 2, [])
        unused = [softplus] * 3
        tiles.run(
            "pair_sums", tiles.all_rows, strip, self.level, self.level, largest, softplus, *unused,
            loss=tiles.kernels.SIGMOID.value,
        )  # fmt: skip
        _join_maxima(self.term.largest, largest + self.term.bias)
        self.term.row_sums += softplus.sum(0)

    def gradient(self, tiles: Tiles, rows: slice, strip: Block) -> Tensor:
        wide = _cdiv(len(strip.features), tiles.blocks("weights").width)
        row_total = self.level.new_empty(wide, rows.stop - rows.start)
        levels = self.level[rows], self.level
        gradient = _weights(tiles, tiles.kernels.SIGMOID, rows, strip, levels, row_total=row_total)
        self.term.grad_sum += row_total.sum()
        return gradient


class HingesEpilogue:
    """Sums and counts of the violations of the margin."""

    def __init__(self, term: Hinges) -> None:
        self.term = term

    def accumulate(self, tiles: Tiles, strip: Block) -> None:
        float32, columns = torch.float32, strip.columns
        of_rows, of_columns = tiles.parts("pair_sums", strip, [float32] * 3, [float32] * 2)
        tiles.run(
            "pair_sums", tiles.all_rows, strip,
            self.term.row_thresholds, self.term.column_thresholds[columns], *of_rows, *of_columns,
            loss=tiles.kernels.HINGES.value,
        )  # fmt: skip
        _join_maxima(self.term.largest, of_rows[0])
        self.term.row_stats += torch.stack([x.sum(0) for x in of_rows[1:]])
        self.term.column_stats[:, columns] += torch.stack([x.sum(0) for x in of_columns])

    def gradient(self, tiles: Tiles, rows: slice, strip: Block) -> Tensor:
        columns = strip.columns
        levels = self.term.row_thresholds[rows], self.term.column_thresholds[columns]
        slopes = self.term.row_weights[rows], self.term.column_weights[columns]
        return _weights(tiles, tiles.kernels.HINGES, rows, strip, levels, slopes)


class HardestEpilogue:
    """Maxima, and the lowest index within the tolerance of them."""

    def __init__(self, term: Hardest) -> None:
        self.term = term

    def accumulate(self, tiles: Tiles, strip: Block) -> None:
        kinds = [torch.float32, torch.int32]
        of_rows, of_columns = tiles.parts("hardest", strip, kinds, kinds)
        tolerance = self.term.rows.tolerance
        tiles.run("hardest", tiles.all_rows, strip, *of_rows, *of_columns, tolerance=tolerance)
        _join_hardest(self.term.rows, tiles.all_rows, *of_rows)
        _join_hardest(self.term.columns, strip.columns, *of_columns)


def softmax_epilogues(inputs: TermInputs) -> Epilogues:
    """Return ConVSE's and InfoNCE's."""
    term = RunningSoftmax(inputs.positives)
    return Epilogues(Terms(term), SoftmaxEpilogue(term))


def decoupled_epilogues(inputs: TermInputs) -> Epilogues:
    """Return DCL's."""
    term = Decoupled(inputs.positives)
    return Epilogues(Terms(term), SoftmaxEpilogue(term))


def sigmoid_epilogues(inputs: TermInputs) -> Epilogues:
    """Return SigLIP's."""
    terms = sigmoid_terms(inputs)
    assert isinstance(terms.dense, Sigmoid)
    return Epilogues(terms, SigmoidEpilogue(terms.dense))


def hinge_epilogues(inputs: TermInputs) -> Epilogues:
    """Return VSE0's."""
    return _of_hinges(hinge_terms(inputs))


def hardest_epilogues(inputs: TermInputs) -> Epilogues:
    """Return ConVSE++'s and VSE++'s."""
    return _of_hinges(hardest_terms(inputs))


def _of_hinges(terms: Terms) -> Epilogues:
    dense, sparse = terms.dense, terms.sparse
    return Epilogues(
        terms,
        HingesEpilogue(dense) if isinstance(dense, Hinges) else None,
        HardestEpilogue(sparse) if isinstance(sparse, Hardest) else None,
    )


def _weights(
    tiles: Tiles, loss: Any, rows: slice, strip: Block, levels: tuple[Tensor, Tensor],
    slopes: tuple[Tensor, Tensor] | None = None, row_total: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient in the similarities (rows, c); unused pointers are copies of others."""
    out = tiles.rows.new_empty(rows.stop - rows.start, len(strip.features))
    total = levels[0] if row_total is None else row_total
    tiles.run("weights", rows, strip, *levels, *(slopes or levels), out, total, loss=loss.value)
    return out


def _join_powers(maximum: Tensor, sums: Tensor, maxima: Tensor, powers: Tensor) -> None:
    """Take parts (parts, n) into running maxima and sums of 2^(s - maximum) (n,)."""
    raised = torch.maximum(maximum, maxima.amax(0))
    sums.mul_((maximum - raised).exp2_()).add_(powers.mul_((maxima - raised).exp2_()).sum(0))
    maximum.copy_(raised)


def _join_maxima(running: Tensor, parts: Tensor) -> None:
    """Take parts (parts, n) into running maxima (n,)."""
    torch.maximum(running, parts.amax(0), out=running)


def _join_hardest(best: Best, where: slice, values: Tensor, indices: Tensor) -> None:
    """Take parts (parts, n) into the best `where` they belong: the lowest index among equals."""
    values = torch.cat([best.values[where].unsqueeze(0), values])
    indices = torch.cat([best.indices[where].unsqueeze(0), indices])
    largest = values.amax(0)
    nowhere = torch.iinfo(torch.int32).max
    best.indices[where] = indices.masked_fill(values < largest - best.tolerance, nowhere).amin(0)
    best.values[where] = largest


def _strips(block: Block, operand: Tensor, step: int) -> Iterator[Block]:
    """Cut a block into strips of at most `step` columns, of features as products take them."""
    for columns in ranges(block.columns.start, block.columns.stop, step):
        yield Block(columns, operand[block.within(columns)])


def _operand(features: Tensor) -> Tensor:
    """Return features as kernels read them: in bfloat16 the interpreter's products are wrong."""
    return features if features.is_cuda else features.float()


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _kernels() -> ModuleType:
    """Return the kernels; Triton is there only where torch is built for CUDA."""
    from dist_vse.losses import fused_kernels

    return fused_kernels
