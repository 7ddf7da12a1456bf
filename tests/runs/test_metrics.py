"""What the log says of a GPU that waits for the host."""

import pytest

from dist_vse.common.step_timer import OTHER, PARTS
from dist_vse.runs.metrics import device_hint


@pytest.mark.parametrize(
    ("share", "data_s", "said"),
    [
        (None, 0.1, None),  # a CPU
        (0.7, 0.1, None),
        (0.42, 0.01, "queued for 42% of the last steps; raise chunk_size"),
        (0.42, 0.5, "the batches come late: raise data.num_workers"),
    ],
)
def test_a_gpu_that_waits_gets_one_line_of_advice(
    share: float | None, data_s: float, said: str | None
) -> None:
    values = {f"{part}_s": 0.1 for part in (*PARTS, OTHER)} | {"data_s": data_s}
    found = device_hint(values if share is None else values | {"device_share": share})
    assert found is None if said is None else said in str(found)
