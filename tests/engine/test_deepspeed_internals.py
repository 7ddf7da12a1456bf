"""Each assumption about DeepSpeed holds in the installed version, and a missing one is answered."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common import step_timer
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine import deepspeed_internals as internals
from dist_vse.engine import zero
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training.grad_cache import train_step
from tests.support.collectives import Collectives
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.tiny import tiny_batch, tiny_model

B = 8  # pairs in the global batch
RATE = 0.05


def _sgd(model: DualEncoder, momentum: float = 0.0) -> torch.optim.Optimizer:
    optim = OptimConfig("sgd", lr=RATE, weight_decay=0.0, momentum=momentum)
    return build_optimizer(model, optim)


def _engine(stage: int, precision: str = "fp32", momentum: float = 0.0) -> ZeroEngine:
    model, rows = tiny_model(), B // distributed.world_size()
    config = EngineConfig(stage, precision)
    return ZeroEngine(model, _sgd(model, momentum), config, rank_batch_size=rows)


def _rank_batch(model: DualEncoder, step: int) -> dict[str, Tensor]:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
    return model.prepare(images=images, tokens=tokens)


def _train(engine: Any, steps: int) -> Tensor:
    """Train with two chunks; return all parameters in one vector."""
    for step in range(steps):
        batch = _rank_batch(engine.module, step)
        halves = zip(*(value.chunk(2) for value in batch.values()), strict=True)
        chunks = [dict(zip(batch, half, strict=True)) for half in halves]
        train_step(engine, GlobalLoss("convse"), chunks)
    return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()


class _NoReduction:
    """Stands in for ours, and leaves each rank its own gradients."""

    def start(self) -> None:
        pass

    def finish(self) -> None:
        pass


def _step_without_reduction(stage: int) -> tuple[dict[str, int], float, float]:
    """Return the reductions of a step that nobody reduces, and the error of its update."""
    engine = _engine(stage)
    assert engine.reduction is not None
    engine.reduction = _NoReduction()  # type: ignore[assignment]
    alone = tiny_model()
    outputs = alone(**_rank_batch(alone, 0))
    sum(output.sum() for output in outputs).backward()
    expected = {
        name: p.detach() - RATE * p.grad
        for name, p in alone.named_parameters()
        if p.grad is not None
    }
    with Collectives() as counted, engine.accumulation():
        outputs = engine(**_rank_batch(engine.module, 0))
        engine.backward(sum(output.sum() for output in outputs), last=True)
    engine.step()
    error = moved = 0.0
    start = dict(tiny_model().named_parameters())
    for fragment in engine._fragments():
        part = slice(fragment.start, fragment.start + fragment.length)
        found = fragment.within(fragment.flat).detach()
        error += float((found - expected[fragment.name].flatten()[part]).norm())
        moved += float((found - start[fragment.name].flatten()[part]).norm())
    return dict(counted.calls), error, moved


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_take_over_reduction(stage: int) -> None:
    for calls, error, moved in run_distributed(_step_without_reduction, 2, stage):
        assert calls == {}, "DeepSpeed reduces gradients in another place as well"
        assert error < 1e-5 * moved, "DeepSpeed changes gradients that are averages already"


def _slices_and_fragments(stage: int) -> dict[str, Any]:
    engine = _engine(stage)
    names = {id(p): name for name, p in engine.module.named_parameters()}
    slices = internals.gradient_slices(engine.engine, engine.module, stage)
    own = [s for s in slices if s.owner in (None, distributed.rank())]
    return {
        "order": list(dict.fromkeys(names[id(s.parameter)] for s in slices)),
        "covered": sum(s.length for s in slices),
        "own": sorted((names[id(s.parameter)], s.start, s.length) for s in own),
        "updated": sorted((f.name, f.start, f.length) for f in engine._fragments() if f.length),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradient_slices(stage: int) -> None:
    trainable = [(name, p) for name, p in tiny_model().named_parameters() if p.requires_grad]
    for found in run_distributed(_slices_and_fragments, 3, stage):
        assert found["covered"] == sum(p.numel() for _, p in trainable)
        assert found["order"] == [name for name, _ in trainable]
        assert found["own"] == found["updated"], "ranks own other gradients than they update"


def _averages(stage: int) -> tuple[float, float, bool]:
    """Return the length of what the optimizer will read, that of its movement, and what is left."""
    engine = _engine(stage)
    start = _fragments_of(engine)
    with engine.accumulation():
        outputs = engine(**_rank_batch(engine.module, 0))
        engine.backward(sum(output.sum() for output in outputs), last=True)
    averages = internals.averaged_gradients(engine.engine, engine.module, stage)
    length = float(torch.cat([x.flatten() for x in averages]).norm())
    engine.step()
    moved = float((_fragments_of(engine) - start).norm()) / RATE
    left = internals.averaged_gradients(engine.engine, engine.module, stage)
    return length, moved, bool(left)


def _fragments_of(engine: ZeroEngine) -> Tensor:
    return torch.cat([f.within(f.flat).detach().clone() for f in engine._fragments()])


@pytest.mark.parametrize(
    "stage", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3))]
)
def test_averaged_gradients(stage: int) -> None:
    for length, moved, left in run_distributed(_averages, 2, stage):
        assert length == pytest.approx(moved, rel=1e-3), "the optimizer reads others"
        assert not left, "they stay after a step"


def _loss_scales(stage: int) -> tuple[float, float]:
    """Return by what a float16 run's gradients are multiplied, and what its update divides by."""
    lengths = []
    for factor in (1.0, 256.0):
        engine = _engine(stage, "fp16")
        assert engine.loss_scale is not None
        engine.loss_scale.value = factor
        start = _fragments_of(engine)
        with engine.accumulation():
            outputs = engine(**_rank_batch(engine.module, 0))
            engine.backward(sum(output.sum() for output in outputs), last=True)
        averages = internals.averaged_gradients(engine.engine, engine.module, stage)
        lengths.append(float(torch.cat([x.flatten() for x in averages]).norm()))
        engine.step()
        lengths.append(float((_fragments_of(engine) - start).norm()))
    return lengths[2] / lengths[0], lengths[3] / lengths[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_take_over_loss_scale(stage: int) -> None:
    for multiplied, moved in run_distributed(_loss_scales, 1, stage):
        assert multiplied == pytest.approx(256, rel=0.05)
        assert moved == pytest.approx(1, rel=0.05)


def _wire_dtypes(precision: str) -> dict[str, torch.dtype]:
    module = _engine(1, precision).module
    return {name: internals.wire_dtype(p) for name, p in module.named_parameters()}


@pytest.mark.slow
def test_wire_dtype() -> None:
    kinds = ("bf16", "fp32", "fp16")
    (found,), (plain,), (half,) = (run_distributed(_wire_dtypes, 1, kind) for kind in kinds)
    assert half == plain, "float16's sums of the ranks would overflow"
    lowered = {
        f"{name}.{own}"
        for name, module in tiny_model().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for own, _ in module.named_parameters(recurse=False)
    }
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == lowered
    assert {found[name] for name in found.keys() - lowered} == {torch.float32}
    assert set(plain.values()) == {torch.float32}


def _fragments_after_training(stage: int) -> tuple[dict[str, list[tuple[int, int]]], bool, bool]:
    """Return the fragments, if they hold the model's weights, and if they have a state."""
    zero.PERSISTENT = 0  # ZeRO 3 splits small parameters too
    engine = _engine(stage, momentum=0.9)
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
    batch = _rank_batch(engine.module, 0)
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
    engine = _engine(3)
    counts = []
    for keep in (False, True):
        parameters = list(engine.module.parameters())
        held = parameters if keep else []
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters(parameters),
            internals.keep_gathered(held),
        ):
            engine(**_rank_batch(engine.module, 0))
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
        engine = _engine(stage)
        for _ in range(3):  # the order of modules is recorded by the third step
            _train(engine, 3)
            if not evaluates:
                continue
            with engine.gathered_parameters(), torch.no_grad():
                engine.module.eval()
                for step in range(batches[distributed.rank()]):
                    batch = _rank_batch(engine.module, step)
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
    parameters = dict(_engine(3).module.named_parameters())
    shapes = {name: internals.whole_shape(p) for name, p in parameters.items()}
    return shapes, {p.numel() for p in parameters.values()}


@pytest.mark.slow
def test_whole_shape() -> None:
    expected = {name: p.shape for name, p in tiny_model().named_parameters()}
    for shapes, sizes in run_distributed(_whole_shapes, 2):
        assert shapes == expected
        assert sizes == {0}, "parameters are not split: the test shows nothing"
    assert internals.whole_shape(torch.zeros(2, 3)) == (2, 3)


class _Parts:
    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, part: str) -> None:
        self.told.append(part)


def _parts_of_a_weights_gather() -> list[str]:
    engine, parts = _engine(1), _Parts()
    with engine.accumulation():
        outputs = engine(**_rank_batch(engine.module, 0))
        engine.backward(sum(output.sum() for output in outputs), last=True)
    step_timer.begin("step")
    with step_timer.listening(parts):
        engine.step()  # gathers the new weights
    return parts.told


@pytest.mark.slow
def test_time_collectives() -> None:
    for told in run_distributed(_parts_of_a_weights_gather, 2):
        assert "reduce" in told, "DeepSpeed calls no function of `deepspeed.comm` any more"


def _built_operators() -> list[str]:
    """Return what DeepSpeed builds where it could, before and after we say no."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    class Builder:
        NAME = "deepspeed_shm_comm"

        def load(self) -> str:
            return "built"

        def absolute_name(self) -> str:
            return self.NAME

    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.create_op_builder = lambda name: (
        Builder() if name == "ShareMemCommBuilder" else None
    )
    __compatible_ops__[Builder.NAME] = True
    backend = sys.modules["deepspeed.comm.torch"]
    before = backend.build_shm_op()
    internals.skip_shared_memory_operator()
    return [before, backend.build_shm_op()]


def test_skip_shared_memory_operator() -> None:
    assert run_distributed(_built_operators, 1) == [["built", None]]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _messages_of_deepspeed(quiet: bool) -> list[str]:
    if not quiet:
        internals.quiet_log = lambda: None
    messages = _Messages()
    logging.getLogger("DeepSpeed").addHandler(messages)
    _engine(1)
    return messages.texts


def test_quiet_warnings() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        internals.quiet_warnings()
        warnings.warn(
            "RNN module weights are not part of single contiguous chunk of memory. This means they "
            "need to be compacted at every call",
            stacklevel=1,
        )
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in seen] == ["another"]


@pytest.mark.slow
def test_quiet_log() -> None:
    (loud,), (quiet,) = (run_distributed(_messages_of_deepspeed, 1, q) for q in (False, True))
    assert any("untested optimizer" in text for text in loud)
    assert quiet == []


def test_the_supported_versions_are_those_of_the_package() -> None:
    assert f'"deepspeed{internals.SUPPORTED}"' in Path(ROOT / "pyproject.toml").read_text()


def _hide(name: str) -> None:
    """Have the internals find no attribute of this name."""
    private = internals._private

    def hiding(owner: Any, asked: str) -> Any:
        return private(object() if asked == name else owner, asked)

    internals._private = hiding


def _fall_back(stage: int, name: str) -> tuple[Tensor, bool, list[str]]:
    _hide(name)
    messages = _Messages()
    logger.addHandler(messages)
    engine = _engine(stage)
    return _train(engine, 2), engine.reduction is None, messages.texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (0, "enable_backward_allreduce"),
        (1, "average_tensor"),
        (2, "average_tensor"),
        (2, "param_to_partition_ids"),
    ],
)
def test_without_an_internal_deepspeed_reduces_by_itself(stage: int, name: str) -> None:
    model = tiny_model()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    expected = _train(PlainEngine(model, _sgd(model)), 2)  # one process, the whole batch
    for rank, (found, fell_back, told) in enumerate(run_distributed(_fall_back, 2, stage, name)):
        assert fell_back
        assert (found - expected).norm() < 1e-5 * (expected - start).norm()
        assert len(told) == (1 if rank == 0 else 0)
        assert all(f".{name}: it reduces gradients by itself" in line for line in told)


def _refused(stage: int, name: str) -> str:
    _hide(name)
    with pytest.raises(UserError) as error:
        _engine(stage)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (1, "_hp_mapping"),
        (2, "single_partition_of_fp32_groups"),
        (3, "grad_position"),
        (3, "ds_shape"),
        (3, "ds_active_sub_modules"),
        (2, "averaged_gradients"),
    ],
)
def test_without_the_optimizers_state_the_engine_is_refused(stage: int, name: str) -> None:
    (message,) = run_distributed(_refused, 1, stage, name)
    assert "\n" not in message and f".{name}: checkpoints can't be written" in message
    assert message.endswith(f"install deepspeed{internals.SUPPORTED}")
