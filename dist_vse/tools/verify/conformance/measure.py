"""What is measured of a setting, and the table of all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.tools.verify.conformance.case import (
    CHUNK,
    EVEN,
    UNEVEN,
    Replicas,
    Towers,
    exact,
    own_pairs,
)
from dist_vse.tools.verify.conformance.peers import OURS, Setting, settings, version
from dist_vse.tools.verify.reference import MIN_TOLERANCE
from dist_vse.tools.verify.table import Row, compare

EXACT = "exact"
COLUMNS = (
    "",
    "factor",
    "error",
    "cosine",
    "temperature",
    "dropout",
    "reductions",
    "uneven ranks",
    "ZeRO 0 to 3",
)


@dataclass(frozen=True)
class Measured:
    """What was found of one setting; None where it does not apply."""

    peer: str
    version: str
    label: str
    towers: Row
    temperature: Row | None
    replayed: bool | None
    """Whether both passes of gradient caching draw the same dropout."""
    reductions: int
    """Messages of gradients that a step sends."""
    uneven: str = ""
    """What becomes of ranks with unequally many pairs."""
    zero: tuple[str, ...] = ()
    """What becomes of it under DeepSpeed, by ZeRO's stage; nothing where that does not apply."""

    @property
    def exact(self) -> bool:
        """Return whether the gradient is that of one process."""
        return self.towers.exact and (self.temperature is None or self.temperature.exact)

    def figures(self) -> dict[str, object]:
        """Return all numbers, for a file."""
        return asdict(self)

    def cells(self) -> list[str]:
        """Return the row of the table."""
        temperature = self.temperature
        replay = {None: "-", True: "replayed", False: "drawn again"}[self.replayed]
        return [
            f"{self.peer} {self.version}: {self.label}",
            f"{self.towers.factor:.4f}",
            f"{self.towers.error:.0e}",
            f"{self.towers.cosine:.5f}",
            "fixed"
            if temperature is None
            else f"{temperature.factor:.4f}, {temperature.error:.0e}",
            replay,
            str(self.reductions),
            self.uneven,
            by_stage(self.zero),
        ]


def measure(peers: Sequence[str]) -> list[Measured]:
    """Measure all settings of the peers on equally many pairs a rank; all ranks call this."""
    return [_measure(setting) for peer in peers for setting in settings(peer)]


def _measure(setting: Setting) -> Measured:
    towers, replicas = Towers(shared=setting.shared), Replicas()
    setting.step(towers, own_pairs(EVEN), replicas)
    grads = _gradients(towers)
    right = exact_gradients(setting, EVEN)
    return Measured(
        setting.peer,
        version(setting.peer),
        setting.label,
        _compare("towers", grads, right),
        _compare("temperature", grads, right) if setting.learns_temperature else None,
        _replays(setting) if setting.cached else None,
        replicas.messages,
    )


def measure_uneven(peer: str, number: int) -> str:
    """Return what becomes of ranks with unequally many pairs; in a process group of its own."""
    setting = settings(peer)[number]
    towers = Towers(shared=setting.shared)
    try:
        setting.step(towers, own_pairs(UNEVEN), Replicas())
    except Exception as error:  # whatever a peer raises is the finding
        return f"fails: {type(error).__name__}"
    found = compare_towers(_gradients(towers), exact_gradients(setting, UNEVEN))
    return verdict(found)


def completed(measured: Measured, uneven: str, zero: Sequence[str]) -> Measured:
    """Add what was found with unequally many pairs, and under DeepSpeed."""
    return replace(measured, uneven=uneven, zero=tuple(zero))


def verdict(row: Row) -> str:
    """Return a comparison in a few words."""
    return EXACT if row.exact else f"factor {row.factor:.4f}, {row.error:.0e}"


def by_stage(found: Sequence[str]) -> str:
    """Return the verdicts on ZeRO's stages in one cell, equal ones together."""
    stages: dict[str, list[str]] = {}
    for stage, word in enumerate(found):
        stages.setdefault(word, []).append(str(stage))
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{', '.join(numbers)}: {word}" for word, numbers in stages.items()) or "-"


def failed(found: Sequence[Measured]) -> bool:
    """Return whether ours is off; a peer's fault is no failure of the command."""
    ours = [row for row in found if row.peer == OURS]
    return any(not row.exact or {row.uneven, *row.zero} - {"", EXACT} for row in ours)


def exact_gradients(setting: Setting, per_two: tuple[int, int]) -> dict[str, Tensor]:
    """Return one process's gradients for a setting, in float64, by parameter."""
    return exact(per_two, symmetric=setting.symmetric, shared=setting.shared)


def compare_towers(found: dict[str, Tensor], right: dict[str, Tensor]) -> Row:
    """Compare the towers' gradients with the exact ones."""
    return _compare("towers", found, right)


def _gradients(towers: Towers) -> dict[str, Tensor]:
    return {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}


def _compare(part: str, found: dict[str, Tensor], right: dict[str, Tensor]) -> Row:
    names = [name for name in right if (name == "log_scale") == (part == "temperature")]
    ours, exactly = (
        torch.cat([grads[name].reshape(-1) for name in names]) for grads in (found, right)
    )
    return compare("", part, ours, exactly, MIN_TOLERANCE["fp32"])


def _replays(setting: Setting) -> bool:
    """Return whether every chunk's features come out of pass 2 as of pass 1."""
    towers, seen = Towers(shared=setting.shared, dropout=0.5), []

    def see(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output.detach().clone())

    towers.image.register_forward_hook(see)
    torch.manual_seed(distributed.rank())
    pairs = own_pairs(EVEN)
    setting.step(towers, pairs, Replicas())
    chunks = len(pairs.images) // CHUNK * (2 if setting.shared else 1)
    first, second = seen[:chunks], seen[chunks:]
    return bool(second) and all(any(torch.equal(a, b) for a in first) for b in second)
