"""The training stream as a dataset of PyTorch, for a training loop of your own.

L streams, W ranks, N pairs of the global batch, b = N / W of this rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import DataConfig, ImageConfig
from dist_vse.data.samples import Batch, Placement, Tokenizer
from dist_vse.data.streams import open_train_sets
from dist_vse.data.train_stream import train_batches


@dataclass(frozen=True)
class _Padded:
    """Somebody's tokenizer, with the token that fills short rows."""

    tokenizer: Callable[[Any], Tensor]
    pad_id: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer(list(captions))


class PairStream(IterableDataset[dict[str, Tensor]]):
    """Yields this rank's rows of one global batch after the other, for ever.

        stream = PairStream("shards/", tokenizer, global_batch_size=4096)
        for batch in DataLoader(stream, batch_size=None):
            batch["images"], batch["tokens"], batch["image_ids"], batch["text_ids"]

    Images are uint8 (b, 3, h, w), tokens int64 (b, l), ids int64 (b,). Concatenated over the
    ranks, the batches are the same for every W that divides L and for any number of workers; an
    epoch holds each good sample once. `state_dict` and `load_state_dict` go on at any such W.

    The stream has workers of its own (`DataConfig.num_workers`): a DataLoader around it has none.
    """

    def __init__(
        self,
        index: str,
        tokenizer: Callable[[Any], Tensor],
        *,
        global_batch_size: int,
        split: str = "train",
        image_size: int = 224,
        seed: int = 0,
        options: DataConfig | None = None,
    ) -> None:
        """Read the index of a folder that `dist-vse shard` wrote.

        `tokenizer` turns captions into int64 (n, l), and is picklable; its `pad_id` fills short
        rows, 0 if it has none. `options` are the other settings of a run's `data`. Raises UserError
        for what does not fit: here, or on all ranks at the first batch.
        """
        self.options = replace(options or DataConfig(), index=index, train_split=split)
        self.sets = open_train_sets(self.options)
        self.tokenizer: Tokenizer = _Padded(tokenizer, int(getattr(tokenizer, "pad_id", 0)))
        self.image = ImageConfig(size=image_size)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._state = np.zeros((self.options.num_streams, 2), np.int64)  # all ranks'
        self._own: NDArray[np.int64] | None = None  # this rank's, after the last batch
        streams = self.options.num_streams
        if global_batch_size % streams:
            raise UserError(
                f"global_batch_size ({global_batch_size}) must be a multiple of num_streams "
                f"({streams})"
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Go on after the last batch that was taken."""
        if get_worker_info() is not None:
            raise UserError(
                "PairStream has workers of its own (DataConfig.num_workers); "
                "give its DataLoader num_workers=0"
            )
        rank, world_size = distributed.rank(), distributed.world_size()
        streams, workers = self.options.num_streams, max(1, self.options.num_workers)
        if streams % (world_size * workers):
            raise UserError(
                f"num_streams ({streams}) must be a multiple of ranks x num_workers "
                f"({world_size} x {workers})"
            )
        self._state = self._gathered()
        self._own = None
        batches = train_batches(
            self.sets,
            self.tokenizer,
            self.options,
            self.image,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            placement=Placement(rank, world_size),
            state=self._state,
        )
        for batch in batches:
            self._own = batch.state
            yield _tensors(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return where all ranks stand; every rank calls this, after equally many batches."""
        return {"streams": self._gathered().tolist(), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, at the next `iter`, from a state of any number of ranks.

        Raises UserError for a state of another seed; of other streams at the first batch.
        """
        if state["seed"] != self.seed:
            raise UserError(
                f"the state is that of seed {state['seed']}, and this stream's is {self.seed}; "
                "pass that seed"
            )
        self._state = np.array(state["streams"], np.int64)
        self._own = None

    def _gathered(self) -> NDArray[np.int64]:
        """Return all ranks' positions (L, 2)."""
        if not distributed.any_rank(self._own is not None):
            return self._state
        return np.concatenate(distributed.all_gather_object(self._own))


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {
        "images": batch.images,
        "tokens": batch.tokens,
        "image_ids": batch.image_ids,
        "text_ids": batch.text_ids,
    }
