"""The same settings under DeepSpeed: each ZeRO stage's update, against one process."""

from torch import Tensor, nn

from dist_vse.engine.deepspeed_defaults import deepspeed_engine, whole_parameters
from dist_vse.tools.verify.conformance.case import EVEN, Towers, own_pairs
from dist_vse.tools.verify.conformance.measure import compare_towers, exact_gradients, verdict
from dist_vse.tools.verify.conformance.peers import settings

STAGES = (0, 1, 2, 3)
_RATE = 256.0  # SGD's: an update large enough that weights in float32 do not round it


class Sharded:
    """Wraps modules in DeepSpeed at a stage of ZeRO."""

    has_no_sync = False  # DeepSpeed refuses it under ZeRO 2 and 3

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._engines: list[nn.Module] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return DeepSpeed's engine of the module."""
        engine: nn.Module = deepspeed_engine(module, self._stage, rate=_RATE)
        self._engines.append(engine)
        return engine

    def backward(self, loss: Tensor) -> None:
        """Run the backward by the engine, as DeepSpeed's documentation has it."""
        self._engines[-1].backward(loss)  # type: ignore[operator]

    def step(self) -> None:
        """Update the weights."""
        for engine in self._engines:
            engine.step()  # type: ignore[operator]


def measure_zero(peer: str, number: int) -> list[str]:
    """Return what each stage makes of a setting; in a process group of its own."""
    setting = settings(peer)[number]
    if setting.own_loop:
        return []
    right = exact_gradients(setting, EVEN)
    found = []
    for stage in STAGES:
        towers, sharded = Towers(shared=setting.shared), Sharded(stage)
        before = {name: p.detach().clone() for name, p in towers.named_parameters()}
        try:
            setting.step(towers, own_pairs(EVEN), sharded)
            sharded.step()
            after = whole_parameters(towers)
        except Exception as error:  # whatever a peer raises is the finding
            found.append(f"fails: {type(error).__name__}")
            continue
        moved = {name: (before[name] - after[name]) / _RATE for name in before}
        found.append(verdict(compare_towers(moved, right)))
    return found
