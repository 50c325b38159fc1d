"""cuda_graphs: its checks on a CPU; replays give what eager calls do on a GPU (pytest -m gpu)."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.utils import counters

from mmvig.backbones import ViG, ViGH, graphs
from mmvig.backbones.graphs import CALLS, CALLS_IN_A_ROW, WORTH

ARCHS = {
    ViGH: {'embed_dims': 32, 'depths': [1, 1, 1, 1], 'num_heads': [1, 2, 4, 8]},
    ViG: {'embed_dims': 32, 'depth': 2, 'num_heads': 1},
}
DEVICE = 'cuda'
gpu = pytest.mark.gpu
every_family = pytest.mark.parametrize('family', ARCHS)


def make(family=ViGH, cuda_graphs=1, device=None, **options):
    """A backbone that counts its eager calls (a capture's are some too) in ``calls``."""
    if family is ViG:
        options = {'img_size': 64, 'out_indices': (0, 1), **options}
    torch.manual_seed(0)
    model = family(ARCHS[family], cuda_graphs=cuda_graphs, **options).to(device or DEVICE).train()
    compute, model.calls = model._compute, []
    model._compute = lambda x: model.calls.append(1) or compute(x)
    return model


def images(seed=0, batch=2, side=64, device=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, side, side, generator=generator).to(device or DEVICE)


def loss_of(maps):
    return sum(
        (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum() for y in maps
    )


def train_step(model, x, dtype=None, scale=1.0, keep=False):
    """The maps; gradients are left in the parameters, and with ``keep`` added to what is there."""
    if not keep:
        model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        maps = model(x)
    (loss_of(maps) * scale).backward()
    return [y.detach() for y in maps]


def change_weights(model, rate=1e-3):
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=rate / max(p.grad.abs().max().item(), 1e-6))


def infer(model, x):
    with torch.no_grad():
        return model(x)


def warm(model, x, step=train_step, calls=CALLS):
    """Call until the graph is there and has been replayed; the list of eager calls is empty then."""
    for _ in range(calls):
        step(model, x)
    model.calls.clear()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(actual, expected):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), i
        assert a is None or (a.dtype == e.dtype and torch.equal(a, e)), (i, (a - e).abs().max())


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)


@pytest.mark.parametrize('value', [-1, 1.0, True, '1', None, 'always'])
@every_family
def test_bad_numbers_are_named(family, value):
    with pytest.raises(ValueError, match="cuda_graphs must be 'auto' or an int of at least 0, got"):
        make(family, value, device='cpu')


@every_family
def test_recomputed_blocks_are_refused(family):
    with pytest.raises(ValueError, match='cuda_graphs and with_cp exclude each other'):
        make(family, with_cp=True, device='cpu')
    assert make(family, 'auto', with_cp=True, device='cpu')._graphs.limit == 0


@every_family
def test_auto_is_the_default(family):
    assert family(ARCHS[family])._graphs.limit == 'auto'


@every_family
def test_runs_eagerly_on_a_cpu(family):
    model, plain = make(family, device='cpu'), make(family, 0, device='cpu')
    x = images(device='cpu')
    for _ in range(CALLS + 1):
        assert_same(model(x), plain(x))
    assert len(model.calls) == CALLS + 1


def test_bad_images_are_named():
    model = make(device='cpu')
    for _ in range(CALLS + 1):
        with pytest.raises(ValueError, match=r'images must be \[B, 3, H, W\]'):
            model(torch.zeros(3, 32, 32))


def test_compiles():
    model = make(device='cpu')
    del model._compute
    x = images(device='cpu', side=32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for a, e in zip(infer(compiled, x), infer(model, x), strict=True):
        torch.testing.assert_close(a, e)


def compiled_step(model, x, learn, dtype=torch.bfloat16):
    """Copies of the maps and, if it learns, of the gradients: the next step overwrites them."""
    torch.compiler.cudagraph_mark_step_begin()
    if learn:
        return [y.clone() for y in train_step(model, x, dtype)] + gradients(model)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        return [y.clone() for y in infer(model, x)]


@gpu
@pytest.mark.parametrize('family', ARCHS)
@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_compiled_steps(family, mode):
    """The first of each kind runs as it is, the second is recorded, the others are replayed."""
    model = make(family, 'auto', drop_path_rate=0.0)
    plain = make(family, 0, drop_path_rate=0.0)
    del model._compute
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for step, learn in enumerate([False] * 4 + [True] * 4 + [False, True] * 2):
        x = images(step)
        actual = compiled_step(compiled, x, learn)
        plain.load_state_dict(model.state_dict())
        expected, truth = (compiled_step(plain, x, learn, dtype) for dtype in (torch.bfloat16, None))
        for i, (a, e, t) in enumerate(zip(actual, expected, truth, strict=True)):
            assert (a is None) == (t is None), (step, i)
            if a is not None:
                assert a.dtype == e.dtype and a.shape == e.shape, (step, i)
                error, plain_error = ((y.float() - t).norm() for y in (a, e))
                assert error <= 2.5 * max(plain_error, 2**-8 * t.norm()), (step, i, error, plain_error)
        if learn:
            change_weights(model)
    assert not counters['inductor']['cudagraph_skips']


def assert_copies_start_without(model, x):
    del model._compute  # cannot be pickled
    assert model._graphs._graphs and '_graphs' not in model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._graphs.limit == 1 and not twin._graphs._graphs
        assert_same(infer(twin, x), infer(model, x))


def test_copies_start_without_graphs():
    model = make(device='cpu')
    model._graphs._graphs['kind'] = lambda: None  # cannot be pickled either
    assert_copies_start_without(model, images(device='cpu'))


class FakeGraph:
    """A graph that computes as without one, and counts."""

    def __init__(self, backbone, x, state):
        self.state, self.size, self.replays, self.is_refused = state, 1, 0, False

    def is_needed(self):
        return False

    def __call__(self, backbone, x):
        return backbone._compute(x)


class Policy:
    """Which calls of a small model on a CPU capture, replay, or run eagerly."""

    def __init__(self, monkeypatch):
        self.has_room, self.fails = True, False
        monkeypatch.setattr(graphs, '_is_plain', lambda x: True)
        monkeypatch.setattr(graphs, '_kind_of', lambda model, x: (torch.is_grad_enabled(), x.shape))
        monkeypatch.setattr(graphs, '_has_room', lambda device, held: self.has_room)
        monkeypatch.setattr(graphs, '_Graph', self.make)
        self.model = torch.nn.Linear(1, 1)
        self.model.inner = torch.nn.Linear(1, 1)
        self.model._compute = lambda x: (x,)
        self.graphs = graphs.Graphs('auto')

    def make(self, *args):
        if self.fails:
            raise torch.cuda.OutOfMemoryError('out of memory')
        return FakeGraph(*args)

    def call(self, times, size=1):
        """'e', 'c' or 'r' for each call."""
        log = ''
        for _ in range(times):
            before = {kind: graph.replays for kind, graph in self.graphs._graphs.items()}
            self.graphs.run(self.model, torch.zeros(size))
            now = self.graphs._graphs
            kind = torch.is_grad_enabled(), torch.Size([size])
            log += 'e' if kind not in now else 'c' if kind not in before else 'r'
        return log


@pytest.fixture
def policy(monkeypatch):
    return Policy(monkeypatch)


def test_auto_captures_what_comes_in_a_row(policy):
    assert policy.call(CALLS_IN_A_ROW + 2) == 'e' * (CALLS_IN_A_ROW - 1) + 'crr'
    for size in (2, 3) * CALLS_IN_A_ROW:
        assert policy.call(1, size) == 'e'
    assert policy.call(1) == 'r'  # the last batch of an epoch may be smaller
    with torch.no_grad():  # validation has a graph of its own
        assert policy.call(CALLS_IN_A_ROW, 4)[-1] == 'c'
    assert policy.call(1) == 'r' and len(policy.graphs._graphs) == 2


def test_auto_replaces_a_graph(policy):
    policy.call(CALLS_IN_A_ROW + WORTH)
    assert policy.call(CALLS_IN_A_ROW, 2)[-2:] == 'ec' and len(policy.graphs._graphs) == 1


def test_auto_waits_longer_after_a_capture_in_vain(policy):
    policy.call(CALLS_IN_A_ROW)
    assert policy.call(CALLS_IN_A_ROW, 2)[-1] == 'c'
    assert policy.call(2 * CALLS_IN_A_ROW, 3) == 'e' * (2 * CALLS_IN_A_ROW - 1) + 'c'


def test_auto_gives_memory_back(policy):
    policy.call(CALLS_IN_A_ROW)
    policy.has_room = False
    assert policy.call(1, 2) == 'e' and not policy.graphs._graphs


def test_auto_sees_changes(policy):
    policy.call(CALLS_IN_A_ROW + 1)
    policy.model.inner.weight.requires_grad_(False)
    assert policy.call(1) == 'e'
    policy.model.inner.register_forward_hook(lambda *_: None)
    assert policy.call(5 * CALLS_IN_A_ROW) == 'e' * 5 * CALLS_IN_A_ROW


def test_auto_goes_on_without_where_a_capture_fails(policy, caplog):
    policy.fails = True
    assert policy.call(2 * CALLS_IN_A_ROW) == 'e' * 2 * CALLS_IN_A_ROW
    assert policy.graphs.limit == 0


def test_auto_leaves_distributed_training_alone(policy, monkeypatch):
    monkeypatch.setattr(graphs, '_is_distributed', lambda: True)
    assert policy.call(2 * CALLS_IN_A_ROW) == 'e' * 2 * CALLS_IN_A_ROW


def test_precisions_are_read_by_the_interface_in_use():
    """In a process of its own, as the newer settings forbid reading the older ones for good."""
    code = """
import torch
from mmvig.backbones import graphs
before = graphs._precisions()
if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    torch.backends.cuda.matmul.fp32_precision = 'tf32'
else:
    torch.backends.cuda.matmul.allow_tf32 = True
assert graphs._precisions() != before
"""
    subprocess.run([sys.executable, '-c', code], check=True)


def test_refused_kinds_stay_without(policy):
    policy.call(CALLS_IN_A_ROW)
    next(iter(policy.graphs._graphs.values())).is_refused = True
    assert policy.call(2 * CALLS_IN_A_ROW) == 'e' * 2 * CALLS_IN_A_ROW


# On a GPU from here on.


@gpu
def test_copies_start_without_captured_graphs():
    model = make()
    warm(model, images())
    assert_copies_start_without(model, images())


@gpu
@every_family
@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16])
def test_training_equals_eager(family, dtype, deterministic):
    model, plain = make(family), make(family, 0)
    scale = 4.0 if dtype == torch.float16 else 1.0
    for step in range(CALLS + 3):
        x = images(step)
        assert_same(train_step(model, x, dtype, scale), train_step(plain, x, dtype, scale))
        assert_same(gradients(model), gradients(plain))
        if step == CALLS - 1:
            model.calls.clear()
        change_weights(model)
        change_weights(plain)
    assert not model.calls
    assert_same(model.parameters(), plain.parameters())


@gpu
def test_grad_scaler():
    model, x = make(), images()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(CALLS + 5):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = sum(y.float().square().mean() for y in model(x))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 256.0 and losses[-1] < losses[CALLS] < losses[0]


@gpu
def test_accumulated_gradients(deterministic):
    model, plain = make(), make(cuda_graphs=0)
    warm(model, images())
    results = []
    for each in (model, plain):
        each.zero_grad(set_to_none=True)
        kept = []
        for seed in range(3):
            train_step(each, images(seed), keep=True)
            kept.append(gradients(each))
        results.append([g for part in kept for g in part])
    assert not model.calls
    assert_same(*results)


@gpu
def test_gradients_are_not_overwritten():
    model = make()
    warm(model, images())
    held = torch.autograd.grad(loss_of(model(images(1))), list(model.parameters()))
    before = [g.clone() for g in held]
    train_step(model, images(2))
    assert not model.calls
    assert_same(held, before)


@gpu
def test_gradient_of_the_image(deterministic):
    model, plain = make(), make(cuda_graphs=0)
    for seed in range(CALLS + 2):
        results = []
        for each in (model, plain):
            x = images(seed).requires_grad_()
            results.append([*train_step(each, x), x.grad, *gradients(each)])
        assert_same(*results)
        if seed == CALLS - 1:
            model.calls.clear()
    assert not model.calls


@gpu
@every_family
@pytest.mark.parametrize('frozen_stages', [0, 1])
def test_frozen_stages(family, frozen_stages, deterministic):
    options = {'frozen_stages': frozen_stages}
    model, plain = make(family, **options), make(family, 0, **options)
    warm(model, images())
    for seed in range(2):
        x = images(seed)
        assert_same(train_step(model, x), train_step(plain, x))
        assert_same(gradients(model), gradients(plain))
        assert [y.requires_grad for y in model(x)] == [y.requires_grad for y in plain(x)]
    assert not model.calls


@gpu
def test_all_frozen():
    model = make(out_indices=(0,), frozen_stages=1)
    warm(model, images(), lambda model, x: model(x))
    maps = model(images(1))
    assert not model.calls and not maps[0].requires_grad
    assert_same(maps, infer(make(cuda_graphs=0, out_indices=(0,), frozen_stages=1), images(1)))


@gpu
def test_other_shapes_run_eagerly(deterministic):
    model, plain = make(), make(cuda_graphs=0)
    warm(model, images())
    for _ in range(CALLS + 1):
        x = images(side=96)
        assert_same(train_step(model, x), train_step(plain, x))
        assert_same(gradients(model), gradients(plain))
    assert len(model.calls) == CALLS + 1
    train_step(model, images())
    assert len(model.calls) == CALLS + 1


@gpu
def test_several_kinds(deterministic):
    """Two shapes and both modes, in turn."""
    model, plain = make(cuda_graphs=3), make(cuda_graphs=0)
    for step in range(CALLS + 2):
        if step == CALLS:
            model.calls.clear()
        for side in (64, 96):
            assert_same(
                train_step(model, images(step, side=side)), train_step(plain, images(step, side=side))
            )
            assert_same(gradients(model), gradients(plain))
            change_weights(model)
            change_weights(plain)
        x = images(step)
        assert_same(infer(model, x), infer(plain, x))
    assert not model.calls


def move(model):
    for p in model.parameters():
        p.data = p.data.clone() * 1.5


def assign(model):
    state = {name: 1.5 * p for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace(model):
    linear = model.stages[1].blocks[0].mlp.fc1
    other = copy.deepcopy(linear)
    other.weight.data.mul_(1.5)
    model.stages[1].blocks[0].mlp.fc1 = other


def freeze(model):
    model.stages[0].requires_grad_(False)


@gpu
@pytest.mark.parametrize('change', [move, assign, replace, freeze])
def test_changed_parameters_are_seen(change, deterministic):
    model, plain = make(), make(cuda_graphs=0)
    warm(model, images())
    change(model)
    change(plain)
    for seed in range(CALLS + 1):
        assert_same(train_step(model, images(seed)), train_step(plain, images(seed)))
        assert_same(gradients(model), gradients(plain))
    model.calls.clear()
    train_step(model, images())
    assert not model.calls


@gpu
def test_swapped_weights_keep_the_graph():
    """As mmengine's EMAHook swaps them for validation, and back."""
    model = make()
    warm(model, images())
    own = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * 1.5
    swapped = infer(model, images())
    for p, data in zip(model.parameters(), own, strict=True):
        p.data = data
    model.calls.clear()
    maps = train_step(model, images())
    assert not model.calls and not torch.equal(maps[3], swapped[3])


@gpu
def test_hooks_run():
    model, seen = make(), []
    warm(model, images())
    handle = model.stages[1].register_forward_hook(lambda *_: seen.append('inside'))
    train_step(model, images())
    handle.remove()
    model.register_forward_hook(lambda *_: seen.append('outside'))
    model.calls.clear()
    train_step(model, images())
    assert seen == ['inside', 'outside'] and not model.calls


@gpu
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_inference(mode):
    model, plain = make().eval(), make(cuda_graphs=0).eval()
    with mode():
        for _ in range(CALLS):
            model(images())
        model.calls.clear()
        first = model(images(1))
        second = model(images(2))
        assert not model.calls
        assert_same([*first, *second], [*plain(images(1)), *plain(images(2))])
        assert all(y.is_contiguous() for y in first)
    assert_same(infer(model, images(3)), infer(plain, images(3)))  # made in inference mode, used without
    assert not model.calls


@gpu
def test_autocast_inference():
    model, plain = make().eval(), make(cuda_graphs=0).eval()
    with torch.autocast(DEVICE, torch.bfloat16):
        warm(model, images(), infer)
        expected = infer(plain, images(1))
        assert_same(infer(model, images(1)), expected)
        assert not model.calls
        with torch.no_grad():
            model.stages[0].blocks[0].mlp.fc1.weight.mul_(2)  # a cached cast would not show it
        assert not torch.equal(infer(model, images(1))[0], expected[0])
    assert not model.calls
    assert infer(model, images())[0].dtype == torch.float32


@gpu
def test_drop_path_differs():
    model, x = make(drop_path_rate=0.5), images(batch=8)
    warm(model, x)
    results = [train_step(model, x)[3] for _ in range(4)]
    assert not model.calls
    assert any(not torch.equal(results[0], other) for other in results[1:])
    torch.manual_seed(3)
    first = train_step(model, x)
    torch.manual_seed(3)
    assert_same(train_step(model, x), first)


@gpu
def test_two_forward_passes_before_the_backward_pass(deterministic):
    model, plain = make(), make(cuda_graphs=0)
    warm(model, images())
    for each in (model, plain):
        each.zero_grad(set_to_none=True)
        first, second = each(images(1)), each(images(2))
        (loss_of(first) + 2 * loss_of(second)).backward()
    assert len(model.calls) == 1
    for a, e in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@gpu
def test_passes_without_a_backward_pass_do_not_block():
    model = make()
    warm(model, images())
    for seed in range(3):
        model(images(seed))
    assert not model.calls


def close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.equal(a, e) or (a - e).abs().max() <= 1e-4 * e.abs().max()


@gpu
def test_second_backward_pass(deterministic):
    """With DropPath as it was drawn, also after another forward pass; then there is no graph."""
    model, plain = make(drop_path_rate=0.5), make(cuda_graphs=0, drop_path_rate=0.5)
    x = images(batch=8)
    warm(model, x)
    results = []
    for each in (model, plain):
        each.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss, other = loss_of(each(x)), loss_of(each(x + 1))
        loss.backward(retain_graph=True)
        once = gradients(each)
        loss.backward()
        twice = gradients(each)
        other.backward()
        results.append([*once, *twice, *gradients(each)])
    close(*results)
    with pytest.raises(RuntimeError, match='second time'):
        loss.backward()
    model.calls.clear()
    train_step(model, x)
    assert model.calls


@gpu
def test_unused_maps(deterministic):
    results = []
    for model in (make(), make(cuda_graphs=0)):
        warm(model, images())
        model.zero_grad(set_to_none=True)
        model(images())[1].sum().backward()
        results.append(gradients(model))
        assert model.norm3.weight.grad is None and model.norm1.bias.grad.any()
    close(*results)


@gpu
def test_weights_changed_before_the_backward_pass_are_refused():
    model = make()
    warm(model, images())
    loss = loss_of(model(images()))
    change_weights(model)
    with pytest.raises(RuntimeError, match='changed in place'):
        loss.backward()


@gpu
@pytest.mark.parametrize('dtype', [None, torch.float16])
def test_auto_trains_as_eager(dtype, deterministic):
    """With DropPath's random numbers, and a smaller batch and a validation in between."""
    model, plain = make(cuda_graphs='auto', drop_path_rate=0.5), make(cuda_graphs=0, drop_path_rate=0.5)
    results = []
    for each in (model, plain):
        torch.manual_seed(7)
        maps = []
        for step in range(CALLS_IN_A_ROW + 4):
            maps += train_step(each, images(step), dtype)
            if step == CALLS_IN_A_ROW:
                each.calls.clear()
                maps += train_step(each, images(batch=1), dtype)
                maps += infer(each, images(side=96))
            change_weights(each)
        results.append([*maps, *each.parameters(), torch.cuda.get_rng_state()])
    assert len(model.calls) == 2
    assert_same(*results)


@gpu
@pytest.mark.parametrize('mode', ['checkpoint', 'anomaly'])
def test_auto_runs_eagerly_where_passes_are_watched(mode):
    model = make(cuda_graphs='auto')
    warm(model, images(), calls=CALLS_IN_A_ROW + 1)
    if mode == 'checkpoint':
        maps = torch.utils.checkpoint.checkpoint(model, images().requires_grad_(), use_reentrant=False)
        loss_of(maps).backward()
        assert len(model.calls) == 2
    else:
        with torch.autograd.detect_anomaly(check_nan=False):
            train_step(model, images())
        assert len(model.calls) == 1


@gpu
def test_auto_in_other_threads_and_streams():
    model, plain = make(cuda_graphs='auto').eval(), make(cuda_graphs=0).eval()
    warm(model, images(), infer, CALLS_IN_A_ROW + 1)
    results = {}

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(20):
                results[i, seed] = infer(model, images(seed + 100 * i))
        torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    for (i, seed), maps in results.items():
        assert_same(maps, infer(plain, images(seed + 100 * i)))


@gpu
def test_auto_goes_on_after_a_capture_that_fails(deterministic):
    """Since something waits for the GPU."""
    model, plain = make(cuda_graphs='auto'), make(cuda_graphs=0)
    compute = model._compute
    model._compute = lambda x: [compute(x), x.sum().item()][0]
    for step in range(CALLS_IN_A_ROW + 2):
        assert_same(train_step(model, images(step)), train_step(plain, images(step)))
        assert_same(gradients(model), gradients(plain))
    assert model._graphs.limit == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@gpu
def test_captures_with_live_gradient_nodes():
    """As DDP holds them; they were made on the default stream."""
    model, x = make(), images()
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    warm(model, x)
    train_step(model, x)
    assert not model.calls and len(nodes) == len(list(model.parameters()))


@gpu
def test_captures_while_another_thread_pins_memory():
    """As a DataLoader does for the next batches."""
    model, done, pinned = make(), threading.Event(), []

    def pin():
        while not done.is_set() and len(pinned) < 1000:
            pinned.append(torch.empty(2**16).pin_memory())

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        warm(model, images())
        train_step(model, images())
    finally:
        done.set()
        thread.join()
    assert pinned and not model.calls


@gpu
def test_memory_is_freed():
    model = make(cuda_graphs=2)
    del model._compute  # it makes a cycle
    for _ in range(CALLS):
        train_step(model, images())
        infer(model, images())
    assert len(model._graphs._graphs) == 2
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    size = sum(p.nbytes for p in model.parameters())
    del model
    assert torch.cuda.memory_allocated() <= before - 2 * size  # the parameters and the graphs' gradients
