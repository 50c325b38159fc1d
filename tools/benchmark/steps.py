"""The steps that `backbone.py` times, the checks before a time is reported, and their kernels."""

from collections.abc import Callable

import torch
from common import Clock, autocast, relative_error
from models import Entry, build
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmvig.backbones.layers import randomise

# Error allowed in any case, relative to the largest value: what a few roundings make of it.
TOLERANCE = {'bf16': 1e-2, 'fp16': 2e-3, 'fp32': 1e-4}
# Gradients at the maps: small enough for fp16 without a loss scale.
GRADIENT_SCALE = 1e-2
PROFILED_STEPS = 3


class Wrong(Exception):
    """A model computes something else than it should."""


def run_model(module: nn.Module, x: Tensor, dtype: str) -> tuple[Tensor, ...]:
    """A forward pass in a precision."""
    # Inside the step, so that a CUDA graph holds the weights' casts too.
    with autocast(x.device.type, dtype):
        return module(x)


def random_like(maps: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients for maps."""
    return [torch.randn_like(each).mul_(GRADIENT_SCALE) for each in maps]


def make_step(model: nn.Module, module: nn.Module, x: Tensor, dtype: str, kind: str) -> Callable:
    """What is timed: a call of ``module``, which is ``model`` or its compiled form. It returns the maps."""
    model.train(kind == 'training')
    if kind == 'inference':

        def inference() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return run_model(module, x, dtype)

        return inference

    gradients = random_like(run_model(model, x, dtype))

    def training() -> tuple[Tensor, ...]:
        model.zero_grad(set_to_none=True)
        maps = run_model(module, x, dtype)
        torch.autograd.backward(maps, gradients)
        return maps

    return training


def check_step(step: Callable, model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    """Run a step and check the shapes of its maps, and that they and gradients are finite.

    Raises:
        Wrong: They are not.
    """
    maps = step()
    found = [tuple(each.shape) for each in maps]
    if found != shapes:
        raise Wrong(f'maps have the shapes {found}, not {shapes}')
    if not all(bool(each.isfinite().all()) for each in maps):
        raise Wrong('maps are not finite')
    if maps[0].requires_grad:
        bad = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is None or not bool(parameter.grad.isfinite().all())
        ]
        if bad:
            raise Wrong(f'{len(bad)} parameters without a finite gradient, such as {bad[0]}')


def check_ours(entry: Entry, dtype: str, device: str, backend: str = 'auto') -> dict[str, float]:
    """Compare a model of ours with the chunked backend in float64 on small images: maps and gradients.

    Returns:
        Errors relative to the largest value of each map, the largest of them, and of all gradients by
        their 2-norm: ``maps``, ``gradients``, and of the chunked backend in the same precision
        ``maps_chunked``, ``gradients_chunked``.

    Raises:
        Wrong: An error is more than twice the chunked backend's, and above the tolerance.
    """
    torch.manual_seed(0)
    fast = build(entry, 64, 96, backend=backend).to(device).eval()
    randomise(fast)
    plain = build(entry, 64, 96, backend='chunked').to(device).eval()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 64, 96, device=device)

    def compute(model: nn.Module, x: Tensor, dtype: str) -> tuple[tuple[Tensor, ...], ...]:
        maps = run_model(model, x, dtype)
        given = [each.to(one) for each, one in zip(upstream, maps, strict=True)]
        return maps, torch.autograd.grad(maps, list(model.parameters()), given)

    upstream = random_like(plain(x))
    actual, low = compute(fast, x, dtype), compute(plain, x, dtype)
    truth = compute(plain.double(), x.double(), 'fp32')  # no autocast: in the weights' float64

    errors = {}
    for suffix, result in (('', actual), ('_chunked', low)):
        pairs = zip(result[0], truth[0], strict=True)
        errors[f'maps{suffix}'] = max(relative_error(*pair) for pair in pairs)
        distances = [(a - b).norm() for a, b in zip(result[1], truth[1], strict=True)]
        size = torch.stack([each.norm() for each in truth[1]]).norm()
        errors[f'gradients{suffix}'] = (torch.stack(distances).norm() / size).item()
    for name in ('maps', 'gradients'):
        limit = max(2 * errors[f'{name}_chunked'], TOLERANCE[dtype])
        if not errors[name] <= limit:
            raise Wrong(f'error of the {name} is {errors[name]:.1e}, allowed is {limit:.1e}')
    return errors


def capture(step: Callable) -> Callable:
    """The step as a CUDA graph, checked against the step itself.

    Raises:
        Wrong: Its replay gives other maps.
    """
    # Detached: nodes that gather gradients would outlive the call, and tie the capture to this stream.
    torch.manual_seed(0)
    expected = [each.detach() for each in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries set up at first use on a stream may not be captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return captured

    replay.step = step  # the graph reads its weights and images, and does not hold them

    for each in captured:
        each.zero_()  # so that what the check sees was written by the replay
    torch.manual_seed(0)  # stochastic depth draws the same
    error = max(relative_error(*pair) for pair in zip(replay(), expected, strict=True))
    if not error <= TOLERANCE['bf16']:
        raise Wrong(f'the graph has an error of {error:.1e} against the same step in eager mode')
    return replay


def kernels(step: Callable, device: str) -> list[dict]:
    """Kernels (on a CPU, operators) of a step, largest total first: name, seconds, count, share.

    Raises:
        RuntimeError: The profiler saw none.
    """
    activity = ProfilerActivity.CUDA if device == 'cuda' else ProfilerActivity.CPU
    clock = Clock(device)
    clock.wait()
    with profile(activities=[activity]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        clock.wait()
    rows = []
    for event in profiler.key_averages():
        if device == 'cuda':
            if (
                event.device_type != DeviceType.CUDA
                or event.is_user_annotation
                or event.key == 'Context Sync'
            ):
                continue
            total = event.self_device_time_total
        else:
            total = event.self_cpu_time_total
        seconds = total / 1e6 / PROFILED_STEPS
        rows.append({'name': event.key, 'seconds': seconds, 'count': event.count / PROFILED_STEPS})
    whole = sum(row['seconds'] for row in rows)
    if not whole:
        raise RuntimeError(f'the profiler saw nothing run on the {device}')
    rows.sort(key=lambda row: -row['seconds'])
    return [{**row, 'share': row['seconds'] / whole} for row in rows]
