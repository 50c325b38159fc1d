"""cuda_graphs: its checks on a CPU; replays give what eager calls do on a GPU (pytest -m gpu)."""

import copy
import functools
import gc
import pickle
import random
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from programs import run_well
from torch._dynamo.utils import counters

from mmvig.backbones import ViG, ViGH
from mmvig.cuda_graphs import AGE, CALLS, WORTH, CudaGraphs, capture, memory
from mmvig.cuda_graphs import policy as rules
from mmvig.engine.cuda_graphs_hook import CudaGraphsHook, summary

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
    assert make(family, 'auto', with_cp=True, device='cpu').graphs.limit == 0


@every_family
def test_auto_is_the_default(family):
    assert family(ARCHS[family]).graphs.limit == 'auto'


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
    model = make(device='cpu', out_indices=(0,))
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
    assert model.graphs._graphs and 'graphs' not in model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.graphs.limit == 1 and not twin.graphs._graphs
        assert_same(infer(twin, x), infer(model, x))


def test_copies_start_without_graphs():
    model = make(device='cpu')
    model.graphs._graphs['kind'] = lambda: None  # cannot be pickled either
    assert_copies_start_without(model, images(device='cpu'))


class FakeGraph:
    """A graph that computes as without one, and counts."""

    def __init__(self, module, call, inputs, tensors, state, pool, has_run):
        self.state, self.pool, self.replays, self.is_refused = state, pool, 0, False
        self.has_run = has_run

    def __call__(self, module, call, tensors):
        return call(*tensors)


class FakePool:
    def __init__(self, where):
        self.where, self.size, self.needed = where, 1, False

    def is_needed(self):
        return self.needed


class Policy:
    """Which calls of a small model on a CPU capture, replay, or run eagerly."""

    def __init__(self, monkeypatch):
        self.has_room, self.fails = True, False
        monkeypatch.setattr(rules, '_is_plain', lambda x: True)
        monkeypatch.setattr(
            rules, '_kind_of', lambda model, x: ('here', torch.is_grad_enabled(), x[0].shape)
        )
        monkeypatch.setattr(rules, '_has_room', lambda device, pools: self.has_room)
        monkeypatch.setattr(rules, 'Graph', self.make)
        monkeypatch.setattr(rules, 'Pool', FakePool)
        self.model = torch.nn.Linear(1, 1)
        self.model.inner = torch.nn.Linear(1, 1)
        self.model.inner.rate = 0.0
        self.graphs = CudaGraphs('auto')

    def make(self, *args):
        if self.fails:
            raise torch.cuda.OutOfMemoryError('out of memory')
        return FakeGraph(*args)

    def call(self, times, size=1, settings=(), function=lambda x: (x,), learned=0):
        """'e', 'c' or 'r' for each call: the first letters of what it was counted as."""
        log = ''
        for _ in range(times):
            before = self.graphs.counts.copy()
            outputs = self.graphs.run(self.model, function, torch.zeros(size), settings=settings)
            self.outputs = outputs
            if learned:
                sum(outputs[:learned]).sum().backward()
            ((_, outcome),) = self.graphs.counts - before
            log += outcome[0]
        return log


@pytest.fixture
def policy(monkeypatch):
    return Policy(monkeypatch)


def test_kinds_differ_by_autocast(monkeypatch):
    assert capture.autocast_dtype() is None
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device: device == 'cuda')
    assert capture.autocast_dtype() is torch.get_autocast_dtype('cuda')


def test_eager_passes_beside_graphs_are_lean(policy):
    log = []

    def lean(x):
        log.append(len(x))
        return (x,)

    policy.graphs.run = functools.partial(policy.graphs.run, lean=lean)
    policy.call(CALLS)
    assert not log  # there were no graphs
    policy.call(CALLS, size=2)
    assert log == [2] * (CALLS - 1)
    for size in range(3, rules.TRIAL):
        policy.call(1, size)
    log.clear()
    policy.call(1, size=rules.TRIAL)
    assert not log  # most passes are eager
    policy.call(2 * rules.TRIAL)
    policy.call(1, size=rules.TRIAL + 1)
    assert log == [rules.TRIAL + 1]
    policy.model.inner.register_buffer('seen', torch.zeros(1))
    policy.call(1, size=rules.TRIAL + 2)
    del policy.model.inner.seen
    policy.model.inner.register_forward_hook(lambda *_: None)
    policy.call(1, size=rules.TRIAL + 3)
    assert log == [rules.TRIAL + 1]  # statistics would be taken, and a hook be called, twice


@every_family
def test_other_threads_do_not_meet_a_lean_pass(family, monkeypatch):
    model, x = make(family, device='cpu'), images(device='cpu')
    plain, recomputed = make(family, device='cpu'), []

    def checkpoint(block, *args, **_):
        recomputed.append(threading.get_ident())
        if len(recomputed) == 1:  # in the middle of the lean pass
            thread = threading.Thread(target=model, args=(x,))
            thread.start()
            thread.join()
        return block(*args)

    monkeypatch.setattr('mmvig.backbones.block.checkpoint', checkpoint)
    assert_same(model._compute_lean(x), plain(x))
    blocks = len(recomputed)
    assert set(recomputed) == {threading.get_ident()} and blocks > 1
    model(x)
    assert len(recomputed) == blocks


def test_a_lean_passs_gradients_are_the_same():
    (model, plain), x = (make(device='cpu', drop_path_rate=0.5) for _ in range(2)), images(device='cpu')
    torch.manual_seed(1)
    loss_of(model._compute_lean(x)).backward()
    torch.manual_seed(1)
    loss_of(plain(x)).backward()
    assert_same(gradients(model), gradients(plain))


def test_a_pool_is_of_one_device(monkeypatch):
    """The default stream is 0 on every device."""
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: SimpleNamespace(cuda_stream=0))
    model = torch.nn.Linear(1, 1)
    wheres = {rules._kind_of(model, [torch.zeros(1, device=device)])[0] for device in ('cpu', 'meta')}
    assert len(wheres) == 2


def test_memory_is_needed_until_the_backward_pass_is_launched():
    node, seen = type('Node', (), {'versions': []})(), []
    graph = object.__new__(capture.Graph)
    graph.pool = object.__new__(memory.Pool)
    graph.pool.node, graph.pool.lane = weakref.ref(node), SimpleNamespace(lock=threading.Lock())
    graph._backward = SimpleNamespace(replay=lambda: seen.append(graph.pool.is_needed()))
    graph._weights, graph._buffers, graph._input_gradients, graph._learning_inputs = {}, [], [], []
    graph._is_learning, graph._given = [True], [torch.zeros(1)]
    graph.backward(node, (torch.ones(1),))
    assert seen == [True] and not graph.pool.is_needed()


def test_each_kind_is_captured_when_it_has_come_often_enough(policy):
    assert policy.call(CALLS + 2) == 'e' * (CALLS - 1) + 'crr'
    log = {size: '' for size in (2, 3, 4)}
    for _ in range(CALLS + 1):
        for size in log:
            log[size] += policy.call(1, size)
    assert set(log.values()) == {'e' * (CALLS - 1) + 'cr'}
    assert policy.call(CALLS + 1, settings=('other',)) == 'e' * (CALLS - 1) + 'cr'
    with torch.no_grad():  # validation has a graph of its own
        assert policy.call(CALLS, 4)[-1] == 'c'
    assert policy.call(1) == policy.call(1, 4) == 'r'
    assert policy.graphs.counts[(4,), 'capture'] == 2
    eager = 6 * (CALLS - 1)
    assert (
        summary(policy.graphs) == f'8 of {14 + eager} passes replayed, 6 captured, {eager} eager; 4 sizes'
    )
    assert len({graph.pool for graph in policy.graphs._graphs.values()}) == 1


@pytest.fixture
def two(policy):
    """Calls for a pass with two outputs, and whether the last capture came after one that had run."""

    def calls(*steps):
        outputs = None
        for step in steps:
            call = {'function': lambda x: (policy.model(x), policy.model.inner(x).exp())}
            outputs = policy.call(1, learned=step if type(step) is int else 0, **call)
            if callable(step):
                step(policy.model, policy.outputs)
        assert outputs == 'c'
        return list(policy.graphs._graphs.values())[-1].has_run

    return calls


@pytest.mark.parametrize('learned', [0, 1, 2])
def test_what_has_run_with_its_gradients_needs_no_other_pass_before_its_capture(two, learned):
    assert two(learned, 2) == (learned == 2)


def test_gradients_of_the_outputs_alone_are_not_the_passs(two):
    assert not two(lambda _, outputs: torch.autograd.grad(sum(outputs).sum(), outputs), 2)


def test_what_is_learned_since_a_pass_needs_another(two, policy):
    policy.model.requires_grad_(False)
    assert not two(lambda model, _: model.requires_grad_(), 2)


def test_a_pass_without_gradients_has_run(two):
    with torch.no_grad():
        assert two(0, 0)


def test_a_watched_pass_is_another(policy):
    handle = policy.model.inner.register_forward_hook(lambda *_: None)
    assert policy.call(CALLS - 1, learned=1, function=lambda x: (policy.model(x),)) == 'e' * (CALLS - 1)
    handle.remove()
    assert policy.call(1) == 'c'
    assert not list(policy.graphs._graphs.values())[-1].has_run


def test_outputs_are_freed_without_a_collection(policy):
    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = policy
            node.append(weakref.ref(ctx))
            return x.clone()

    node = []
    gc.disable()
    try:
        policy.call(CALLS - 1, function=lambda x: (Kept.apply(policy.model(x)),))
        assert node[0]() is not None
        policy.outputs = None
        assert node[0]() is None
    finally:
        gc.enable()


def test_the_least_used_graph_makes_room_for_what_comes_twice_as_often(policy):
    policy.graphs.limit = 2
    policy.call(CALLS + WORTH)
    policy.call(CALLS, 2)
    assert policy.call(2 * CALLS, 3) == 'e' * (2 * CALLS - 1) + 'c'
    assert policy.call(1) == 'r' and len(policy.graphs._graphs) == 2
    assert policy.call(1, 2) == 'e'


def test_kinds_wait_longer_after_a_capture_in_vain(policy):
    policy.graphs.limit = 1
    policy.call(CALLS)
    assert policy.call(2 * CALLS, 2)[-1] == 'c'
    policy.model.inner.weight.requires_grad_(False)
    assert policy.call(4 * CALLS, 2) == 'e' * (4 * CALLS - 1) + 'c'


def test_old_passes_count_less(policy, monkeypatch):
    policy.graphs.limit = 1
    monkeypatch.setattr(rules, 'AGE', 8)
    policy.call(4 * CALLS)
    assert AGE > 1000
    assert 'c' in policy.call(4 * CALLS, 2)


def test_memory_that_is_short_is_given_back(policy):
    policy.call(CALLS)
    policy.has_room = False
    assert policy.call(1, 2) == 'e' and not policy.graphs._graphs


def test_a_pass_before_the_last_ones_backward_pass_is_eager(policy):
    policy.call(CALLS)
    (graph,) = policy.graphs._graphs.values()
    graph.pool.needed = True
    assert policy.call(1) == 'e'
    assert policy.call(CALLS, 2) == 'e' * CALLS
    graph.pool.needed = False
    assert policy.call(1) == 'r'
    assert policy.call(1, 2) == 'c'


def hook_into(policy):
    policy.model.inner.register_forward_hook(lambda *_: None)


def set_forward(policy):
    policy.model.inner.forward = lambda x: x


@pytest.mark.parametrize('change', [hook_into, set_forward])
def test_submodules_that_do_more_than_their_class_are_seen(policy, change):
    policy.call(CALLS + 1)
    change(policy)
    assert policy.call(20 * CALLS) == 'e' * 20 * CALLS


def changes(model):
    """What may change in a module, one after the other."""
    yield model.inner.weight.requires_grad_(False)
    yield model.inner.eval()
    yield setattr(model.inner, 'rate', 0.5)
    yield setattr(model, 'inner', copy.deepcopy(model.inner))
    yield setattr(model.inner, 'bias', None)
    yield setattr(model.inner.weight, 'data', model.inner.weight.data.clone())
    yield model.inner.register_buffer('mean', torch.zeros(1))
    yield model.add_module('other', torch.nn.Identity())


def test_changes_are_seen(policy):
    for _ in changes(policy.model):
        policy.graphs._patience = CALLS
        policy.call(2 * CALLS + 1)
        assert policy.call(1) == 'r'


def test_each_change_ends_a_state(policy):
    state = capture.State.of(policy.model)
    for _ in changes(policy.model):
        assert not state.holds()
        state = capture.State.of(policy.model)
        assert state.holds()


def hooked(model, **options):
    logged = []
    logger = SimpleNamespace(info=logged.append, warning=logged.append)
    runner = SimpleNamespace(model=model, logger=logger)
    hook = CudaGraphsHook(**options)
    hook.before_run(runner)
    return lambda: [hook.after_run(runner), logged][1]


def test_the_hook_wraps_modules_and_logs_what_became_of_them(policy):
    model = torch.nn.ModuleDict({'neck': torch.nn.Linear(4, 4), 'head': torch.nn.Identity()})
    logged = hooked(model, modules=['neck'])
    for _ in range(CALLS + 2):
        model['neck'](torch.zeros(2, 4))
    expected = (
        f'CUDA graphs of neck: 2 of {CALLS + 2} passes replayed, 1 captured, {CALLS - 1} eager; 1 sizes'
    )
    assert logged() == [expected]
    assert isinstance(copy.deepcopy(model)['neck'].forward.graphs, CudaGraphs)


@pytest.mark.parametrize(
    'modules, why', [(['nose'], 'nose: the model has no such'), ('0', '0: it has buffers (running_mean)')]
)
def test_the_hook_leaves_out_what_it_cannot_wrap(modules, why):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1))
    (said,) = hooked(model, modules=modules)()
    assert said.startswith(f'CudaGraphsHook: no graphs of {why}')
    assert 'forward' not in model[0].__dict__


def test_auto_goes_on_without_where_a_capture_fails(policy, caplog):
    policy.fails = True
    assert policy.call(CALLS) == 'e' * CALLS
    assert policy.graphs.limit == 0


def test_nothing_is_captured_in_a_backward_pass(policy):
    policy.call(CALLS - 1)
    logs = []
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda _: logs.append(policy.call(2)))
    x.sum().backward()
    assert logs == ['ee']
    assert policy.call(1) == 'c'


def test_a_number_of_graphs_fails_loudly(policy):
    policy.fails, policy.graphs.limit = True, 1
    policy.call(CALLS - 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        policy.call(1)


def test_nested_tensors_keep_their_nesting():
    tensors = [torch.zeros(i) for i in range(1, 4)]
    nested = ([tensors[0], tensors[1]], tensors[2])
    assert list(capture.tensors_of(nested)) == tensors
    rebuilt = capture.rebuilt(nested, iter(tensors[::-1]))
    assert rebuilt == ([tensors[2], tensors[1]], tensors[0])
    assert list(capture.tensors_of((tensors[0], {'a': 1}))) == [tensors[0], None]


def test_precisions_are_read_by_the_interface_in_use(tmp_path):
    """In a process of its own, as the newer settings forbid reading the older ones for good."""
    (tmp_path / 'it.py').write_text("""
import torch
from mmvig.cuda_graphs.policy import _precisions
before = _precisions()
if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):
    torch.backends.cudnn.conv.fp32_precision = 'ieee'
    torch.backends.cuda.matmul.fp32_precision = 'tf32'
else:
    torch.backends.cuda.matmul.allow_tf32 = True
assert _precisions() != before
""")
    run_well(str(tmp_path / 'it.py'), cwd=tmp_path)


def test_refused_kinds_stay_without(policy):
    policy.call(CALLS)
    next(iter(policy.graphs._graphs.values())).is_refused = True
    assert policy.call(2 * CALLS) == 'e' * 2 * CALLS


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


def test_places_are_not_filled(monkeypatch):
    deterministic, empty_like, seen = torch.utils.deterministic, torch.empty_like, []

    def noted(x):
        seen.append(deterministic.fill_uninitialized_memory)
        return empty_like(x)

    monkeypatch.setattr(torch, 'empty_like', noted)
    for before in (True, False):
        monkeypatch.setattr(deterministic, 'fill_uninitialized_memory', before)
        memory.places([torch.zeros(1)])
        assert deterministic.fill_uninitialized_memory == before
    assert seen == [False, False]


@gpu
def test_training_in_deterministic_mode():
    """There PyTorch fills new memory with NaN, also at each replay."""
    model, plain = make(cuda_graphs=2), make(cuda_graphs=0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for step in range(CALLS + 2):
            x = images(step)
            assert_same(train_step(model, x), train_step(plain, x))
            assert_same(gradients(model), gradients(plain))
            assert_same(infer(model, x), infer(plain, x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.graphs.outcomes()['replay'] == 4


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
    for seed in range(2 * CALLS + 1):
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
        for step in range(CALLS + 4):
            maps += train_step(each, images(step), dtype)
            if step == CALLS:
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
    warm(model, images(), calls=CALLS + 1)
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
    warm(model, images(), infer, CALLS + 1)
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
    for step in range(CALLS + 2):
        assert_same(train_step(model, images(step)), train_step(plain, images(step)))
        assert_same(gradients(model), gradients(plain))
    assert model.graphs.limit == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(1, device='cuda')  # a capture that has failed keeps the generator, if nothing is done


@gpu
def test_memory_is_freed_after_a_failed_capture():
    """What another stream uses: PyTorch holds that until captures have ended."""
    model = make(cuda_graphs='auto')
    compute = model._compute
    model._compute = lambda x: [compute(x), x.sum().item()][0]
    for step in range(CALLS):
        train_step(model, images(step))
    assert model.graphs.limit == 0
    start = reserved()
    used = torch.empty(2**28, device='cuda')
    used.record_stream(torch.cuda.Stream())
    del used
    torch.cuda.synchronize()
    assert reserved() - start < 2**26


@gpu
def test_modules_share_memory_of_backward_passes(deterministic):
    models, plain = [make(), make()], make(cuda_graphs=0)
    for model in models:
        warm(model, images())
    assert len({pool_of(model).lane for model in models}) == 1
    for step in range(2):
        inputs = images(step), images(step + 9)
        maps = [model(x) for model, x in zip(models, inputs, strict=True)]
        for model, x, own in reversed(list(zip(models, inputs, maps, strict=True))):
            model.zero_grad()
            loss_of(own).backward()
            expected = train_step(plain, x)
            assert_same(own, expected)
            assert_same(gradients(model), gradients(plain))
    assert not any(model.calls for model in models)


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


def pool_of(model):
    (pool,) = model.graphs._pools()
    return pool


def reserved():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@gpu
def test_memory_is_freed():
    model = make(cuda_graphs=2)
    del model._compute  # it makes a cycle
    start, x = reserved(), images(side=512)
    for _ in range(CALLS):
        train_step(model, x)
        infer(model, x)
    assert len(model.graphs._graphs) == 2 and pool_of(model).size > 2**28
    del model
    assert reserved() - start < 2**25


@gpu
def test_graphs_in_garbage_do_not_break_a_capture():
    new = make()
    train_step(new, images())
    compute, thresholds = new._compute, gc.get_threshold()

    def computed(x):
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
        return [compute(x), [[] for _ in range(100)]][0]

    new._compute = computed
    gc.set_threshold(10**8)
    try:
        warm(make(), images())  # garbage: it makes a cycle
        warm(new, images())
    finally:
        gc.set_threshold(*thresholds)
    assert new.graphs.outcomes()['capture'] == 1


SIDES = (160, 64, 128, 96)


@gpu
def test_many_sizes_share_the_memory_of_the_largest(deterministic):
    model, plain, alone = make(cuda_graphs='auto'), make(cuda_graphs=0), make()
    warm(alone, images(side=max(SIDES)))
    order = random.Random(0).sample(SIDES * 2 * CALLS, 2 * CALLS * len(SIDES))
    for step, side in enumerate(order):
        x = images(step, side=side)
        assert_same(train_step(model, x), train_step(plain, x))
        assert_same(gradients(model), gradients(plain))
        assert_same(infer(model, x), infer(plain, x))
        change_weights(model)
        change_weights(plain)
    outcomes = model.graphs.outcomes()
    assert outcomes['capture'] == 2 * len(SIDES)
    assert outcomes['replay'] == 2 * (len(order) - CALLS * len(SIDES))
    assert pool_of(model).size <= 1.5 * pool_of(alone).size


@gpu
def test_graphs_outlive_those_that_are_dropped(deterministic):
    """The memory that those had, and cuBLAS's, may be anybody's."""
    model, plain = make(cuda_graphs=2), make(cuda_graphs=0)
    for side, calls in ((160, CALLS), (64, 3 * CALLS), (96, 2 * CALLS)):
        warm(model, images(side=side), calls=calls)
    assert {kind[2][0][-1] for kind in model.graphs._graphs} == {64, 96}
    for seed in range(3):
        reserved()
        full = [torch.full((2**n,), torch.nan, device=DEVICE) for n in range(4, 28) for _ in range(4)]
        for side in (64, 96):
            x = images(seed, side=side)
            assert_same(train_step(model, x), train_step(plain, x))
            assert_same(gradients(model), gradients(plain))
        del full
    assert not model.calls


class Head(torch.nn.Module):
    """Takes and returns nested maps, as necks and heads do."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, maps):
        return tuple(self.conv(x) for x in maps), [[self.conv(x).relu()] for x in maps]


@gpu
def test_nested_inputs_and_outputs(deterministic):
    torch.manual_seed(0)
    plain = Head().to(DEVICE)
    head = copy.deepcopy(plain)
    hooked(torch.nn.ModuleDict({'head': head}), modules=['head'])
    for step in range(2 * CALLS):
        results = []
        for each in (head, plain):
            maps = [images(step, side=side).mean(1, keepdim=True).repeat(1, 8, 1, 1) for side in (16, 8)]
            maps = [x.requires_grad_() for x in maps]
            first, second = each(maps)
            assert type(first) is tuple and type(second) is list and type(second[0]) is list
            outputs = [*first, *(y for (y,) in second)]
            loss_of(outputs).backward()
            results.append([*outputs, *(x.grad for x in maps), *gradients(each)])
            each.zero_grad()
        assert_same(*results)
    assert head.forward.graphs.outcomes()['replay'] == CALLS


def train_in_a_group(rank, file, results):
    """Train with DDP on one of two GPUs, with graphs and without: parameters, losses, eager calls."""
    global DEVICE
    DEVICE = f'cuda:{rank}'
    torch.cuda.set_device(rank)
    torch.backends.cudnn.deterministic = True
    torch.distributed.init_process_group('nccl', init_method=f'file://{file}', rank=rank, world_size=2)
    found = []
    for limit in ('auto', 0):
        model = make(cuda_graphs=limit, drop_path_rate=0.0)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
        losses = []
        for step in range(2 * CALLS):
            model.zero_grad(set_to_none=True)
            parts = [images(10 * step + 2 * part + rank, side=64 + 32 * (step % 2)) for part in range(2)]
            with wrapped.no_sync():  # accumulated
                loss_of(wrapped(parts[0])).backward()
            loss = loss_of(wrapped(parts[1]))
            loss.backward()
            losses.append(loss.item())
            change_weights(model)
        found.append(([p.cpu() for p in model.parameters()], losses, model.graphs.outcomes()))
    torch.save(found, f'{results}/{rank}.pth')
    torch.distributed.destroy_process_group()


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_several_gpus_train_as_without_graphs(tmp_path):
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / 'group'), str(tmp_path)]) for rank in (0, 1)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    ranks = [torch.load(tmp_path / f'{rank}.pth', weights_only=False) for rank in range(2)]
    for (graphed, losses, outcomes), (plain, expected, _) in ranks:
        assert_same(graphed, plain)
        assert losses == expected
        assert outcomes['capture'] == 2 and outcomes['replay'] > CALLS
    assert_same(ranks[0][0][0], ranks[1][0][0])


if __name__ == '__main__':
    train_in_a_group(int(sys.argv[1]), *sys.argv[2:])
