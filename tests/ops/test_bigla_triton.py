"""BiGLA's Triton backend: small cases in Triton's interpreter, the full sweep on a GPU (pytest -m gpu)."""

import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import run_tool, run_well
from torch.utils.checkpoint import checkpoint

from mmvig.ops import bigla, bigla_packed
from mmvig.ops.bigla import op as backend
from mmvig.ops.bigla import unpack

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'  # where conftest.py has Triton interpret its kernels
HERE = Path(__file__).parent

NAMES = ('o', 'q', 'k', 'v', 'g_fwd', 'g_bwd')
GATES = ['normal', 'strong', 'closed', 'open', 'mixed']
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.gpu


def make_inputs(
    num_tokens, key=16, value=32, batch=1, heads=1, gates='normal', dtype=torch.float32, seed=0
):
    """q, k, v, g_fwd, g_bwd as views of two fused buffers, as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, num_tokens, heads * (2 * key + value), generator=generator)
    g = torch.randn(batch, num_tokens, 2 * heads * key, generator=generator)
    if gates == 'strong':
        g = 100 * g
    elif gates in ('closed', 'open'):
        g = torch.full_like(g, -1000 if gates == 'closed' else 1000)
    elif gates == 'mixed':  # per token and channel, with ordinary gates between the extremes
        g = torch.where(g.abs() > 1, 1000 * g.sign(), g)
    return unpack(qkv.to(DEVICE, dtype), g.to(DEVICE, dtype), heads)


def run(inputs, name, seed=1):
    """Output and the five gradients of a fixed random projection of it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = bigla(*inputs, backend=name)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, do)]


def assert_accurate(inputs):
    """Errors against float64: no more than what rounding allows, and plain PyTorch in the same dtype has.

    A factor of 2 for the largest error and of 2.2 for the RMS error (2.1 was seen at K = V = 256). Both
    have a floor: what tf32x3 products leave in float32, one rounding of the largest value otherwise.
    """
    dtype = inputs[2].dtype
    truth = run([x.double() for x in inputs], 'chunked')
    plain, actual = run(inputs, 'chunked'), run(inputs, 'triton')
    # The interpreter truncates to bf16 where a GPU rounds: errors twice as large and of one sign.
    slack = 4.0 if not ON_GPU and dtype == torch.bfloat16 else 1.0
    for name, a, p, t in zip(NAMES, actual, plain, truth, strict=True):
        assert a.dtype == p.dtype and a.shape == p.shape, name
        assert a.isfinite().all(), name
        largest = t.abs().max().item()
        tiny = torch.finfo(dtype).tiny
        error, plain_error = ((x.double() - t).abs().max().item() for x in (a, p))
        floor = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * largest
        assert error <= max(2 * slack * max(plain_error, floor), tiny), (name, error, plain_error, largest)
        rms, plain_rms = ((x.double() - t).pow(2).mean().sqrt().item() for x in (a, p))
        floor = {torch.float32: 4e-7, torch.bfloat16: 0, torch.float16: 0}[dtype] * largest
        assert rms <= max(2.2 * slack * max(plain_rms, floor), tiny), (name, rms, plain_rms)


@pytest.mark.parametrize('gates', GATES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_accurate(dtype, gates):
    assert_accurate(make_inputs(20, gates=gates, dtype=dtype))


@pytest.mark.parametrize('num_tokens', [1, 2, 16, 17, 33])
def test_lengths_around_a_chunk(num_tokens):
    assert_accurate(make_inputs(num_tokens, heads=1 if num_tokens > 16 else 3))


@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=gpu)])
def test_a_last_chunk_of_one_token(dtype):
    """The gradients of closed gates are tiny: 1e-28 of others'."""
    assert_accurate(make_inputs(33, gates='closed', dtype=dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_gates_of_a_single_token_have_no_gradient(dtype):
    inputs = [x.requires_grad_() for x in make_inputs(1, heads=3, dtype=dtype)]
    torch.manual_seed(1)
    o = bigla(*inputs, backend='triton')
    grads = torch.autograd.grad(o, inputs, torch.randn_like(o))
    assert all(x.any() for x in grads[:3]) and not any(x.any() for x in grads[3:])


@pytest.mark.parametrize('dtype', DTYPES)
def test_gates_at_the_ends_have_no_gradient(dtype):
    """No pair has the first token's forward gate, or the last one's backward gate, between its tokens."""
    *_, g_fwd, g_bwd = run(make_inputs(20, dtype=dtype), 'triton')
    assert g_fwd[:, 1:].all() and not g_fwd[:, 0].any()
    assert g_bwd[:, :-1].all() and not g_bwd[:, -1].any()


@pytest.mark.parametrize('dtype', DTYPES)
def test_open_gates_and_a_rare_strong_one(dtype):
    """Whose gradient must not be what is left of others', 1e7 times as large before their sigmoid."""
    inputs = [x.clone() for x in make_inputs(20, dtype=dtype)]
    for x in inputs[:2]:
        x *= 50  # what is left would be a normal number in float16 too
    for g in inputs[3:]:
        g.fill_(15)[:, 7] = -600
    assert_accurate(inputs)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('logit, normalizer', [(-1000, 0.022), (-math.inf, 16.0)])
def test_log_decays_that_float16_cannot_hold(dtype, logit, normalizer):
    """Of -inf the decay is 0 and of inf it is 1; a sum over tokens goes through float16."""
    inputs = [x.clone() for x in make_inputs(20, dtype=dtype)]
    for i, g in enumerate(inputs[3:]):
        g[:, 5 + i] = g[0, 12, 0, 3] = logit
        g[0, 3, 0, 2] = math.inf if math.isinf(logit) else 50
    o = bigla(*inputs, backend='triton', gate_normalizer=normalizer)
    t = bigla(*[x.double() for x in inputs], backend='reference', gate_normalizer=normalizer)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 4e-6}[dtype]
    assert (o - t).abs().max() <= tolerance * t.abs().max()
    if math.isinf(logit):
        assert_accurate(inputs)


@pytest.mark.parametrize('key, value', [(8, 24), (24, 16), (32, 64)])
def test_widths(key, value):
    assert_accurate(make_inputs(20, key, value))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 2),
    num_tokens=st.integers(1, 34),
    heads=st.integers(1, 2),
    key=st.integers(1, 20),
    value=st.integers(1, 20),
    gates=st.sampled_from(GATES),
    order=st.permutations([0, 1, 2]),
    gap=st.integers(0, 3),
)
def test_any_size_and_stride(batch, num_tokens, heads, key, value, gates, order, gap):
    inputs = make_inputs(num_tokens, key, value, batch, heads, gates)
    expected = run(inputs, 'chunked')
    back = [order.index(i) for i in range(3)]
    strided = [F.pad(x.permute(*order, 3), (0, gap))[..., : x.shape[-1]].permute(*back, 3) for x in inputs]
    for name, a, e in zip(NAMES, run(strided, 'triton'), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=5e-6 * max(e.abs().max().item(), 1e-20), msg=name)


def test_last_dimension_may_be_strided():
    inputs = make_inputs(20)
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for a, e in zip(run(strided, 'triton'), run(inputs, 'triton'), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_float32_gates_go_with_half_precision_inputs():
    q, k, v, g_fwd, g_bwd = make_inputs(20, dtype=torch.float16)
    grads = run((q, k, v, g_fwd.float(), g_bwd.float()), 'triton')
    assert [x.dtype for x in grads] == [torch.float16] * 4 + [torch.float32] * 2


def test_scale_and_normalizer():
    inputs = make_inputs(20)
    for options in ({'scale': 0.5}, {'gate_normalizer': 1.0}):
        a, e = (bigla(*inputs, backend=name, **options) for name in ('triton', 'chunked'))
        torch.testing.assert_close(a, e, rtol=0, atol=5e-6 * e.abs().max().item())


def test_packed_is_the_same_with_gradients_side_by_side():
    qkv, gates = torch.randn(1, 20, 2 * 64, device=DEVICE), torch.randn(1, 20, 2 * 32, device=DEVICE)
    packed = [x.clone().requires_grad_() for x in (qkv, gates)]
    out = bigla_packed(*packed, 2, backend='triton')
    views = unpack(qkv, gates, 2)
    expected = run(views, 'triton')
    assert torch.equal(out.detach(), expected[0].flatten(2))
    do = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, packed, do.flatten(2))
    for a, e in zip(unpack(*grads, 2), expected[1:], strict=True):
        assert torch.equal(a, e)
    chunked = bigla_packed(qkv, gates, 2, backend='chunked')
    torch.testing.assert_close(out.detach(), chunked, rtol=0, atol=5e-6 * chunked.abs().max().item())


def test_packed_refuses_widths_that_do_not_divide():
    with pytest.raises(ValueError, match=r'H \* \(2 K \+ V\)'):
        bigla_packed(torch.zeros(1, 4, 64), torch.zeros(1, 4, 30), 4)
    with pytest.raises(ValueError, match='3 dimensions'):
        bigla_packed(torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 32), 1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float32, marks=gpu)])
def test_same_bits_however_it_runs(dtype):
    """Twice; in training and evaluation; alone and in a batch."""
    inputs = make_inputs(20, batch=2, heads=1, gates='mixed', dtype=dtype)
    first, second = run(inputs, 'triton'), run(inputs, 'triton')
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        assert torch.equal(bigla(*inputs, backend='triton'), first[0])
    with torch.inference_mode():
        assert torch.equal(bigla(*inputs, backend='triton'), first[0])
    alone = bigla(*(x[1:] for x in inputs), backend='triton')
    assert torch.equal(alone, first[0][1:])


def test_halves_of_a_batch_give_the_same_bits(monkeypatch):
    from mmvig.ops.bigla import op

    # More chunks than one, with states of more than a quarter of the inputs' memory.
    inputs = make_inputs(*((200, 32, 64) if ON_GPU else (40, 16, 32)), batch=3, dtype=torch.bfloat16)
    whole = bigla(*inputs, backend='triton')
    batches = []
    make_states = op.make_states
    monkeypatch.setattr(op, 'make_states', lambda x, *a: (batches.append(len(x[0])), make_states(x, *a)))
    assert torch.equal(bigla(*inputs, backend='triton'), whole) and batches == [3]
    monkeypatch.setattr(op, 'MAX_STATES', 0)
    assert torch.equal(bigla(*inputs, backend='triton'), whole) and batches == [3, 2, 1]


def test_states_wait_in_the_output(monkeypatch):
    """Of sequences that are walked; chunks with strong gates find theirs when the others have theirs."""
    monkeypatch.setattr(backend, 'MAX_WALK', 80)
    q, k, v, *gates = make_inputs(68, heads=2, gates='mixed', dtype=torch.bfloat16)
    ordinary = make_inputs(68, heads=2, dtype=torch.bfloat16)[3:]
    of_strong = (torch.arange(68) >= 40)[:, None, None].to(DEVICE)
    gates = [torch.where(of_strong, g, other) for g, other in zip(gates, ordinary, strict=True)]
    assert_accurate((q, k, v, *gates))


def test_nan_stays_in_its_head():
    clean = run(make_inputs(20, heads=2, dtype=torch.bfloat16), 'triton')
    for which in (1, 3):  # a key and a gate
        inputs = [x.clone() for x in make_inputs(20, heads=2, dtype=torch.bfloat16)]
        inputs[which][0, 5, 1, 3] = float('nan')
        results = run(inputs, 'triton')
        for name, a, c in zip(NAMES, results, clean, strict=True):
            assert torch.equal(a[:, :, 0], c[:, :, 0]), (which, name)
        assert results[0][:, :, 1].isnan().any()


def test_empty_batch():
    inputs = make_inputs(5, batch=0)
    for x in run(inputs, 'triton'):
        assert x.numel() == 0


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in make_inputs(5)]
    (grad,) = torch.autograd.grad(bigla(*inputs, backend='triton').sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(grad.sum(), inputs[1])


def test_checkpointing():
    inputs = [x.requires_grad_() for x in make_inputs(20)]
    out = checkpoint(lambda *x: bigla(*x, backend='triton'), *inputs, use_reentrant=False)
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(bigla(*inputs, backend='triton').sum(), inputs)
    assert all(map(torch.equal, grads, expected))


def test_training_keeps_only_the_inputs():
    inputs = [x.requires_grad_() for x in make_inputs(20)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        bigla(*inputs, backend='triton')
    assert sorted(kept) == sorted(x.data_ptr() for x in inputs)


def test_is_a_torch_operator():
    inputs = [x.requires_grad_() for x in make_inputs(9)]
    torch.library.opcheck(backend.bigla_op.op, (*inputs, 0.25, 16.0))
    qkv, gates = (torch.randn(1, 9, n, device=DEVICE, requires_grad=True) for n in (64, 32))
    torch.library.opcheck(backend.bigla_packed_op.op, (qkv, gates, 1, 0.25, 16.0))


@pytest.mark.parametrize('packed', [pytest.param(False, marks=gpu), True])
def test_torch_compile_with_dynamic_length(packed):
    def function(*x):
        out = bigla_packed(*x, 1, backend='triton') if packed else bigla(*x, backend='triton')
        return out.sin()

    backend_name = 'inductor' if ON_GPU else 'aot_eager'
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend_name)
    for num_tokens in (100, 150, 333) if ON_GPU else (10, 20):
        if packed:
            inputs = [torch.randn(1, num_tokens, width, device=DEVICE) for width in (64, 32)]
        else:
            inputs = make_inputs(num_tokens)
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        for a, e in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (out, expected)), strict=True):
            torch.testing.assert_close(a, e)


def test_refuses_what_it_cannot_take():
    wide = make_inputs(4, key=300)
    with pytest.raises(ValueError, match='widths K and V up to 256'):
        bigla(*wide, backend='triton')
    with pytest.raises(ValueError, match='float64'):
        bigla(*make_inputs(4, dtype=torch.float64), backend='triton')
    assert bigla(*wide).shape == wide[2].shape


def test_other_devices_are_refused_or_fall_back(tmp_path):
    (tmp_path / 'it.py').write_text("""
import logging, torch
from mmvig.ops import bigla
logging.basicConfig(format='%(message)s')
x = [torch.zeros(1, 4, 1, 16)] * 5
assert bigla(*x).shape == x[0].shape
try:
    bigla(*x, backend='triton')
except ValueError as error:
    print(error)
""")
    said = run_well(str(tmp_path / 'it.py'), cwd=tmp_path)
    assert "backend 'triton' cannot run here: it runs on CUDA devices" in said


@pytest.mark.skipif(ON_GPU, reason='needs no GPU; there the sweep compiles for the one at hand')
@pytest.mark.parametrize('capability', [80, 100])
def test_kernels_fit_other_gpus(capability, tmp_path):
    """Compiled without a GPU: within what any of them gives a program, and a kernel for each launch."""
    lines = run_well(str(HERE / 'compile_kernels.py'), capability, cwd=tmp_path).splitlines()
    most = 227 if capability >= 90 else 163
    shared = [int(line.split()[2]) / (most if ' project_' in line else 99) for line in lines]
    assert len(shared) == 28 and max(shared) <= 1024, lines


def test_what_inductor_copies_of_kernels_is_whole(tmp_path):
    """What it compiles into a package is the kernels' own machine code."""
    lines = run_well(str(HERE / 'inductor_sources.py'), cwd=tmp_path).splitlines()
    assert len(lines) == 15 and all(line.endswith(' True') for line in lines), lines


def test_what_the_sanitizer_runs_starts_by_itself(tmp_path):
    """Without pytest, which finds modules that a script does not."""
    done = run_tool(str(HERE / 'sanitize.py'), 'nothing', cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown job nothing, choose from ['bigla', 'fused']" in done.stderr


# On a GPU from here on.


@gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('gates', GATES)
def test_sweep_gates(gates, dtype):
    for num_tokens in (49, 950):
        assert_accurate(make_inputs(num_tokens, batch=2, heads=3, gates=gates, dtype=dtype))


@gpu
def test_sweep_lengths():
    for num_tokens in (1, 2, 15, 16, 17, 49, 63, 64, 65, 196, 950, 3137, 60800):
        assert_accurate(make_inputs(num_tokens, heads=3, dtype=torch.bfloat16))


@gpu
@pytest.mark.parametrize(
    'key, value',
    [
        *[(8, 48), (16, 64), (16, 128), (24, 96), (32, 8), (32, 32), (32, 64), (32, 256)],
        *[(48, 24), (64, 64), (64, 128), (96, 8), (128, 128), (256, 16), (256, 256)],
    ],
)
def test_sweep_widths(key, value):
    for dtype in DTYPES[:1] if key == 256 else DTYPES:
        for num_tokens in (200, 900):  # states walked, and scanned
            assert_accurate(make_inputs(num_tokens, key, value, dtype=dtype))


@gpu
@pytest.mark.parametrize('dtype', DTYPES)
def test_short_and_long_sequences_share_kernels(dtype):
    """One segment has no states, several have: a kernel compiled for either must be right for the other."""
    for num_tokens in (20, 500, 20):
        assert_accurate(make_inputs(num_tokens, 16, 40, dtype=dtype))


@gpu
def test_auto_is_triton_on_a_gpu():
    inputs = make_inputs(100, dtype=torch.bfloat16)
    assert torch.equal(bigla(*inputs), bigla(*inputs, backend='triton'))
    assert bigla(*(x.double() for x in inputs)).dtype == torch.float64


@gpu
def test_compiles_for_no_length():
    from mmvig.ops.bigla import kernels

    def compiled():
        names = ('walk_kernel', 'states_kernel', 'scan_kernel', 'output_kernel', 'gradient_kernel')
        return sum(
            len(cache[0]) for name in names for cache in getattr(kernels, name).device_caches.values()
        )

    for num_tokens in (1, 70, 500, 1500, 3000, 5000):  # one chunk, all kinds of walk and of scan
        run(make_inputs(num_tokens, heads=3, dtype=torch.bfloat16), 'triton')
    before = compiled()
    for i in range(50):
        run(make_inputs(65 + 97 * i, heads=3, dtype=torch.bfloat16), 'triton')
    assert compiled() == before


@gpu
def test_cuda_graph():
    inputs = make_inputs(200, dtype=torch.bfloat16)
    expected = bigla(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bigla(*inputs)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@gpu
def test_autocast_leaves_it_alone():
    inputs = make_inputs(100, dtype=torch.bfloat16)
    with torch.autocast('cuda', torch.float16):
        assert torch.equal(bigla(*inputs), bigla(*inputs, backend='triton'))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_runs_on_the_tensors_device():
    inputs = make_inputs(200, dtype=torch.bfloat16)
    expected = run(inputs, 'triton')
    with torch.cuda.device(0):
        for a, e in zip(run([x.to('cuda:1') for x in inputs], 'triton'), expected, strict=True):
            assert a.device.index == 1 and torch.equal(a.to(e.device), e)


@gpu
def test_threads_and_streams():
    inputs = make_inputs(2000, heads=3, dtype=torch.bfloat16)
    expected = bigla(*inputs)
    torch.cuda.synchronize()
    results = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(bigla(*inputs))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(x, expected) for x in results)


@gpu
def test_more_elements_than_32_bits_count():
    num_tokens = 2**25  # 3 heads * 64 * 2^25 = 6.4e9 elements
    qkv = torch.randn(1, num_tokens, 192, device='cuda', dtype=torch.bfloat16)
    gates = torch.randn(1, num_tokens, 96, device='cuda', dtype=torch.bfloat16)
    out = bigla_packed(qkv, gates, 3)
    tail = slice(num_tokens - 4096, None)  # all decays over 4,000 tokens are far below rounding
    expected = bigla_packed(qkv[:, tail], gates[:, tail], 3)
    assert torch.equal(out[:, -512:], expected[:, -512:])


@gpu
@pytest.mark.parametrize('batch, tokens, key', [(2, 60800, 16), (2, 65536, 32), (128, 784, 16)])
def test_forward_takes_little_memory(batch, tokens, key):
    qkv = torch.randn(batch, tokens, 12 * key, device='cuda', dtype=torch.bfloat16)
    gates = torch.randn(batch, tokens, 6 * key, device='cuda', dtype=torch.bfloat16)
    bigla_packed(qkv, gates, 3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = bigla_packed(qkv, gates, 3)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra <= 0.25 * (qkv.nbytes + gates.nbytes)


@gpu
def test_short_training_is_the_same():
    """ViG-H-T on a small task with both backends: losses agree within rounding drift; AMP stays finite."""
    from mmvig.backbones import ViGH

    def train(name, steps, dtype=None):
        torch.manual_seed(0)
        model = ViGH('tiny', backend=name, out_indices=(3,), drop_path_rate=0.0).cuda()
        head = torch.nn.Linear(768, 4).cuda()
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        data = torch.Generator().manual_seed(1)
        patterns = torch.randn(4, 3, 64, 96, generator=data)
        losses = []
        for _ in range(steps):
            labels = torch.randint(4, (8,), generator=data)
            images = patterns[labels] + torch.randn(8, 3, 64, 96, generator=data)
            with torch.autocast('cuda', dtype, enabled=dtype is not None):
                logits = head(model(images.cuda())[0].mean((2, 3)))
            loss = F.cross_entropy(logits.float(), labels.cuda())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    chunked, fast = train('chunked', 200), train('triton', 200)
    assert chunked[-20:].mean() < 0.5 * chunked[:5].mean()
    torch.testing.assert_close(fast[:20], chunked[:20], rtol=1e-3, atol=1e-3)
    assert abs(fast[-20:].mean() - chunked[-20:].mean()) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        assert train('triton', 50, dtype).isfinite().all()
