"""What a block sends: every collective of PyTorch, whoever calls it."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts calls and bytes of every collective, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.num_bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            inputs = args[1] if "gather" in name or "scatter" in name else args[0]
            tensors = [inputs] if isinstance(inputs, Tensor) else inputs
            self.calls[name] += 1
            self.num_bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))
