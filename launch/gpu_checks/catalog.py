"""The checks by number; docs/guides/gpu.md says of each what it proves."""

from dataclasses import dataclass

NO_GROUP, ONE, ALL = "none", "one", "all"


@dataclass(frozen=True)
class Check:
    """A check, and what it needs."""

    name: str
    function: str
    """"module:name" in this package: Task -> Finding."""
    group: str = ONE
    """Who runs it: ALL ranks, a group of ONE, or a process without a group (NO_GROUP)."""
    gpus: int = 0
    """Fewest GPUs that it needs; 0 runs on a CPU too."""
    warm_up: str = ""
    """"module:name" of what compiles before it on a GPU, in a process of its own: a check is short
    then, for both compilers keep what they made on disk."""


CHECKS = {
    1: Check("machine", "machine:check_machine"),
    2: Check("ceilings", "machine:check_ceilings", gpus=1),
    3: Check("collectives", "links:check_collectives", ALL),
    4: Check("bandwidth", "links:check_bandwidth", ALL, gpus=2),
    5: Check("replay", "encoders:check_replay", warm_up="encoders:compile_trunks"),
    6: Check("dtypes", "encoders:check_dtypes"),
    7: Check("exactness", "exactness:check_exactness", ALL, warm_up="exactness:compile_losses"),
    8: Check("loss", "losses:check_loss", NO_GROUP, warm_up="losses:compile_timed"),
    9: Check("step", "steps:check_step", warm_up="steps:compile_step"),
    10: Check("input", "inputs:check_input", gpus=1),
    11: Check("determinism", "determinism:check_determinism", warm_up="determinism:compile_step"),
    12: Check("memory", "steps:check_memory", warm_up="steps:compile_step"),
    13: Check("faults", "faults:check_faults", NO_GROUP),
    14: Check("kernels", "losses:check_kernels", warm_up="losses:compile_checked"),
}

AUTOTUNE = 0
"""No check: it is run in the place of them, and only where it is asked for."""


def find_check(number: int) -> Check:
    """Return a check, or autotuning."""
    if number == AUTOTUNE:
        return Check("autotune", "autotune:autotune", NO_GROUP, gpus=1)
    return CHECKS[number]
