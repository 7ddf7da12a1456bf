import pytest
import torch

from dist_vse.training.prefetch_to_device import Chunk, prefetch_to_device

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_chunks_arrive_in_order_and_whole(device: str) -> None:
    chunks = [{"images": torch.full((4, 3), i, dtype=torch.uint8)} for i in range(5)]
    if device == "cuda":
        chunks = [{name: value.pin_memory() for name, value in chunk.items()} for chunk in chunks]
    found = [
        chunk["images"].double().sum().item()
        for chunk in prefetch_to_device(chunks, torch.device(device))
    ]
    assert found == [12 * i for i in range(5)]


@pytest.mark.parametrize(
    ("device", "ahead"), [("cpu", 0), pytest.param("cuda", 1, marks=NEEDS_GPU)]
)
def test_no_more_chunks_are_on_the_device_than_the_next(device: str, ahead: int) -> None:
    taken: list[int] = []

    def take(i: int) -> Chunk:
        taken.append(i)
        return {"tokens": torch.zeros(1)}

    coming = prefetch_to_device(map(take, range(5)), torch.device(device))
    next(coming)
    assert len(taken) == 1 + ahead
