"""Which of a sample's captions is trained on, and which part of a long one.

Everything is drawn from (seed, turn, sample), so that it is the same for any number of ranks and
workers, and in a run that was continued.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dist_vse.data.decode import BadSampleError
from dist_vse.data.index import image_id
from dist_vse.data.reader import Meta

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*|\n+")


@dataclass(frozen=True)
class TextChoice:
    """How a text is chosen, as the settings of `data` say."""

    weights: Mapping[str, float] = field(default_factory=dict)  # by label
    sentences_above: int = 0  # words
    num_negatives: int = 0  # of a sample, at most

    def choose(
        self,
        meta: Meta,
        turn: int,
        generator: Callable[[], np.random.Generator],
        which: int | None = None,
    ) -> tuple[str, str]:
        """Return a caption, and the part of it to train on; `generator` is called to draw.

        Without weights the captions come in turn, and samples start with different ones; `which`
        is the caption's number, where each is a sample of its own.
        Raises BadSampleError if no caption has a weight.
        """
        weights = self._weights(meta) if which is None else []
        above = self.sentences_above
        maybe_long = above and any(len(caption) > 2 * above for caption in meta.captions)
        draws: list[float] = generator().random(2).tolist() if weights or maybe_long else []
        if weights:
            ends = np.cumsum(weights)
            choice = int(np.searchsorted(ends, draws[0] * ends[-1], side="right"))
        else:
            choice = (turn + image_id(meta.key) if which is None else which) % len(meta.captions)
        caption = meta.captions[choice]
        if maybe_long and len(caption.split()) > above:
            return caption, begun_at_a_sentence(caption, draws[1])
        return caption, caption

    def negatives(
        self, meta: Meta, generator: Callable[[], np.random.Generator]
    ) -> tuple[str, ...]:
        """Return the sample's negatives, or some of them in random order if there are more."""
        if len(meta.negatives) <= self.num_negatives or not self.num_negatives:
            return meta.negatives[: self.num_negatives]
        chosen = generator().permutation(len(meta.negatives))[: self.num_negatives]
        return tuple(meta.negatives[number] for number in chosen.tolist())

    def _weights(self, meta: Meta) -> list[float]:
        """Return what each caption weighs; nothing if neither the settings nor the sample say.

        A label's weight is shared by its captions, in proportion to their own.
        """
        if not self.weights and not meta.weights:
            return []
        own = meta.weights or (1.0,) * len(meta.captions)
        if self.weights:
            labels = meta.labels or ("",) * len(meta.captions)
            totals: defaultdict[str, float] = defaultdict(float)
            for label, weight in zip(labels, own, strict=True):
                totals[label] += weight
            own = tuple(
                self.weights.get(label, 0.0) * weight / (totals[label] or 1.0)
                for label, weight in zip(labels, own, strict=True)
            )
        if not sum(own) > 0:
            there = ", ".join(sorted(set(meta.labels))) or "none"
            raise BadSampleError(f"no caption has a weight (labels: {there})")
        return list(own)


def begun_at_a_sentence(caption: str, draw: float) -> str:
    """Return a caption from one of its sentences on; `draw` is in [0, 1)."""
    starts = [0, *(end.end() for end in _SENTENCE_END.finditer(caption.rstrip()))]
    return caption[starts[int(draw * len(starts))] :]
