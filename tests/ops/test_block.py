"""A block as one operator: in Triton's interpreter, and on a GPU (pytest -m gpu)."""

import gc
import weakref
from collections import defaultdict
from functools import partial

import pytest
import torch
from compiled import compile_and_see
from torch import nn

from mmvig.backbones.block import Block
from mmvig.backbones.layers import Residual, SwiGLU
from mmvig.backbones.mixer import GatedTokenMixer
from mmvig.ops.block import op as ops

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'  # where conftest.py has Triton interpret its kernels
gpu = pytest.mark.gpu
# Norm and activations of ViG-H, of plain ViG-S and of plain ViG-T.
FAMILIES = {'ViGH': (nn.LayerNorm, False), 'ViG': (nn.RMSNorm, False), 'ViG-T': (nn.RMSNorm, True)}
every_family = pytest.mark.parametrize('family', FAMILIES)


def make(family='ViGH', backend='triton', channels=16, heads=1, drop_path=0.0):
    """A block with weights that are all different."""
    norm, acts = FAMILIES[family]
    torch.manual_seed(0)
    block = Block(
        partial(norm, channels, eps=1e-5),
        GatedTokenMixer(channels, heads, backend, conv_act=acts, out_act=acts),
        SwiGLU(channels, 8, backend),
        drop_path,
        backend,
    )
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    return block.to(DEVICE)


def make_inputs(size=(2, 3, 6), channels=16, branch=True, scaled=True):
    """x, and a branch with its scale or not."""
    generator = torch.Generator().manual_seed(1)
    x, b = torch.randn(2, *size, channels, generator=generator).to(DEVICE).requires_grad_()
    scale = torch.arange(size[0], device=DEVICE) / 2 if scaled else None
    return (x, b, scale) if branch else (x,)


def run(block, inputs, dtype=None):
    """Sum and branch, and the gradients of the tensors and of the weights."""
    inputs = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
    leaves = [x for x in inputs if x is not None and x.requires_grad] + list(block.parameters())
    torch.manual_seed(2)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        outputs = block(Residual(*inputs))[:2]
    given = [torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, given)]


def count(monkeypatch):
    """A list that grows with each call of the operator."""
    calls, function = [], ops.block_op
    monkeypatch.setattr(ops, 'block_op', lambda *x: calls.append(1) or function(*x))
    return calls


@every_family
@pytest.mark.parametrize('branch, scaled', [(False, False), (True, False), (True, True)])
def test_computes_what_the_modules_do(family, branch, scaled, monkeypatch):
    calls = count(monkeypatch)
    block, plain = make(family, drop_path=0.5), make(family, 'chunked', drop_path=0.5)
    inputs = make_inputs(branch=branch, scaled=scaled)
    for actual, expected in zip(run(block, inputs), run(plain, inputs), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        tolerance = 2e-5 * max(expected.abs().max().item(), 1e-2)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    assert len(calls) == 1


def assert_no_further(actual, plain, truth, slack=1.0):
    """Errors against float64 like plain PyTorch's: on the geometric mean, and roughly each of them."""
    ratios = []
    for i, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        assert a.dtype == p.dtype and a.isfinite().all(), i
        rounding = torch.finfo(p.dtype).eps / 8 * max(t.norm().item(), 1e-6)  # some are zero
        error, plain_error = (max((y - t).norm().item(), rounding) for y in (a, p))
        assert error <= 2.5 * slack * plain_error, (i, error, plain_error)
        ratios.append(error / plain_error)
    mean = torch.tensor(ratios).log().mean().exp()
    assert mean <= 1.15 * slack, ratios


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_nothing_away(dtype):
    inputs = make_inputs((2, 5, 6))
    truth = run(make(backend='chunked').double(), [x if x is None else x.double() for x in inputs])
    slack = 3.0 if dtype == torch.bfloat16 and not ON_GPU else 1.0  # the interpreter truncates to bf16
    assert_no_further(run(make(), inputs, dtype), run(make(backend='chunked'), inputs, dtype), truth, slack)


def arguments(block, inputs, monkeypatch):
    """What a block calls its operator with."""
    seen = []
    monkeypatch.setattr(ops, 'block_op', lambda *x: seen.append(x) or inputs[:2])
    block(Residual(*inputs))
    monkeypatch.undo()
    return seen[0]


def test_is_a_torch_operator(monkeypatch):
    """Without a branch, which test_compiled_is_the_same has."""
    args = arguments(make('ViG-T'), (*make_inputs(branch=False), None), monkeypatch)
    torch.library.opcheck(ops.block_op.op, args)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(ops.block_op.inference.op, args)


def test_second_derivative_is_refused():
    inputs = make_inputs()
    s, _, _ = make()(Residual(*inputs))
    (grad,) = torch.autograd.grad(s.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(grad.sum(), inputs[0])


def test_a_gradient_can_be_missing():
    block, inputs = make(), make_inputs()
    s, z, _ = block(Residual(*inputs))
    both = torch.autograd.grad(s.sum() + 0 * z.sum(), inputs[0], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(s.sum(), inputs[0]), both)
    _, z, _ = block(Residual(*inputs))
    assert torch.autograd.grad(z.sum(), block.mlp.fc1.weight)[0].abs().max() > 0


def test_compiled_is_the_same():
    block, inputs = make(), make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(
        block, fullgraph=True, dynamic=True, backend='inductor' if ON_GPU else 'aot_eager'
    )
    for size in ((2, 3, 6), (2, 5, 2)):
        inputs = make_inputs(size)
        for actual, expected in zip(run(compiled, inputs), run(block, inputs), strict=True):
            torch.testing.assert_close(actual, expected)


def test_compiled_inference_keeps_nothing():
    block, inputs = make(), make_inputs()
    compiled, seen = compile_and_see(block)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for actual, expected in zip(
                compiled(Residual(*inputs))[:2], block(Residual(*inputs))[:2], strict=True
            ):
                torch.testing.assert_close(actual, expected)
    assert set(seen) == {'mmvig.block_inference.default'}
    seen.clear()
    for actual, expected in zip(run(compiled, inputs), run(block, inputs), strict=True):
        torch.testing.assert_close(actual, expected)
    assert seen == ['mmvig.block.default', 'mmvig.block_backward.default']


def test_inference_has_no_gradient(monkeypatch):
    """As where a graph made without gradients is called with them."""
    inputs = make_inputs(branch=False)
    args = arguments(make('ViG-T'), (*inputs, None), monkeypatch)
    s, _ = ops.block_op.inference.op(*args)
    with pytest.raises(RuntimeError, match='with gradients disabled'):
        s.sum().backward()


def test_same_bits_however_it_runs():
    block, inputs = make(), make_inputs((3, 3, 6))
    results = run(block, inputs)
    assert all(map(torch.equal, results, run(block, inputs)))
    with torch.no_grad():
        for y, expected in zip(block.eval()(Residual(*inputs))[:2], results, strict=False):
            assert torch.equal(y, expected)
        for y, expected in zip(block(Residual(*(x[:2] for x in inputs)))[:2], results, strict=False):
            torch.testing.assert_close(y, expected[:2], rtol=1e-6, atol=1e-6)


def test_weights_changed_behind_autograd_are_seen():
    block, inputs = make(), make_inputs()
    with torch.no_grad():
        before = block(Residual(*inputs))[1]
        block.mlp.fc2.weight.data.mul_(2)  # as mmengine's EMAHook does; no version tells of it
        assert torch.equal(block(Residual(*inputs))[1], 2 * before)
    with torch.inference_mode():
        assert torch.equal(block(Residual(*inputs))[1], 2 * before)


def test_blocks_share_the_memory_of_half_weights(monkeypatch):
    monkeypatch.setattr(ops, '_unused', defaultdict(list))
    block, other, inputs = make(), make('ViG'), make_inputs()
    with torch.inference_mode():
        block(Residual(*inputs))
    results = run(block, inputs)
    run(other, inputs)
    assert all(map(torch.equal, results, run(block, inputs)))
    assert [len(unused) for unused in ops._unused.values()] == [1]
    weights = block._operands(inputs[0])
    with torch.no_grad():
        lent = [ops.borrow(torch.float32, weights) for _ in range(2)]  # as by two threads
    assert lent[0].memory.data_ptr() != lent[1].memory.data_ptr()
    with torch.no_grad():
        first = ops.borrow(torch.float32, weights)
        ops.give_back(first)
        with monkeypatch.context() as patch:
            patch.setattr(ops, 'current_stream', lambda device: -1)
            low = ops.borrow(torch.float32, weights)  # the first may still be read
            ops.give_back(low)
        assert low.memory.data_ptr() != first.memory.data_ptr()
        assert ops.borrow(torch.float32, weights) is first
    for low in lent:
        torch.testing.assert_close(low.views.fc2, block.mlp.fc2.weight)
        torch.testing.assert_close(low.transposed.fc2, block.mlp.fc2.weight.T)
    weight = weakref.ref(block.mlp.fc2.weight)
    del block, weights
    gc.collect()
    assert weight() is None


def add_hook(block):
    block.mlp.fc1.register_forward_hook(lambda *_: block.seen.append('hook'))


def replace(block):
    class Adapted(nn.Linear):
        def forward(self, x):
            block.seen.append('replaced')
            return super().forward(x)

    adapted = Adapted(16, 32, bias=False, device=DEVICE)
    adapted.load_state_dict(block.mixer.qkv.state_dict())
    block.mixer.qkv = adapted


@pytest.mark.parametrize('change', [add_hook, replace])
def test_changed_modules_run(change, monkeypatch):
    calls, block = count(monkeypatch), make()
    inputs, block.seen = make_inputs(), []
    expected = run(block, inputs)
    change(block)
    for a, e in zip(run(block, inputs), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert len(block.seen) == len(calls) == 1


def test_empty_batch():
    outputs = run(make(), make_inputs((0, 3, 6)))
    assert outputs[0].shape == (0, 3, 6, 16) and not any(x.any() for x in outputs)


# On a GPU from here on.


@gpu
@every_family
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size, channels', [((2, 56, 56), 96), ((3, 25, 38), 768), ((1, 3, 1), 192)])
def test_sweep(family, dtype, size, channels):
    heads = channels // 32
    inputs = make_inputs(size, channels)
    wide = [x if x is None else x.double() for x in inputs]
    truth = run(make(family, 'chunked', channels, heads).double(), wide)
    plain = run(make(family, 'chunked', channels, heads), inputs, dtype)
    actual = run(make(family, 'triton', channels, heads), inputs, dtype)
    # For three tokens in fp16, ViG's errors were 1.6 times plain PyTorch's on an H200; why is not known.
    few = dtype == torch.float16 and size[2] == 1
    assert_no_further(actual, plain, truth, 1.5 if few else 1.0)


@gpu
def test_cuda_graph():
    block, inputs = make(), make_inputs()
    with torch.no_grad():
        expected = block(Residual(*inputs))[:2]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = block(Residual(*inputs))[:2]
    graph.replay()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@gpu
def test_cuda_graph_of_gradients_at_a_new_size():
    """Constants that no call has made before, and which later ones must not take from the graph."""
    block, sizes = make(), ((2, 56, 56), (3, 56, 56))
    run(block, make_inputs(sizes[0]))  # compiles the kernels

    def gradients(inputs):
        return torch.autograd.grad(
            [y.sum() for y in block(Residual(*inputs))[:2]], [*inputs[:2], *block.parameters()]
        )

    # Leaves, so that none of autograd's nodes is of the default stream.
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in make_inputs(sizes[1])]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        actual = gradients(inputs)
    expected = gradients(inputs)
    graph.replay()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_runs_on_the_tensors_device():
    block, inputs = make(), make_inputs()
    expected = run(block, inputs)
    with torch.cuda.device(0):
        moved = [x.detach().to('cuda:1').requires_grad_(x.requires_grad) for x in inputs]
        actual = run(block.to('cuda:1'), moved)
        assert all(torch.equal(a.to(e.device), e) for a, e in zip(actual, expected, strict=True))
