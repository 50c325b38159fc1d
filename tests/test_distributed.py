"""Two processes with half a batch each train as one process with the whole batch."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from programs import run_well
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mmvig.backbones import ViGH

ARCH = {'embed_dims': 16, 'depths': [1, 1], 'num_heads': [1, 2]}


def train(rank, world_size, path, with_cp):
    """Three steps of a rank's share of the batches; rank 0 saves the parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ViGH(ARCH, out_indices=(0, 1), with_cp=with_cp).train()
    if world_size > 1:
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29611')
        distributed.init_process_group('gloo', rank=rank, world_size=world_size)
        model = DistributedDataParallel(model)  # fails on a parameter without gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = torch.randn(4, 3, 40, 56, generator=generator)
        loss = sum(out.sin().mean() for out in model(batch.chunk(world_size)[rank]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        torch.save([p.detach() for p in model.parameters()], path)
    if world_size > 1:
        distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """The two recompute their blocks in the backward pass besides, the one does not."""
    single, double = tmp_path / 'single.pth', tmp_path / 'double.pth'
    train(0, 1, single, with_cp=False)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: run_well(__file__, rank, 2, double, cwd=tmp_path), (0, 1)))
    torch.manual_seed(0)
    initial = ViGH(ARCH, out_indices=(0, 1)).parameters()
    moved = 0
    for one, two, start in zip(torch.load(single), torch.load(double), initial, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        moved = max(moved, (one - start).abs().max().item())
    assert moved > 1e-3


if __name__ == '__main__':
    train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], with_cp=True)
