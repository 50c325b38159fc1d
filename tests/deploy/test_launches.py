"""The launches that packages have, in Triton's interpreter: what the operators compute, at any size."""

from pathlib import Path

import pytest
import torch
from programs import run_tool, run_well
from torch import nn

from mmvig.backbones import ViGH

pytest.importorskip('triton')

from mmvig.deploy import launches
from mmvig.ops.bigla.plan import MAX_WALK

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
PROGRAM = str(Path(__file__).with_name('traced_launches.py'))
ARCH = dict(embed_dims=32, depths=[1, 1], num_heads=[1, 2])


def launch_now(kernel, grid, args, constants):
    """Outside of a graph."""
    kernel[grid](*args, **constants)


@pytest.mark.parametrize(
    ('dtype', 'planned'),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, 1),
        (torch.bfloat16, MAX_WALK + 8),
    ],
)
def test_launches_planned_for_any_size_compute_what_the_model_does(dtype, planned, monkeypatch):
    torch.manual_seed(0)
    model = ViGH(ARCH, out_indices=(0, 1), backend='triton', cuda_graphs=0)
    model = model.to(DEVICE).eval().requires_grad_(False)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2 if weight.ndim > 1 else 0.5)
    kernels = []
    monkeypatch.setattr(launches, 'launch', lambda *x: kernels.append(x[0].__name__) or launch_now(*x))
    if planned:  # for any number but those of channels, 32 and 64
        monkeypatch.setattr(launches, 'traced', lambda size: planned if size % 32 else size)
    images = torch.randn(3, 3, 33, 40, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        expected = model(images)
        assert not kernels
        with launches.visible():
            found = model(images)
    if planned:  # sequences are walked if they are short
        assert ('walk_kernel' in kernels) == (planned == 1)
        assert ('scan_kernel' in kernels) == (planned != 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * y.abs().max().item())


def test_a_graph_has_our_kernels_and_no_operator_of_ours(tmp_path):
    *kernels, free = run_well(PROGRAM, cwd=tmp_path).splitlines()
    counts = {name: int(count) for name, count in map(str.split, kernels)}
    # Norms of the stem's second convolution, between the stages, of both maps, and two a block.
    once_a_block = 'dwconv.forward', 'bigla.walk', 'gated_mix.forward', 'swiglu.project'
    expected = {
        'conv_norm.forward': 1,
        'norm.forward': 8,
        'bigla.output': 4,
        **dict.fromkeys(once_a_block, 2),
    }
    assert counts == {f'{name}_kernel': count for name, count in expected.items()}
    assert free == 'True'


def test_a_block_that_is_observed_is_refused(tmp_path):
    done = run_tool(PROGRAM, 'hooked', cwd=tmp_path)
    assert done.returncode == 1 and 'a block of the model is not as it was built' in done.stderr
