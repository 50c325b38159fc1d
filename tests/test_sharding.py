"""FSDP2: parameters that are gathered by hooks, module by module."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmvig.backbones import ViG, ViGH

BACKBONES = {
    'ViG-H': lambda: ViGH({'embed_dims': 32, 'depths': [1, 1], 'num_heads': [1, 2]}, out_indices=(0, 1)),
    'ViG': lambda: ViG({'embed_dims': 32, 'depth': 2, 'num_heads': 2}, out_indices=(0, 1)),
}


@pytest.fixture
def mesh():
    """One process: what FSDP2 gives it between its hooks is a DTensor all the same."""
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh('cpu', (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize('parts', ['linear layers', 'all that have parameters'])
@pytest.mark.parametrize('kind', BACKBONES)
def test_parts_that_fsdp2_shards_compute_the_same(kind, parts, mesh):
    torch.manual_seed(0)
    whole = BACKBONES[kind]()
    sharded = copy.deepcopy(whole)
    for module in list(sharded.modules())[:0:-1]:
        own = any(True for _ in module.parameters(recurse=False))
        if isinstance(module, nn.Linear) if parts == 'linear layers' else own:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    images = torch.rand(2, 3, 64, 96)
    maps = [model(images) for model in (sharded, whole)]
    for one, other in zip(*maps, strict=True):
        torch.testing.assert_close(one, other)
    for outputs in maps:
        sum(output.sin().mean() for output in outputs).backward()
    for (name, one), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(one.grad, DTensor), name
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-6, msg=name)
