"""cuda_graphs: its checks on a CPU; replays give what eager calls do on a GPU (pytest -m gpu)."""

import copy
import pickle
import threading

import pytest
import torch

from mmvig.backbones import ViG, ViGH
from mmvig.backbones.graphs import CALLS

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


def warm(model, x, step=train_step):
    """Call until the graph is there and has been replayed; the list of eager calls is empty then."""
    for _ in range(CALLS):
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


@pytest.mark.parametrize('value', [-1, 1.0, True, '1', None])
@every_family
def test_bad_numbers_are_named(family, value):
    with pytest.raises(ValueError, match='cuda_graphs must be an int of at least 0, got'):
        make(family, value, device='cpu')


@every_family
def test_recomputed_blocks_are_refused(family):
    with pytest.raises(ValueError, match='cuda_graphs and with_cp exclude each other'):
        make(family, with_cp=True, device='cpu')


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


@gpu
def test_second_backward_pass_is_refused():
    model = make()
    warm(model, images())
    loss = loss_of(model(images()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='allow one backward pass'):
        loss.backward()
    train_step(model, images())
    assert not model.calls


@gpu
def test_unused_maps():
    model = make()
    warm(model, images())
    model.zero_grad(set_to_none=True)
    model(images())[1].sum().backward()
    assert not model.calls and not model.norm3.weight.grad.any()
    assert model.norm1.bias.grad.any()


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
