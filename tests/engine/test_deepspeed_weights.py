"""What we assume about DeepSpeed's weights and their parts holds in the installed version."""

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.engine import deepspeed_internals as internals
from dist_vse.engine import zero
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_model
from tests.support.zero_engines import build_engine, rank_batch, train


def _fragments_after_training(stage: int) -> tuple[dict[str, list[tuple[int, int]]], bool, bool]:
    """Return the fragments, if they hold the model's weights, and if they have a state."""
    zero.PERSISTENT = 0  # ZeRO 3 splits small parameters too
    engine = build_engine(stage, momentum=0.9)
    _train_split(engine)
    fragments, same, kept = engine._fragments(), True, True
    places: dict[str, list[tuple[int, int]]] = {}
    with engine.gathered_parameters():
        whole = {name: p.detach().flatten() for name, p in engine.module.named_parameters()}
        for f in fragments:
            places.setdefault(f.name, []).append((f.start, f.length))
            same &= torch.equal(f.within(f.flat), whole[f.name][f.start : f.start + f.length])
            kept &= "momentum_buffer" in engine.optimizer.state[f.flat]
    return places, same, kept


def _train_split(engine: ZeroEngine) -> None:
    batch = rank_batch(engine.module, 0)
    train_step(engine, GlobalLoss("convse"), [batch])


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_state_fragments(stage: int) -> None:
    ranks = run_distributed(_fragments_after_training, 2, stage)
    for places, same, kept in ranks:
        assert same, "a fragment's flat tensor does not hold the weights of its place"
        assert kept, "the optimizer that was given keeps no state for what DeepSpeed updates"
        if stage == 0:
            assert places == ranks[0][0]
    trainable = [(name, p) for name, p in tiny_model().named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        places = ranks[0][0].get(name, [])
        if stage > 0:
            places = places + ranks[1][0].get(name, [])
        held = [i for start, length in places for i in range(start, start + length)]
        assert sorted(held) == list(range(parameter.numel())), name


def _split_after_a_forward() -> tuple[int, int]:
    """Return how many parameters a forward has split again, without `keep_gathered` and with."""
    import deepspeed

    zero.PERSISTENT = 0
    engine = build_engine(3)
    counts = []
    for keep in (False, True):
        parameters = list(engine.module.parameters())
        held = parameters if keep else []
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters(parameters),
            internals.keep_gathered(held),
        ):
            engine(**rank_batch(engine.module, 0))
            counts.append(sum(p.numel() == 0 for p in parameters))
    return counts[0], counts[1]


@pytest.mark.slow
def test_keep_gathered() -> None:
    for without, kept in run_distributed(_split_after_a_forward, 2):
        assert without > 10, "a forward splits nothing: `keep_gathered` is needed no more"
        assert kept == 0


def _train_around_forwards(stage: int, batches: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the weights after training around forwards, and after as much training alone.

    A rank runs as many forwards as `batches` says, as in an evaluation.
    """
    zero.PERSISTENT = 0
    found = []
    for evaluates in (True, False):
        engine = build_engine(stage)
        for _ in range(3):  # the order of modules is recorded by the third step
            train(engine, 3)
            if not evaluates:
                continue
            with engine.gathered_parameters(), torch.no_grad():
                engine.module.eval()
                for step in range(batches[distributed.rank()]):
                    batch = rank_batch(engine.module, step)
                    engine.module.encode_images(batch["images"])
                    engine.module.encode_texts(batch["tokens"])
                engine.module.train()
        with engine.gathered_parameters():
            parameters = engine.module.parameters()
            found.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("batches", [(1, 0), (0, 2)])
def test_forget_module_order(stage: int, batches: tuple[int, ...]) -> None:
    """Ranks that run different numbers of forwards go on training, and to the bit (no hang)."""
    for around, alone in run_distributed(_train_around_forwards, 2, stage, batches, timeout=45):
        assert torch.equal(around, alone)


def _whole_shapes() -> tuple[dict[str, torch.Size], set[int]]:
    zero.PERSISTENT = 0
    parameters = dict(build_engine(3).module.named_parameters())
    shapes = {name: internals.whole_shape(p) for name, p in parameters.items()}
    return shapes, {p.numel() for p in parameters.values()}


@pytest.mark.slow
def test_whole_shape() -> None:
    expected = {name: p.shape for name, p in tiny_model().named_parameters()}
    for shapes, sizes in run_distributed(_whole_shapes, 2):
        assert shapes == expected
        assert sizes == {0}, "parameters are not split: the test shows nothing"
    assert internals.whole_shape(torch.zeros(2, 3)) == (2, 3)
