"""first_use: what a pass notes and leaves alone, locks, launches; on a GPU, results (pytest -m gpu)."""

import contextlib
import copy
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import run_tool, run_well
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mmvig import first_use
from mmvig.backbones import ViG, ViGH
from mmvig.first_use import FirstUse, compile_all, note

if importlib.util.find_spec('triton') is None:
    pytest.skip('there is no Triton', allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from mmvig.ops import launch

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'  # where conftest.py has Triton interpret its kernels
gpu = pytest.mark.gpu
on_cpu = pytest.mark.skipif(ON_GPU, reason='needs the interpreter')
LAUNCHES = Path(__file__).parent / 'ops/launch_arguments.py'
ARCHS = {
    ViGH: {'embed_dims': 32, 'depths': [1, 1], 'num_heads': [1, 2]},
    ViG: {'embed_dims': 32, 'depth': 2, 'num_heads': 1},
}


def make(family=ViGH, **options):
    torch.manual_seed(0)
    options = {'backend': 'triton', 'drop_path_rate': 0.2, **options}
    if family is ViGH:
        options.setdefault('out_indices', (0, 1))
    return family(ARCHS[family], **options).to(DEVICE)


def image():
    return torch.randn(1, 3, 32, 32, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


def name(kernel, constants):
    return kernel.__name__, tuple(sorted((key, str(value)) for key, value in constants.items()))


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched; none is run."""
    names = []

    def run(self, *args, grid, warmup, **constants):
        names.append(name(self, constants))

    monkeypatch.setattr(InterpretedFunction, 'run', run)
    return names


@on_cpu
@pytest.mark.parametrize('family', ARCHS)
@pytest.mark.parametrize(
    'training, dtype, options',
    [
        (False, None, {}),
        (False, torch.bfloat16, {}),
        (True, torch.bfloat16, {}),
        (True, None, {'with_cp': True}),
        (True, None, {'frozen_stages': 1}),
    ],
)
def test_a_pass_notes_what_it_launches(family, training, dtype, options, launched):
    model = make(family, **options).train(training)
    with (
        torch.autocast('cpu', dtype, enabled=dtype is not None),
        torch.set_grad_enabled(training),
    ):
        noted = note(model, model._compute, image())
        assert noted and not launched
        maps = model._compute(image())
    if training:
        sum(y.sum() for y in maps).backward()
    assert {name(kernel, constants) for kernel, _, constants in noted} == set(launched)
    assert len(noted) == len({(id(kernel), str(dtypes), id(c)) for kernel, dtypes, c in noted})
    assert not any(isinstance(x, torch.Tensor) for _, dtypes, _ in noted for x in dtypes)


@on_cpu
def test_noting_leaves_all_as_it_was(launched):
    model, x = make(), image().requires_grad_()
    model.stem.down1.conv.weight.grad = torch.ones_like(model.stem.down1.conv.weight)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    with torch.autocast('cpu', torch.bfloat16):
        note(model, model._compute, x)
        # Where autocast kept a cast of the pass, its graph would have been freed.
        maps = model._compute(x)
    sum(y.sum() for y in maps).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.set_rng_state(random_state)
    model.zero_grad()
    note(model, model._compute, x.detach())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert launch._noting.kernels is None


@on_cpu
def test_an_error_ends_the_noting(launched):
    with pytest.raises(RuntimeError, match='no pass'):
        note(make(), lambda x: (_ for _ in ()).throw(RuntimeError('no pass')), image())
    assert launch._noting.kernels is None


@on_cpu
def test_other_threads_launch_meanwhile(launched):
    model, x = make().eval(), image()

    def compute(x):
        thread = threading.Thread(target=model._compute, args=(x,))
        thread.start()
        thread.join()
        return ()

    assert note(model, compute, x) == [] and launched


def hook(*args):
    raise AssertionError('called')


class Own(ViGH):
    """A user's, who may do anything in a pass."""


@on_cpu
def test_seen_passes_are_not_noted():
    model, x = make(), image()
    assert first_use._is_unseen(model, model._compute, x)
    other, chunked = make(ViG), make(backend='chunked')
    assert first_use._is_unseen(other, other._compute, x)
    assert not first_use._is_unseen(other, model._compute, x)
    assert not first_use._is_unseen(model, lambda x: model._compute(x), x)
    assert not first_use._is_unseen(chunked, chunked._compute, x)
    assert not first_use._is_unseen(model, model._compute, x[:0])
    own = Own(ARCHS[ViGH], out_indices=(0, 1))
    assert not first_use._is_unseen(own, own._compute, x)
    handles = [
        lambda model: model.stem.down1.register_forward_hook(hook),
        lambda model: model.stem.down1.conv.weight.register_hook(hook),
        lambda model: setattr(model.stages[0], 'forward', hook),
        lambda model: [each._parameters.clear() for each in model.modules()],
        lambda model: setattr(model.stem.down1, 'norm', nn.BatchNorm2d(16)),
        lambda model: setattr(model.stem.down1, 'norm', nn.SyncBatchNorm(16, track_running_stats=False)),
        lambda model: nn.utils.parametrizations.weight_norm(model.stem.down1.conv),
    ]
    for change in handles:
        changed = make()
        change(changed)
        assert not first_use._is_unseen(changed, changed._compute, x)
    with torch.autograd.graph.saved_tensors_hooks(hook, hook):
        assert not first_use._is_unseen(model, model._compute, x)
    with FlopCounterMode(display=False):
        assert not first_use._is_unseen(model, model._compute, x)
    seen = []
    y = torch.ones(1, requires_grad=True) * 2
    y.register_hook(lambda grad: seen.append(first_use._is_unseen(model, model._compute, x)))
    y.backward()
    assert seen == [False]


def test_copies_start_anew():
    used = FirstUse()
    used._kinds.add(1)
    assert not copy.deepcopy(used)._kinds and not pickle.loads(pickle.dumps(used))._kinds


class Image(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, device = True, torch.device('cuda', 0)


def test_each_kind_is_prepared_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device', contextlib.nullcontext)
    monkeypatch.setattr(first_use, 'PLAIN_TENSORS', [Image])
    monkeypatch.setattr(first_use, '_is_unseen', lambda module, call, x: call is not None)
    monkeypatch.setattr(first_use, 'note', lambda module, call, x: call)
    done = []
    monkeypatch.setattr(first_use, 'compile_all', lambda kernels, device: done.append(kernels))
    use, module, x = FirstUse(), nn.Identity(), torch.zeros(1).as_subclass(Image)
    for number in (0, 0, 1):
        use.prepare(module, number, x)
    assert done == [0]
    module.eval()
    use.prepare(module, 1, x)
    use.prepare(module, 2, x.half())
    with torch.no_grad():
        use.prepare(module, 3, x)
    for dtype in (torch.float16, torch.bfloat16, torch.bfloat16):
        monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: True)
        monkeypatch.setattr(torch, 'get_autocast_dtype', lambda kind, dtype=dtype: dtype)
        use.prepare(module, str(dtype), x)
    assert done == [0, 1, 2, 3, 'torch.float16', 'torch.bfloat16']
    use.prepare(module.train(), None, x.double())  # seen
    use.prepare(module, 4, x.double())
    use.prepare(module, 5, torch.zeros(1, dtype=torch.int))
    assert done[6:] == []
    monkeypatch.setattr(first_use, 'compile_all', lambda *args: 1 / 0)
    x.requires_grad_()
    for _ in range(2):  # nothing is kept of a failure
        with pytest.raises(ZeroDivisionError):
            use.prepare(module, 6, x)


@on_cpu
@pytest.mark.parametrize('unused', [False, True])
def test_ddp_does_not_see_the_noting(unused):
    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = make(backend='chunked')
            self.notes = True

        def forward(self, x):
            if self.notes:
                note(self.backbone, self.backbone._compute, x)
            return self.backbone(x)

    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        module = Noting()
        model = DistributedDataParallel(module, find_unused_parameters=unused)
        found = []
        for module.notes in (False, True, True):
            model.zero_grad()
            torch.manual_seed(1)
            sum(y.sum() for y in model(image())).backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
    finally:
        distributed.destroy_process_group()


# Compiling.


def test_the_longest_kernel_is_compiled_first(monkeypatch):
    kernels = [(SimpleNamespace(fn=fn), [], {}) for fn in (name, make, image)]
    monkeypatch.setattr(launch, 'noting', lambda: contextlib.nullcontext(dict(enumerate(kernels))))
    model = make(backend='chunked')
    assert [kernel.fn for kernel, *_ in note(model, model._compute, image())] == [make, image, name]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What is compiled, in place of a compiler; a float is the seconds that one takes."""
    done = []

    def compile_kernel(device, seconds):
        time.sleep(seconds)
        done.append(seconds)
        if seconds == 0:
            raise ValueError('it does not compile')

    monkeypatch.setattr(launch, 'compile_kernel', compile_kernel)
    monkeypatch.setattr(launch, 'prepare_compiler', lambda device: None)
    monkeypatch.setattr(launch, 'cache_folder', lambda: str(tmp_path / 'cache'))
    monkeypatch.setattr(first_use, 'PATIENCE', 0.1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    return done


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(first_use, 'print_log', lambda line, *args: lines.append(line))
    return lines


def test_only_what_takes_long_is_told(compiled, said, tmp_path, monkeypatch):
    compile_all([], torch.device('cuda', 0))
    compile_all([(0.01,)] * 3, torch.device('cuda', 0))
    assert compiled == [0.01] * 3 and not said
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: range(2))
    compile_all([(0.1,)] * 4, torch.device('cuda', 0))
    (line,) = said
    assert line == (
        'compiling 4 kernels for cuda:0 (a GPU) with 2 threads, once; '
        f'they are kept in {tmp_path / "cache"}'
    )


def test_a_bar_is_for_terminals(compiled, said, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    compile_all([(0.2,)] * 3, torch.device('cuda', 0))
    assert '3/3' in capsys.readouterr().err


def test_errors_are_raised(compiled):
    with pytest.raises(ValueError, match='it does not compile'):
        compile_all([(0.01,), (0,)], torch.device('cuda', 0))


def test_a_folder_that_cannot_be_locked(compiled, tmp_path):
    (tmp_path / 'cache').write_text('a file')
    compile_all([(0.01,)], torch.device('cuda', 0))
    assert compiled == [0.01]


def test_a_killed_holder_does_not_block(said, tmp_path, monkeypatch):
    (tmp_path / 'it.py').write_text(f"""
import os, time
from mmvig.first_use import _alone
with _alone({str(tmp_path)!r}):
    with open('new', 'w') as file:
        file.write(str(os.getpid()))
    os.rename('new', 'holder')
    time.sleep(100)
""")
    monkeypatch.setattr(first_use, 'PATIENCE', 0.1)
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(run_tool, str(tmp_path / 'it.py'), cwd=tmp_path, timeout=100)
        while not (tmp_path / 'holder').exists():
            assert not holder.done(), holder.result()
            time.sleep(0.01)
        number = int((tmp_path / 'holder').read_text())
        threading.Timer(0.5, os.kill, [number, signal.SIGKILL]).start()
        start = time.monotonic()
        with first_use._alone(str(tmp_path)):
            assert 0.3 < time.monotonic() - start < 10
    assert holder.result().returncode == -signal.SIGKILL
    assert said == [f'waiting for another process that compiles kernels ({tmp_path / "mmvig.lock"})']


def launches(*args, cache):
    """What a process of launch_arguments.py says."""
    return run_well(str(LAUNCHES), *args, cwd=cache, TRITON_CACHE_DIR=str(cache)).splitlines()


@on_cpu
def test_processes_compile_each_kernel_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: launches('compile', cache=tmp_path)[-1], range(2)))
    assert sorted(both) == ['compiled 0 of 3', 'compiled 4 of 3'], both  # and the compiler's trial


# Launches.


@on_cpu
def test_launches_pass_what_tritons_do(tmp_path):
    """On the version of Triton that is installed; run the script with others in PYTHONPATH."""
    lines = launches(cache=tmp_path)
    assert len(lines) == 3, lines


class Kernel:
    """A kernel of a Triton whose launcher takes what ``layout`` makes of today's arguments."""

    fn, arg_names = 'kernel', ('p_x', 'n', 'BLOCK')

    def __init__(self, layout):
        self.layout, self.calls = layout, []
        self.compiled = Compiled(self.calls)

    def warmup(self, *args, grid, **constants):
        return self.compiled

    def __getitem__(self, grid):
        return lambda *args, **constants: self.compiled.run(
            *self.layout(
                (*grid, 7, 1, self.compiled.packed_metadata, None, None, None, *args, *constants.values())
            )
        )


class Compiled:
    function, packed_metadata = 1, (4, 1)

    def __init__(self, calls):
        self._run = self._launch = lambda *args: calls.append(args)

    @property
    def run(self):
        return self._run


class Chain:
    def __init__(self, *calls):
        self.calls = calls


LAYOUTS = {
    'same': (lambda a: a, True),
    'no hooks': (lambda a: (*a[:6], {'name': 'kernel'}, Chain(), Chain(), *a[9:]), True),
    'hooks': (lambda a: (*a[:6], {'name': 'kernel'}, Chain(print), Chain(), *a[9:]), False),
    'without constants': (lambda a: a[:-1], False),
    'more': (lambda a: (*a, None), False),
    'another order': (lambda a: (*a[:4], a[5], a[4], *a[6:]), False),
    'addresses': (lambda a: (*a[:9], a[9].data_ptr(), *a[10:]), False),
}


@pytest.mark.parametrize('layout, known', LAYOUTS.values(), ids=LAYOUTS)
def test_unknown_launchers_are_left_to_triton(layout, known, monkeypatch):
    monkeypatch.setattr(launch, 'VERSION', (3, 8))
    monkeypatch.setattr(launch, 'FAST_LAUNCH', True)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda index: 7, raising=False)
    kernel, constants = Kernel(layout), launch.Constants(BLOCK=64)
    x, key = torch.zeros(3), (torch.device('cuda', 0), torch.float32)
    for _ in range(3):
        launch.launch(kernel, key, (2, 1, 1), (x, 3), constants)
    first, *others = kernel.calls
    assert len(others) == 2  # each is launched once
    ours = (2, 1, 1, 7, 1, (4, 1), None, None, None, x.data_ptr(), 3, 64)
    assert all(each == ours if known else len(each) == len(first) for each in others)
    assert bool(constants.compiled[kernel.fn, key]) == known
    assert kernel.compiled.run is kernel.compiled._launch


# On a GPU from here on.

FIRST = """
import sys, time, torch
from mmvig.backbones import ViGH
from mmvig.first_use import FirstUse
lazy, training = sys.argv[2] == 'one by one', sys.argv[3] == 'training'
if lazy:
    FirstUse.prepare = lambda *args: None
torch.manual_seed(0)
model = ViGH('tiny').cuda().train(training)
x = torch.randn(2, 3, 224, 224, device='cuda')
torch.cuda.synchronize()
start = time.perf_counter()
with torch.autocast('cuda', torch.bfloat16), torch.set_grad_enabled(training):
    maps = model(x)
if training:
    sum(y.float().square().mean() for y in maps).backward()
torch.cuda.synchronize()
print(f'{sys.argv[2]}, {sys.argv[3]}: {time.perf_counter() - start:.1f} s')
torch.save([[y.detach() for y in maps], [p.grad for p in model.parameters()]], sys.argv[1])
"""


@gpu
@pytest.mark.parametrize('step', ['inference', 'training'])
def test_compiled_ahead_gives_the_same(step, tmp_path):
    results = []
    for way in ('side by side', 'one by one', 'from disk'):
        cache = tmp_path / ('other' if way == 'one by one' else 'cache')
        file = tmp_path / f'{way}.pt'
        env = {**os.environ, 'TRITON_CACHE_DIR': str(cache)}
        command = [sys.executable, '-c', FIRST, file, way, step]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        print(done.stdout.splitlines()[-1])
        assert ('compiling' in done.stdout + done.stderr) == (way == 'side by side')
        results.append(torch.load(file))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@gpu
@pytest.mark.parametrize('training', [False, True])
def test_after_noting_nothing_is_left_to_compile(training, monkeypatch):
    """In this process too, where others have compiled some."""
    model = make(ViGH, backend='auto').train(training)
    late = []
    first = launch._launch_first
    monkeypatch.setattr(
        launch,
        '_launch_first',
        lambda kernel, key, grid, args, constants: (
            late.append(len(kernel.device_caches[0][0])),
            first(kernel, key, grid, args, constants),
            late.append(len(kernel.device_caches[0][0])),
        )[1],
    )
    x, memory = torch.rand(2, 3, 192, 160, device='cuda'), torch.cuda.memory_allocated()
    with torch.autocast('cuda', torch.float16), torch.set_grad_enabled(training):
        state = torch.cuda.get_rng_state()
        model.first_use.prepare(model, model._compute, x)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        maps = [*model(x), *model(x.new_ones(2, 3, 160, 224))]  # sides of maps that 7 divides, and others
    if training:
        sum(y.float().mean() for y in maps).backward()
    assert late[::2] == late[1::2]
    del maps
    model.zero_grad()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - memory < 2**25  # buffers that last
