"""How a loss over the global batch is computed; nothing here imports torch."""

import math
from dataclasses import dataclass

DUPLICATES = ("mask", "positive", "keep")
TRANSPORTS = ("gather", "ring")
KERNELS = ("auto", "fused", "tiled")


@dataclass(frozen=True)
class LossOptions:
    """The choices of one step's loss, alike on all ranks but for memory_gib and tile."""

    margin: float = 0.2
    """m of the hinge losses."""
    hard_negative_weight: float = 1.0
    """From 0 (the mean of all violations) to 1 (the hardest negative alone): convse++, vse++."""
    ignore_above: float | None = None
    """Pairs closer than this to the similarity of their image's or caption's own pair, or above it,
    are no negatives; None keeps all. A number below 0 leaves out only those further above."""
    duplicates: str = "mask"
    """Pairs of equal image or caption id: `mask` (no negatives), `positive`, or `keep`."""
    transport: str = "gather"
    """`gather` the captions' features once, or pass them round a `ring`."""
    bf16_products: bool = False
    """Compute similarities in bfloat16; statistics stay float32."""
    temperature: float | None = None
    """t where a schedule sets it; None takes the model's."""
    memory_gib: float = 0.25
    """Tiles of similarities kept from forward for backward, GiB a rank."""
    tile: int | None = None
    """Size of a tile; None takes the device's."""
    kernels: str = "auto"
    """`fused` (Triton), `tiled`, or `auto`: fused on CUDA. What can't be fused runs in tiles."""

    @property
    def only_tiled(self) -> str | None:
        """Return which option no fused kernel knows, if one is used."""
        return None if self.ignore_above is None else "ignore_above is set"

    def fault(self) -> str | None:
        """Say what is wrong, if anything is."""
        for what, value, choices in (
            ("duplicates", self.duplicates, DUPLICATES),
            ("transport", self.transport, TRANSPORTS),
            ("kernels", self.kernels, KERNELS),
        ):
            if value not in choices:
                return f"{what} {value!r} is unknown; choose {' or '.join(choices)}"
        if not 0 <= self.hard_negative_weight <= 1:
            return (
                f"hard_negative_weight ({self.hard_negative_weight}) must be between 0 (all "
                "violations) and 1 (the hardest)"
            )
        if self.ignore_above is not None and not math.isfinite(self.ignore_above):
            return f"ignore_above ({self.ignore_above}) must be a finite number, or None"
        if self.tile is not None and not (type(self.tile) is int and self.tile >= 1):
            return f"tile ({self.tile}) must be a number from 1 on, or None"
        if not self.memory_gib >= 0:
            return f"memory_gib ({self.memory_gib}) must be at least 0"
        if self.temperature is not None and not self.temperature > 0:
            return f"temperature ({self.temperature}) must be above 0"
        return None
