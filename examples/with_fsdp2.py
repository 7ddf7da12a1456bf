"""FSDP2 (`fully_shard`), with gradient caching: gradients are reduced in the last chunk alone."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import RATE, Towers, rank_batches, save_weights


def main() -> None:
    """Train for a few steps under torchrun, with one process or more."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Towers()
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    criterion = GlobalContrastiveLoss("convse++")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    of_scale = torch.optim.SGD(criterion.parameters(), lr=RATE)  # no part of the sharded model

    for batch in rank_batches(dist.get_rank(), dist.get_world_size()):
        loss = cached_step(model, criterion, batch, chunk_size=4)
        for each in (optimizer, of_scale):
            each.step()
            each.zero_grad()
        if dist.get_rank() == 0:
            print(f"loss {loss.item():.6f}")

    save_weights(model, criterion)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
