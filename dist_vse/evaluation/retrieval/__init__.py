"""Image-text retrieval that cannot lie: exact ranks, fair ties, chance, intervals, protocols.

Ties count as the mean over their random orders; what is closer than rounding is a tie, so a
model that has collapsed scores chance. Only integers are added up over tiles and ranks: the
numbers are the same on any number of processes.

Shapes: n images, m texts, p right pairs, q queries of one direction, d embedding.
"""

from dist_vse.evaluation.retrieval.bootstrap import intervals
from dist_vse.evaluation.retrieval.checks import check_features
from dist_vse.evaluation.retrieval.metrics import RECALLS, chance, retrieval_metrics, summary
from dist_vse.evaluation.retrieval.nearest import neighbours, top_k
from dist_vse.evaluation.retrieval.pairs import content_pairs, own_pairs
from dist_vse.evaluation.retrieval.protocol import PROTOCOLS, Task, check_protocol, tasks_of
from dist_vse.evaluation.retrieval.ranks import Ranks
from dist_vse.evaluation.retrieval.scoring import rank_all

__all__ = [
    "PROTOCOLS",
    "RECALLS",
    "Ranks",
    "Task",
    "chance",
    "check_features",
    "check_protocol",
    "content_pairs",
    "intervals",
    "neighbours",
    "own_pairs",
    "rank_all",
    "retrieval_metrics",
    "summary",
    "tasks_of",
    "top_k",
]
